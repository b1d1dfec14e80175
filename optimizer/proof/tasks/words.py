"""Seeded words, names and numbers, and the text that things are hidden in."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ....errors import UserError
from ...model.text import documents

BUILT_IN = "built-in sentences"
LINE = 400  # characters: a longer line is cut between its sentences, so that a place for a needle is never far
_SENTENCES = 4000  # about 40K tokens; a longer haystack comes round again
ADJECTIVES = (
    "amber", "ancient", "bitter", "brave", "bright", "calm", "clever", "cold", "crimson", "curious", "distant", "eager",
    "early", "faint", "fierce", "gentle", "golden", "hollow", "humble", "idle", "jolly", "keen", "late", "little",
    "lonely", "lucky", "mild", "narrow", "noble", "odd", "pale", "patient", "plain", "proud", "quiet", "rapid", "rough",
    "silent", "sober", "steady", "stern", "sudden", "tidy", "vivid", "warm", "wide", "wild", "young",
)  # fmt: skip
NOUNS = (
    "anchor", "apple", "badge", "basket", "beacon", "bridge", "candle", "canyon", "carpet", "castle", "cedar", "circle",
    "clock", "cloud", "comet", "cottage", "dragon", "engine", "falcon", "feather", "forest", "garden", "hammer", "harbor",
    "island", "jacket", "kettle", "ladder", "lantern", "meadow", "mirror", "mountain", "needle", "orchard", "paper",
    "pencil", "pepper", "pillow", "planet", "pocket", "river", "saddle", "shadow", "silver", "spider", "stone", "summer",
    "table", "temple", "thunder", "ticket", "timber", "tower", "valley", "violin", "wagon", "window", "winter",
)  # fmt: skip
VERBS = (
    "follows",
    "finds",
    "keeps",
    "leaves",
    "meets",
    "moves",
    "paints",
    "passes",
    "reaches",
    "sees",
    "turns",
    "warms",
)
_ONSETS, _VOWELS, _CODAS = "bdfgklmnprstvz", "aeiou", ("", "n", "r", "s", "l", "m")


def key_names(generator: random.Random, count: int, joint: str = "-") -> list[str]:
    """Different pairs of words."""
    pairs = [(a, n) for a in ADJECTIVES for n in NOUNS]
    return [f"{a}{joint}{n}" for a, n in generator.sample(pairs, count)]


def numbers(generator: random.Random, count: int) -> list[str]:
    """Different numbers of seven digits, none inside another."""
    return [str(number) for number in generator.sample(range(10**6, 10**7), count)]


def variables(generator: random.Random, count: int) -> list[str]:
    """Different names of five capitals."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(generator.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))] = None
    return list(found)


def made_up_words(generator: random.Random, count: int) -> list[str]:
    """Different words that no text is likely to have."""
    found: dict[str, None] = {}
    while len(found) < count:
        parts = [generator.choice(_ONSETS) + generator.choice(_VOWELS) + generator.choice(_CODAS) for _ in range(3)]
        found["".join(parts)] = None
    return list(found)


@dataclass(frozen=True)
class Haystack:
    """Lines to hide things between. origin: the path of the text, or BUILT_IN."""

    lines: tuple[str, ...]
    origin: str

    def take(self, start: int, count: int) -> list[str]:
        """`count` lines from number `start` on; after the last comes the first."""
        return [self.lines[(start + number) % len(self.lines)] for number in range(count)]


def built_in(seed: int = 0) -> Haystack:
    """Sentences of seeded words."""
    generator = random.Random(f"haystack {seed}")

    def thing() -> str:
        return f"the {generator.choice(ADJECTIVES)} {generator.choice(NOUNS)}"

    sentences = (f"{thing()} {generator.choice(VERBS)} {thing()}." for _ in range(_SENTENCES))
    return Haystack(tuple(f"{sentence[0].upper()}{sentence[1:]}\n" for sentence in sentences), BUILT_IN)


def from_text(path: str | Path) -> Haystack:
    """The lines of a file, a folder or .jsonl. Raises UserError when there are none."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or folder of text")
    lines = tuple(line for text in documents(Path(path)) for line in _lines(text))
    if not lines:
        raise UserError(f'{path}: no text in it; give a text file, a folder of them, or .jsonl with a "text" field')
    return Haystack(lines, str(path))


def _lines(text: str) -> Iterable[str]:
    for line in text.splitlines():
        if not line.strip():
            continue
        parts = line.split(". ") if len(line) > LINE else [line]
        yield from (f"{part}{'.' if number < len(parts) - 1 else ''}\n" for number, part in enumerate(parts))


def placed(lines: Sequence[str], hidden: Sequence[tuple[float, str]]) -> list[str]:
    """`lines` with each of `hidden` (share of the lines before it, line) among them."""
    found = list(lines)
    for share, line in sorted(hidden, key=lambda entry: -entry[0]):
        found.insert(round(share * len(lines)), line)
    return found
