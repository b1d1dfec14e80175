"""What a tensor of a DSA checkpoint is made by, where it is not the source's own. Data: it stands in the manifest, and needs no torch.

A tensor starts as one of the source and goes through steps. Steps that only move values are exact in the stored dtype and
can be taken back; a factor is applied in float32 and stored so, and the original is kept beside the checkpoint for `strip`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Interleave:
    """Rotary rows [offset, offset + rope) of each of `blocks` equal blocks: half-split becomes pairs, new[2i] = old[i],
    new[2i + 1] = old[i + rope / 2]."""

    blocks: int
    offset: int
    rope: int


@dataclass(frozen=True)
class Pad:
    """Columns `before` to `after` are zeros."""

    before: int
    after: int


@dataclass(frozen=True)
class Times:
    """Times a factor, in float32."""

    factor: float


@dataclass(frozen=True)
class InverseDiagonal:
    """diag(1 / x) of a vector, in float32."""


@dataclass(frozen=True)
class Fill:
    """A constant, whatever the source holds: `value` everywhere, or with `only` at one place of a vector (0 elsewhere), or with
    `diagonal` along it."""

    value: float
    only: int | None = None
    diagonal: bool = False


Step = Interleave | Pad | Times | InverseDiagonal | Fill
_KINDS: dict[str, type[Step]] = {
    "interleave": Interleave, "pad": Pad, "times": Times, "inverse-diagonal": InverseDiagonal, "fill": Fill,
}  # fmt: skip
_NAMES = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True)
class Derived:
    """A tensor `name` of the DSA checkpoint, made of the source's tensor `source`.

    dtype: as safetensors spells it; shape: as it is stored. replaces: the source's tensor is not in the DSA checkpoint.
    """

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()
    replaces: bool = True

    @property
    def is_exact(self) -> bool:
        """Values were moved, not changed: the source's tensor follows from this one."""
        return all(isinstance(step, Interleave | Pad) for step in self.steps)

    def then(self, step: Step, **changes: Any) -> Derived:
        """With one more step. changes: of the other fields."""
        return replace(self, steps=(*self.steps, step), **changes)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        steps = [{"kind": _NAMES[type(step)], **asdict(step)} for step in self.steps]
        return {**asdict(self), "shape": list(self.shape), "steps": steps}


def derived_of(entry: dict[str, Any]) -> Derived:
    """Inverse of `to_json`. Raises KeyError, TypeError or ValueError for what is none."""
    steps = []
    for step in entry["steps"]:
        fields = dict(step)
        steps.append(_KINDS[fields.pop("kind")](**fields))
    names = ("name", "source", "dtype", "replaces")
    return Derived(**{name: entry[name] for name in names}, shape=tuple(entry["shape"]), steps=tuple(steps))
