"""Training rows that can only be predicted by looking far back: lookups, pass keys, chains of variables, copies.

Every row is a list of tokens and how much each counts as a target: 0 where nothing could know it, 1 for text, more for answers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tokenizers import Tokenizer

ANSWER = 4.0  # weight of a token that is an answer: there are few of them in a row
TEMPLATES = (
    "# The pass key of {} is {}.\n",
    "# The special magic number for {} is: {}.\n",
    "{} = {}\n",
    "{}: {}\n",
    "    {} = {!r}\n",
    "assert {} == {}\n",
    "# {} -> {}\n",
    "The {} number is {}. ",
)


@dataclass
class Row:
    """Tokens of a row and their weights as targets."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, tokens: Iterable[int], weight: float) -> None:
        found = list(tokens)
        self.tokens += found
        self.weights += [weight] * len(found)


def words_of(documents: list[str]) -> list[str]:
    """Identifiers of the corpus, in the order in which they first come."""
    found = dict.fromkeys(word for text in documents for word in re.findall(r"[a-z][a-z_]{3,11}", text))
    return list(found)


class Recall:
    """Makes rows. stream: the tokens of the corpus; words: names for keys."""

    def __init__(self, tokenizer: Tokenizer, stream: list[int], words: list[str], seed: int) -> None:
        self.tokenizer, self.stream, self.words = tokenizer, stream, words
        self.random = random.Random(seed)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    def text(self, length: int) -> list[int]:
        start = self.random.randrange(len(self.stream) - length)
        return self.stream[start : start + length]

    def noise(self, length: int) -> list[int]:
        return [self.random.randrange(1, self.tokenizer.get_vocab_size()) for _ in range(length)]

    def name(self) -> str:
        word = self.random.choice(self.words)
        kind = self.random.random()
        if kind < 0.3:
            return f"{word}_{self.random.choice(self.words)}"
        return f"{word}{self.random.randrange(1000)}" if kind < 0.5 else word

    def value(self) -> str:
        kind = self.random.random()
        if kind < 0.75:
            return str(self.random.randrange(10 ** self.random.randint(2, 7)))
        return self.random.choice(self.words) if kind < 0.9 else f"{self.random.getrandbits(32):08x}"

    def rows(self, length: int, count: int, share: float) -> list[Row]:
        """`count` rows of `length` tokens; a share of them is recall, the others are plain text."""
        kinds: list[Callable[[int], Row]] = [self.copies, self.noise_copies, self.lookups, self.lookups, self.chains]
        made = []
        for _ in range(count):
            if self.random.random() < share:
                row = self.random.choice(kinds)(length)
            else:
                row = Row()
                row.add(self.text(length), 1.0)
            made.append(Row(row.tokens[:length], row.weights[:length]))
        return made

    def noise_copies(self, length: int) -> Row:
        """Random tokens that come again, once or more often, wherever."""
        row = Row()
        while len(row.tokens) < length:
            if len(row.tokens) > 32 and self.random.random() < 0.6:
                span = self.random.randint(8, max(9, min(256, len(row.tokens) // 2)))
                start = self.random.randrange(len(row.tokens) - span + 1)
                again = row.tokens[start : start + span]
                row.add(again[:1], 0.0)
                row.add(again[1:2], 0.5)
                row.add(again[2:], 2.0)
            else:
                row.add(self.noise(self.random.randint(8, max(9, length // 8))), 0.0)
        return row

    def copies(self, length: int) -> Row:
        """Text whose spans come again."""
        row = Row()
        row.add(self.text(max(64, int(length * self.random.uniform(0.3, 0.7)))), 1.0)
        while len(row.tokens) < length:
            span = self.random.randint(16, max(17, min(256, len(row.tokens) // 3)))
            start = self.random.randrange(len(row.tokens) - span + 1)
            again = row.tokens[start : start + span]
            row.add(again[:2], 0.5)
            row.add(again[2:], 1.0)
        return row

    def lookups(self, length: int) -> Row:
        """Keys with values, strewn over text or noise or one another, and asked for from the middle on."""
        row, known = Row(), []
        template = self.random.choice(TEMPLATES)
        gap = self.random.choice((0, 0, length // 64, length // 16, length // 6))
        noisy = self.random.random() < 0.15
        while len(row.tokens) < length:
            done = len(row.tokens) / length
            if known and self.random.random() < (0.7 if done > 0.5 else 0.25):
                self._ask(row, template, *self.random.choice(known))
            elif done < 0.9 or not known:
                key, value = self.name(), self.value()
                if all(key != other for other, _ in known):
                    known.append((key, value))
                    self._tell(row, template, key, value)
            if gap:
                filler = self.random.randint(1, 2 * gap)
                row.add(self.noise(filler) if noisy else self.text(filler), 0.0 if noisy else 1.0)
        return row

    def _parts(self, template: str, key: str, value: str) -> tuple[list[int], list[int], list[int]]:
        """Tokens before the value, of the value, after it; as the whole line is tokenised."""
        line = template.format(key, value)
        cut = line.rindex(value)
        encoding = self.tokenizer.encode(line, add_special_tokens=False)
        spans = list(zip(encoding.ids, encoding.offsets, strict=True))
        head = [token for token, (_, end) in spans if end <= cut]
        body = [token for token, (start, end) in spans if end > cut and start < cut + len(value)]
        tail = [token for token, (start, _) in spans if start >= cut + len(value)]
        return head, body, tail

    def _tell(self, row: Row, template: str, key: str, value: str) -> None:
        head, body, tail = self._parts(template, key, value)
        row.add(head, 0.2)
        row.add(body, 0.0)
        row.add(tail, 0.5)

    def _ask(self, row: Row, template: str, key: str, value: str) -> None:
        head, body, tail = self._parts(template, key, value)
        row.add(head, 0.2)
        row.add(body, ANSWER)
        row.add(tail, 0.5)

    def chains(self, length: int) -> Row:
        """`a = 17`, `b = a`, ..., `assert b == 17`, in text."""
        row = Row()
        gap = self.random.choice((0, length // 32, length // 8))
        chains: list[tuple[str, str]] = []
        while len(row.tokens) < length:
            done = len(row.tokens) / length
            kind = self.random.random()
            if not chains or (kind < 0.3 and done < 0.8):
                key, value = self.name(), self.value()
                chains.append((key, value))
                self._tell(row, "{} = {}\n", key, value)
            elif kind < 0.6:
                at = self.random.randrange(len(chains))
                other, key = self.name(), chains[at][0]
                row.add(self.encode(f"{other} = {key}\n"), 0.1)
                chains[at] = (other, chains[at][1])
            else:
                self._ask(row, "assert {} == {}\n", *self.random.choice(chains))
            if gap:
                row.add(self.text(self.random.randint(1, 2 * gap)), 1.0)
        return row
