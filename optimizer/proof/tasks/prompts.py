"""The tasks: a prompt of as many lines or words as asked for, its answer, and what an answer has to name."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from .words import Haystack, key_names, made_up_words, numbers, placed, variables

MANY_KEYS, MANY_VALUES = 4, 4  # as in RULER's niah_multikey_1 and niah_multivalue
HOPS = 4  # as in RULER's variable tracking
COMMON, OFTEN, SELDOM = 10, 30, 3  # as in RULER's common words: how many, how often they come, how often the others


@dataclass(frozen=True)
class Style:
    """How things are said. prose: RULER's wording, for models that follow or continue English; code: comments and assignments, for
    models of code. intro may be empty; ask_one ends where the value begins."""

    intro: str
    needle: str
    ask_one: str
    ask_many: str
    joint: str
    assign: str
    copy: str
    ask_variables: str


_MAGIC = "special magic number"
STYLES: Mapping[str, Style] = {
    "prose": Style(
        f"Some {_MAGIC}s are hidden within the following text. Make sure to memorize them. I will quiz you about them afterwards.\n",
        f"One of the {_MAGIC}s for {{key}} is: {{value}}.\n",
        f"What is the {_MAGIC} for {{key}} mentioned in the provided text? The {_MAGIC} for {{key}} mentioned in the provided text is",
        f"What are all the {_MAGIC}s for {{key}} mentioned in the provided text? The {_MAGIC}s for {{key}} mentioned in the "
        "provided text are",
        "-", "VAR {name} = {value}\n", "VAR {name} = VAR {value}\n",
        "Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain of "
        "variable assignment in the text above, {count} variables are assigned the value {value}, they are:",
    ),
    "code": Style(
        "", f"# The {_MAGIC} for {{key}} is: {{value}}.\n", f"# The {_MAGIC} for {{key}} is:", f"# All {_MAGIC}s for {{key}} are:",
        "_", "{name} = {value}\n", "{name} = {value}\n", "# All variables that are {value}:",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """text ends where the answer begins; wanted: what an answer names, all of it if it is right."""

    text: str
    answer: str
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class Ground:
    """What a prompt is made of. depth: share of the text before the needle."""

    style: Style
    haystack: Haystack
    depth: float = 0.0


Make = Callable[[random.Random, Ground, int], Prompt]  # the last: lines or words of the text


def single(generator: random.Random, ground: Ground, size: int) -> Prompt:
    """One needle at the depth."""
    return _needles(generator, ground, size, keys=1, values=1)


def multi_key(generator: random.Random, ground: Ground, size: int) -> Prompt:
    """One needle at the depth is asked for; others with other keys lie anywhere."""
    return _needles(generator, ground, size, keys=MANY_KEYS, values=1)


def multi_value(generator: random.Random, ground: Ground, size: int) -> Prompt:
    """Needles with one key, the first at the depth, the others anywhere: all are asked for."""
    return _needles(generator, ground, size, keys=1, values=MANY_VALUES)


def _needles(generator: random.Random, ground: Ground, size: int, keys: int, values: int) -> Prompt:
    style, names = ground.style, key_names(generator, keys, ground.style.joint)
    found = numbers(generator, keys + values - 1)
    start = generator.randrange(len(ground.haystack.lines))
    places = [ground.depth, *(generator.random() for _ in found[1:])]
    owners = names if values == 1 else names * values
    hidden = [
        (place, style.needle.format(key=key, value=value))
        for place, key, value in zip(places, owners, found, strict=True)
    ]
    text = "".join(placed(ground.haystack.take(start, size), hidden))
    wanted = found[:1] if values == 1 else [value for _, value in sorted(zip(places, found, strict=True))]
    question = (style.ask_one if values == 1 else style.ask_many).format(key=names[0])
    return Prompt(f"{style.intro}{text}{question}", f" {', '.join(wanted)}", tuple(wanted))


def chain(generator: random.Random, ground: Ground, size: int) -> Prompt:
    """A value is given to a variable, that to the next, and so on, in order, anywhere: all of their names are asked for."""
    style, names = ground.style, variables(generator, HOPS + 1)
    (number,) = numbers(generator, 1)
    start = generator.randrange(len(ground.haystack.lines))
    first = style.assign.format(name=names[0], value=number)
    others = [style.copy.format(name=name, value=of) for of, name in pairwise(names)]
    places = sorted(generator.random() for _ in names)
    text = "".join(placed(ground.haystack.take(start, size), _in_order(places, [first, *others])))
    question = style.ask_variables.format(value=number, count=len(names))
    return Prompt(f"{text}{question}", f" {' '.join(names)}", tuple(names))


def _in_order(places: list[float], lines: list[str]) -> list[tuple[float, str]]:
    """Lines that fall on the same place keep their order."""
    together: dict[float, str] = {}
    for place, line in zip(places, lines, strict=True):
        together[place] = together.get(place, "") + line
    return list(together.items())


def common_words(generator: random.Random, ground: Ground, size: int) -> Prompt:
    """A list of made-up words of which some come often. size: how many come seldom."""
    words = made_up_words(generator, COMMON + size)
    often = min(OFTEN, SELDOM + 2 + size // 4)  # in a short list there is no room for as many
    listed = [word for word in words[:COMMON] for _ in range(often)] + [
        w for w in words[COMMON:] for _ in range(SELDOM)
    ]
    generator.shuffle(listed)
    text = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most "
        "often.\n"
    )
    question = (
        f"\nQuestion: What are the {COMMON} most common words in the above list? Answer: The top {COMMON} words that appear most "
        "often in the list are:"
    )
    first = sorted(words[:COMMON], key=listed.index)
    answer = " ".join(f"{number}. {word}" for number, word in enumerate(first, 1))
    return Prompt(f"{head}{text}{question}", f" {answer}", tuple(first))


@dataclass(frozen=True)
class Task:
    """make: its prompts; deep: whether it is asked at several depths; group: the name that gates have for it and its like."""

    make: Make
    deep: bool
    group: str


TASKS: Mapping[str, Task] = {
    "single": Task(single, True, "needle"),
    "multi-key": Task(multi_key, True, "needle"),
    "multi-value": Task(multi_value, True, "needle"),
    "variables": Task(chain, False, "tracking"),
    "common-words": Task(common_words, False, "words"),
}
