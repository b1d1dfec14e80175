"""How answers of two models are shown side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import short
from ...optimizer.answers.compare import Compared
from .tables import print_table, table

_MOST = 8  # positions that are shown: those that differ most


def comparison_json(found: Compared) -> dict[str, Any]:
    """Everything that was found on one prompt."""
    difference = found.difference
    return {
        "prompt": found.prompt,
        "prompt_tokens": found.prompt_tokens,
        "dense": found.dense,
        "dsa": found.dsa,
        "first_difference": None if difference is None else vars(difference),
        "agreement": found.agreement,
        "mean_kl": found.mean_kl,
        "positions": [vars(it) for it in found.positions],
    }


def heading(prompt: str) -> str:
    """One line, whatever the prompt holds."""
    return short(" ".join(prompt.split()), 60)


def comparisons_json(found: Sequence[Compared], index_topk: int | None) -> dict[str, Any]:
    """As --json prints it."""
    return {"index_topk": index_topk, "prompts": list(map(comparison_json, found))}


def show_comparison(found: Compared, index_topk: int | None) -> None:
    """Both texts, where they part, the positions that are furthest apart, and whether any of it is sparse."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    print(f"==> {heading(found.prompt)} <==")
    texts = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for name in ("dense", "DSA"):
        texts.add_column(name, ratio=1, overflow="fold")
    texts.add_row(Text(found.dense), Text(found.dsa))  # never read as markup
    print_table(texts)
    print(_parting(found))
    count = len(found.positions)
    same = sum(it.rank == 1 for it in found.positions)
    print(
        f"along the dense text: same most likely token at {same} of {count} positions, mean KL {found.mean_kl:.3g} nats"
    )
    _show_furthest(found)
    tokens = found.prompt_tokens + len(found.positions) - 1
    if index_topk is not None and tokens <= index_topk:
        print(
            f"{tokens} tokens are no more than index_topk {index_topk}: here DSA is dense attention; take a longer prompt"
        )


def _parting(found: Compared) -> str:
    if found.difference is None:
        return "both texts are the same"
    dense, dsa = ("its end" if it is None else repr(it) for it in (found.difference.dense, found.difference.dsa))
    return f"first difference at token {found.difference.token}: dense {dense}, DSA {dsa}"


def _show_furthest(found: Compared) -> None:
    furthest = sorted(range(len(found.positions)), key=lambda at: -found.positions[at].kl)[:_MOST]
    made = table("token", "position", "KL", "rank in DSA", "logprob dense", "DSA")
    for at in sorted(furthest):
        it = found.positions[at]
        made.add_row(
            _plain(it.text), str(at), f"{it.kl:.3g}", str(it.rank), f"{it.dense_logprob:.3f}", f"{it.dsa_logprob:.3f}"
        )
    print_table(made)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(repr(text))
