"""Questions whose answer stands somewhere far back in a long text, in the manner of RULER (arXiv:2404.06654): seeded, for any tokenizer.

They are lines to be completed, so that a model that was not taught to follow instructions can answer, too. What is asked
stands word for word as it was told, up to the answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError, UserError

# Fixed by chance: of so few words a name of two would come twice among some hundred questions.
FEW_WORDS = 200  # different words that a text needs to name keys after it
# Fixed by the tasks: RULER's multi-key needles have 4, its chains of variables 4 hops; common words come 30 times, others 3.
KEYS, HOPS, OFTEN, RARELY, RARE_WORDS = 4, 4, 30, 3, 20
_NAMES = (
    "amber",
    "basin",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "haven",
    "inlet",
    "jetty",
    "knoll",
    "ledge",
    "mesa",
    "oasis",
)
_PLAIN = (
    "The road goes on along the river and nobody asks where it ends. In the morning the market opens and people come with what "
    "they have. Some of them stay until the evening, others leave early. It has always been like that. "
)


@dataclass(frozen=True)
class Question:
    """ids: [L] int64, the text with the question and at its end the answer; answer: how many tokens that has. depth: where in the
    text it stands, 0 the beginning, 1 the end."""

    kind: str
    depth: float
    ids: Tensor
    answer: int


class Asker:
    """Makes questions of `length` tokens. tokenizer: transformers' own; text: [N] ids of a text to hide things in (None: plain
    sentences); words: what keys are named after (of the text, as it is read)."""

    def __init__(self, tokenizer: Any, length: int, seed: int, text: Tensor | None = None) -> None:
        self._tokenizer, self._length, self._random = tokenizer, length, random.Random(seed)
        self._text = self._encode(_PLAIN) * (length // 16) if text is None else text.tolist()
        if len(self._text) < length:
            raise UserError(
                f"{len(self._text)} tokens of text, expected at least {length} to hide things in; give more text"
            )
        sample = tokenizer.decode(self._text[: 8 * length])
        found = dict.fromkeys(re.findall(r"\b[a-z]{4,9}\b", sample))
        self._words = list(found) if len(found) >= FEW_WORDS else [f"{a}{b}" for a in _NAMES for b in _NAMES if a != b]
        self._start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def ask(self, kind: str, depth: float) -> Question:
        """Raises UsageError when the question does not fit into the length."""
        told, asked, answer = KINDS[kind](self)
        room = self._length - len(asked) - len(answer) - sum(map(len, told)) - (self._start is not None)
        if room < self._length // 2:
            raise UsageError(f"{kind} needs more than {self._length} tokens; give a larger length")
        begin = self._random.randrange(len(self._text) - room + 1)
        hay = self._text[begin : begin + room]
        places = self._places(len(told), depth, room, kind in _IN_ORDER)
        ids, before = [] if self._start is None else [self._start], 0
        for here, line in sorted(zip(places, told, strict=True), key=lambda placed: placed[0]):
            ids += [*hay[before:here], *line]
            before = here
        ids += [*hay[before:], *asked, *answer]
        return Question(kind, depth, torch.tensor(ids), len(answer))

    def _places(self, count: int, depth: float, room: int, in_order: bool) -> list[int]:
        """Where lines go: the first, which is asked for, at `depth`, the others anywhere, or anywhere after it in their order."""
        first = int(depth * room)
        others = [self._random.randrange(first if in_order else 0, room + 1) for _ in range(count - 1)]
        return [first, *(sorted(others) if in_order else others)]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _name(self) -> str:
        return "_".join(self._random.sample(self._words, 2))

    def _number(self) -> str:
        return str(self._random.randrange(10**4, 10**5))

    def _said(self, before: str, value: str) -> tuple[list[int], list[int]]:
        """(up to the value, the value), cut where the tokenizer cuts the whole."""
        ids, head = self._encode(f"{before} {value}"), self._encode(before)
        return head, ids[len(head) :] if ids[: len(head)] == head else self._encode(f" {value}")

    def _line(self, before: str, value: str, after: str) -> list[int]:
        head, body = self._said(before, value)
        return [*head, *body, *self._encode(after)]


_Parts = tuple[list[list[int]], list[int], list[int]]  # lines that are told, what is asked, the answer


def _needle(asker: Asker) -> _Parts:
    """One key, one value."""
    before, value = f"\n# The pass key of {asker._name()} is", asker._number()
    return [asker._line(before, value, ".\n")], *asker._said(before, value)


def _multi_key(asker: Asker) -> _Parts:
    """Several keys, one of which is asked for."""
    keys = [(f"\n# The pass key of {asker._name()} is", asker._number()) for _ in range(KEYS)]
    return [asker._line(*key, ".\n") for key in keys], *asker._said(*keys[0])


def _multi_value(asker: Asker) -> _Parts:
    """One key that is told several values; all of them are asked for, in their order."""
    key, values = asker._name(), [asker._number() for _ in range(KEYS)]
    told = [asker._line(f"\n# A pass key of {key} is", value, ".\n") for value in values]
    return told, *asker._said(f"\n# All pass keys of {key} are", ", ".join(values))


def _variables(asker: Asker) -> _Parts:
    """A chain of variables that all have the first one's value."""
    names, value = [asker._name() for _ in range(HOPS + 1)], asker._number()
    told = [asker._line(f"\n{names[0]} =", value, "\n")]
    told += [asker._line(f"\n{name} =", other, "\n") for other, name in pairwise(names)]
    return told, *asker._said(f"\nassert {names[-1]} ==", value)


def _common_words(asker: Asker) -> _Parts:
    """The word that comes most often in a list."""
    common, *others = asker._random.sample(asker._words, RARE_WORDS + 1)
    listed = [common] * OFTEN + others * RARELY
    asker._random.shuffle(listed)
    return [asker._encode("\n# words: " + " ".join(listed) + "\n")], *asker._said(
        "\n# The most common of the words is", common
    )


KINDS: dict[str, Callable[[Asker], _Parts]] = {
    "needle": _needle,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "variables": _variables,
    "common-words": _common_words,
}


_IN_ORDER = {"multi-value", "variables"}


def questions(asker: Asker, kind: str, depths: Sequence[float], count: int) -> list[Question]:
    """`count` of a kind, going through the depths."""
    return [asker.ask(kind, depths[number % len(depths)]) for number in range(count)]
