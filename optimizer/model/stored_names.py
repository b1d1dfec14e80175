"""Which tensors of a checkpoint a tensor of the captured model is, by transformers' own mapping of names.

the name itself                       checkpoints that hold the model's own names, stacked experts too
another name                          what the hub calls it (`attention.dense` is `self_attn.o_proj`)
several, one after the other          experts one by one, convolutions of q, k and v
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...compat.transformers_private import Join, Naming
from ...errors import UserError

# What transformers does with several tensors, where it is the same as laying their rows one after the other: experts in turn, of
# each the tensors in turn.
_ROWS_IN_TURN = {("MergeModulelist",), ("MergeModulelist", "Concatenate"), ("Concatenate",)}

_STACKED = (".experts.gate_up_proj", ".experts.down_proj")  # transformers' own names: Mistral 4 has them in files, too


@dataclass(frozen=True)
class StoredNames:
    """stored: names in the checkpoint by the names that transformers' renamings give them. shapes: of the model's tensors."""

    naming: Naming
    stored: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, naming: Naming, tensors: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> StoredNames:
        names = list(tensors)
        return cls(naming, {naming.renamed(name): name for name in names} | {name: name for name in names}, shapes)

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Stored names and shapes of the tensors that `name` of the model consists of, in order. They need not be there.

        Raises UserError where transformers does more with them than to lay them one after the other.
        """
        if name in self.stored:
            return {self.stored[name]: shape}
        join = self.join_of(name)
        if join is None:
            return {name: shape}
        if join.steps not in _ROWS_IN_TURN:
            raise UserError(
                f"{name}: transformers makes it of {join.sources[0]} by {join.steps}, which is not done here"
            )
        return {self.stored.get(part, part): of for part, of in self._rows(name, join, shape).items()}

    def is_stacked(self, name: str) -> bool:
        """Whether `name` holds all experts of a layer."""
        join = self.join_of(name)
        return name.endswith(_STACKED) or (join is not None and "*" in join.sources[0])

    def surplus(self) -> set[str]:
        """Stored tensors of experts that the graph does not read: LongCat's experts that do nothing have no weights."""
        found: set[str] = set()
        for name, shape in self.shapes.items():
            join = self.join_of(name)
            if join is not None and "*" in join.sources[0]:
                every = _experts(name, join, range(self.experts(name), shape[0]))
                found |= {self.stored[part] for part in every if part in self.stored}
        return found

    def experts(self, name: str) -> int:
        """How many experts of a stacked tensor the graph reads."""
        prefix = name.rpartition(".")[0]
        return self.shapes.get(f"{prefix}.down_proj", self.shapes[name])[0]

    def join_of(self, name: str) -> Join | None:
        return next((join for join in self.naming.joins if _ends(name, join.target)), None)

    def _rows(self, name: str, join: Join, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        count = len(join.sources)
        if "*" in join.sources[0]:
            rows = (shape[1] // count, *shape[2:])
            return dict.fromkeys(_experts(name, join, range(self.experts(name))), rows)
        prefix = name.removesuffix(join.target)
        sizes = [self.shapes.get(f"{prefix}{source}", (shape[0] // count,))[0] for source in join.sources]
        return {f"{prefix}{source}": (size, *shape[1:]) for source, size in zip(join.sources, sizes, strict=True)}


def _experts(name: str, join: Join, numbers: Iterable[int]) -> list[str]:
    prefix = name.removesuffix(join.target)
    return [prefix + source.replace("*", str(number)) for number in numbers for source in join.sources]


def _ends(name: str, target: str) -> bool:
    before = name.removesuffix(target)
    return before != name and (target.startswith(".") or before[-1:] in ("", "."))
