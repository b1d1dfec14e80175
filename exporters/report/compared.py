"""What `compare --json` printed, as one HTML page: both texts of every prompt, and how far apart the models are by token."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from .parts import document, number, table

Found = Mapping[str, Any]
_FURTHEST = 12  # fixed by what a screen shows: rows of the table of tokens that are furthest apart
_PROMPT_SHOWN = 600  # fixed by what a screen shows: characters of a prompt's end, which is what is answered


def compared_page(found: Found, title: str) -> str:
    """Raises KeyError, TypeError, ValueError or AttributeError for what `compare` does not print."""
    prompts: Sequence[Found] = found["prompts"]
    return document(
        title, [_summary(prompts), *(_prompt(n, one, found["index_topk"]) for n, one in enumerate(prompts, 1))]
    )


def _summary(prompts: Sequence[Found]) -> str:
    same = sum(one["first_difference"] is None for one in prompts)
    rows = [
        [
            str(number_), str(one["prompt_tokens"]), _parting(one["first_difference"]), number(one["agreement"], ".1%"),
            number(one["mean_kl"], ".4f"),
        ]
        for number_, one in enumerate(prompts, 1)
    ]  # fmt: skip
    heads = ["prompt", "tokens", "texts", "same top token", "mean KL, nats"]
    return f"<p>{same} of {len(prompts)} prompts have the same greedy text from both models.</p>" + table(heads, rows)


def _parting(difference: Found | None) -> str:
    return "the same" if difference is None else f"part at token {difference['token'] + 1}"


def _prompt(number_: int, one: Found, index_topk: int | None) -> str:
    tokens = one["prompt_tokens"] + len(one["positions"]) - 1
    dense_anyway = index_topk is not None and tokens <= index_topk
    said = (
        f"{tokens} tokens are no more than index_topk {index_topk}: here DSA is dense attention." if dense_anyway
        else "Underlined in the dense model's text: tokens that DSA would not have said there."
    )  # fmt: skip
    columns = "".join(
        f'<section><h3>{name}</h3><pre tabindex="0">{text}</pre></section>'
        for name, text in (("dense", _marked(one)), ("DSA", html.escape(one["dsa"])))
    )
    return "\n".join(
        [
            f"<h2>Prompt {number_}</h2>", f'<pre class="prompt quiet">{html.escape(_end_of(one["prompt"]))}</pre>',
            f'<div class="pair">{columns}</div>', f'<p class="quiet">{said}</p>', _furthest(one["positions"]),
        ]
    )  # fmt: skip


def _end_of(prompt: str) -> str:
    return prompt if len(prompt) <= _PROMPT_SHOWN else f"... {prompt[-_PROMPT_SHOWN:]}"


def _marked(one: Found) -> str:
    """The dense text, token by token as far as each says its part alone: a character may lie in several."""
    made, rest = [], one["dense"]
    for it in one["positions"]:
        if not it["text"] or not rest.startswith(it["text"]):
            break
        rest, text = rest[len(it["text"]) :], html.escape(it["text"])
        known = f"rank {it['rank']} in DSA, KL {number(it['kl'], '.3f')}"
        made.append(text if it["rank"] == 1 else f'<mark title="{known}">{text}</mark>')
    return "".join(made) + html.escape(rest)


def _furthest(positions: Sequence[Found]) -> str:
    """Where the models are furthest apart, in the order of the text."""
    ranked = sorted(range(len(positions)), key=lambda n: -(positions[n]["kl"] or 0.0))[:_FURTHEST]
    rows = [
        [
            str(n + 1), repr(positions[n]["text"]), number(positions[n]["kl"], ".4f"), str(positions[n]["rank"]),
            number(positions[n]["dense_logprob"], ".2f"), number(positions[n]["dsa_logprob"], ".2f"),
        ]
        for n in sorted(ranked)
    ]  # fmt: skip
    heads = ["token", "text", "KL, nats", "rank in DSA", "dense log-prob.", "DSA log-prob."]
    return table(heads, rows)
