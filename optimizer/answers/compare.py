"""A dense model and its DSA one on the same prompts: what each says, and how far the sparse one is from the dense one's words.

Both texts are greedy. The figures by position are taken along the dense model's text, which both models are led through, so that one
early difference is not counted again at every later position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError, UserError
from ...files.manifests.engine_manifest import engine_folder
from ...files.manifests.export_manifest import is_export
from ...files.model.model_files import CONFIG, optional_json
from ...files.model.text_model import text_config
from ...runtime.generation import Sampling, Walk
from ..model.checkpoint import Checkpoint
from .answer import Ask, answer
from .opened import Opened, open_model
from .prompts import chat_ids, conversation, text_ids
from .stream import detokenizer


@dataclass(frozen=True)
class Position:
    """A token of the dense model's text. kl: KL(dense || DSA) of what comes next, in nats. rank: of the token in DSA's order, 1
    where DSA would have said it, too. The logarithms of its probability are of both."""

    token: int
    text: str
    kl: float
    rank: int
    dense_logprob: float
    dsa_logprob: float


@dataclass(frozen=True)
class Difference:
    """token: number of the first that differs, from 0; the texts from there on differ. dense, dsa: None where a text has ended."""

    token: int
    dense: str | None
    dsa: str | None


@dataclass(frozen=True)
class Compared:
    """One prompt. difference: None where both say the same. positions: of the dense text; the last may be its end."""

    prompt: str
    prompt_tokens: int
    dense: str
    dsa: str
    difference: Difference | None
    positions: tuple[Position, ...]

    @property
    def agreement(self) -> float:
        """Share of positions where both find the same token most likely."""
        return sum(it.rank == 1 for it in self.positions) / len(self.positions)

    @property
    def mean_kl(self) -> float:
        return sum(it.kl for it in self.positions) / len(self.positions)


@dataclass(frozen=True)
class Both:
    """The two models. index_topk: keys that a token attends to; None where the folder does not say. A sequence that is no longer is
    dense in both."""

    dense: Opened
    dsa: Opened
    index_topk: int | None


def open_both(
    dense: str, dsa: str, runtime: str | None = None, device: str = "cpu", trust_remote_code: bool = False,
    dtype: str | None = None,
) -> Both:  # fmt: skip
    """runtime: of the DSA model. dtype: as for `open_model`. Raises UserError where the first is not dense or the second not sparse."""
    if is_export(dense) or engine_folder(dense) is not None or Checkpoint.open(dense).is_dsa():
        raise UserError(f"{dense}: a DSA model, expected the dense checkpoint first: mla2dsa compare DENSE DSA")
    if not is_export(dsa) and engine_folder(dsa) is None and not Checkpoint.open(dsa).is_dsa():
        raise UserError(
            f"{dsa}: a dense checkpoint (no indexer), expected the converted one: mla2dsa compare DENSE DSA"
        )
    first = open_model(dense, "torch", device, trust_remote_code, dtype=dtype)
    second = open_model(dsa, runtime, device, trust_remote_code, dtype=dtype)
    topk = text_config(optional_json(second.folder / CONFIG)).get("index_topk")
    return Both(first, second, topk if isinstance(topk, int) else None)


def compare(
    both: Both, prompts: Sequence[str], most: int, *, chat: bool = False, system: str | None = None
) -> Iterator[Compared]:
    """most: tokens of each answer. Raises UsageError, or UserError for two models that do not read the same tokens."""
    if most < 1:
        raise UsageError(f"--max-new-tokens {most}, expected at least 1")
    for prompt in prompts:
        ids = _same_ids(both, prompt, chat, system)
        yield _compared(both, prompt, ids, most, continues=not chat)


def _same_ids(both: Both, prompt: str, chat: bool, system: str | None) -> tuple[int, ...]:
    found = [
        chat_ids(it, conversation(prompt, system)) if chat else text_ids(it, prompt) for it in (both.dense, both.dsa)
    ]
    if found[0] != found[1]:
        raise UserError(
            f"{both.dsa.folder}: its tokenizer reads a prompt differently than {both.dense.folder}'s; copy the files of the tokenizer"
        )
    return tuple(found[0])


def _compared(both: Both, prompt: str, ids: tuple[int, ...], most: int, continues: bool) -> Compared:
    positions = tuple(_along(both, ids, most))
    tokens = [it.token for it in positions if it.token not in both.dense.stop]
    pieces = list(answer(both.dsa, Ask(ids, most, Sampling(), continues=continues)))
    theirs = [piece.token for piece in pieces if piece.token is not None]
    decoder = detokenizer(both.dense.tokenizer, ids if continues else ())
    text = "".join(map(decoder.step, tokens)) + decoder.end()
    dsa = "".join(piece.text for piece in pieces)
    return Compared(prompt, len(ids), text, dsa, _difference(both, tokens, theirs), positions)


def _along(both: Both, ids: tuple[int, ...], most: int) -> Iterator[Position]:
    """The dense model leads."""
    dense, dsa = (Walk(it.session, ids, most) for it in (both.dense, both.dsa))
    if dense.logits.shape != dsa.logits.shape:
        raise UserError(
            f"{both.dsa.folder}: a vocabulary of {len(dsa.logits)}, {both.dense.folder} has {len(dense.logits)}: not made from it"
        )
    for count in range(most):
        token = int(dense.logits.argmax())
        yield _position(both.dense.tokenizer, token, dense.logits, dsa.logits)
        if token in both.dense.stop or count == most - 1:
            return
        dense.feed(token)
        dsa.feed(token)


def _position(tokenizer: Any, token: int, dense: Tensor, dsa: Tensor) -> Position:
    ours, theirs = torch.log_softmax(dense.double(), -1), torch.log_softmax(dsa.double(), -1)
    kl = max(float((ours.exp() * (ours - theirs)).sum()), 0.0)  # rounding alone makes it negative
    rank = int((theirs > theirs[token]).sum()) + 1
    return Position(token, tokenizer.decode([token]), kl, rank, float(ours[token]), float(theirs[token]))


def _difference(both: Both, dense: Sequence[int], dsa: Sequence[int]) -> Difference | None:
    same = next((n for n, (a, b) in enumerate(zip(dense, dsa, strict=False)) if a != b), min(len(dense), len(dsa)))
    if same == len(dense) == len(dsa):
        return None
    said = [both.dense.tokenizer.decode([it[same]]) if same < len(it) else None for it in (dense, dsa)]
    return Difference(same, *said)
