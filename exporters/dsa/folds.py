"""Folds: how a family's tensors become those of a DSA class, as records. Reads headers only, needs no torch.

A fold is told the config and looks at the checkpoint as the folds before it left it (`Folding`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...files.safetensors_index import TensorLocation
from .steps import Derived, Fill, Interleave, InverseDiagonal, Pad, Step, Times

Config = Mapping[str, Any]
_EXACT, _SCALES = "F32", "_scale_inv"  # the dtype that factors are stored in; scales of FP8 blocks, beside the weight
_FLOATS = ("F64", "F32", "F16", "BF16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BIG = 2.0**20  # of `BiasQuery`


class CannotFold(Exception):
    """Why a fold does not fit the stored tensors, in one line."""


@dataclass
class Folding:
    """The checkpoint while it is folded. tensors: the source's; derived: what becomes of them; dropped: what goes."""

    tensors: Mapping[str, TensorLocation]
    block: tuple[int, int] = (128, 128)
    derived: dict[str, Derived] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    @property
    def replaced(self) -> set[str]:
        """Tensors of the source that are not in the DSA checkpoint as they are."""
        return {made.source for made in self.derived.values() if made.replaces} | self.dropped

    @property
    def lost(self) -> set[str]:
        """Tensors of the source whose values do not follow from the DSA checkpoint's."""
        return self.replaced - {made.source for made in self.derived.values() if made.replaces and made.is_exact}

    def matching(self, pattern: str) -> list[str]:
        """Names that are in the checkpoint now."""
        names = {*self.derived, *(self.tensors.keys() - self.replaced)}
        return sorted(name for name in names if re.search(pattern, name))

    def now(self, name: str) -> Derived:
        """Raises CannotFold when there is no such tensor."""
        if name in self.derived:
            return self.derived[name]
        if name not in self.tensors:
            raise CannotFold(f"{name} is not stored as a plain tensor")
        place = self.tensors[name]
        return Derived(name, name, place.dtype, place.shape)

    def relabel(self, old: str, new: str) -> None:
        """With its FP8 scales."""
        for end in ("", _SCALES) if old + _SCALES in self.tensors else ("",):
            self.derived[new + end] = self._taken(old + end, new + end)

    def move(self, name: str, step: Interleave | Pad, shape: tuple[int, ...] | None = None) -> None:
        """A step that changes no value."""
        now = self.now(name)
        if now.dtype not in _FLOATS and not (isinstance(step, Interleave) and self._inside_blocks(step, now)):
            raise CannotFold(f"{name} is {now.dtype}, whose blocks this would tear apart")
        self.derived[name] = now.then(step, shape=shape or now.shape)

    def scale(self, name: str, factor: float) -> None:
        now = self.now(name)
        if now.dtype not in _FLOATS:
            raise CannotFold(f"{name} is {now.dtype}, which a factor cannot be folded into")
        if factor != 1.0:
            self.derived[name] = now.then(Times(factor), dtype=_wide(now.dtype))

    def add(self, name: str, source: str, dtype: str, shape: tuple[int, ...], *steps: Step) -> None:
        """A tensor that the source has none of, beside its `source`."""
        self.derived[name] = Derived(name, source, dtype, shape, steps, replaces=False)

    def _taken(self, old: str, new: str) -> Derived:
        now = self.now(old)
        self.derived.pop(old, None)
        return Derived(new, now.source, now.dtype, now.shape, now.steps, now.replaces)

    def _inside_blocks(self, step: Interleave, now: Derived) -> bool:
        """Whether every row stays in its block of FP8 scales."""
        width = now.shape[0] // step.blocks
        starts = (block * width + step.offset for block in range(step.blocks))
        return now.name + _SCALES in {*self.tensors, *self.derived} and all(
            start // self.block[0] == (start + step.rope - 1) // self.block[0] for start in starts
        )


def _wide(dtype: str) -> str:
    return dtype if dtype == "F64" else _EXACT


class Fold(Protocol):
    """One rule of a family."""

    def apply(self, config: Config, folding: Folding) -> None:
        """Raises CannotFold."""


@dataclass(frozen=True)
class PermuteRope:
    """The DSA classes rotate MLA's channels in interleaved pairs; a model that rotates halves is the same model with the rotary
    rows of q_b_proj (each head) and kv_a reordered: q and k alike, so that no score changes (proved bit for bit)."""

    unless: str | None = None  # a field that says, where true or absent, that they are interleaved already

    def apply(self, config: Config, folding: Folding) -> None:
        if self.unless is not None and config.get(self.unless, True):
            return
        heads, nope, rope = (
            int(config[name]) for name in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
        )
        for name in folding.matching(r"\.self_attn\.q_b_proj\.(weight|bias)$"):
            folding.move(name, Interleave(heads, nope, rope))
        for name in folding.matching(r"\.self_attn\.kv_a_proj_with_mqa\.(weight|bias)$"):
            folding.move(name, Interleave(1, int(config["kv_lora_rank"]), rope))


@dataclass(frozen=True)
class Scale:
    """A constant factor of the model's own code, folded into the tensors before it."""

    pattern: str
    factor: Callable[[Config], float]

    def apply(self, config: Config, folding: Folding) -> None:
        names = folding.matching(self.pattern)
        if not names:
            raise CannotFold(f"no tensor {self.pattern} is stored")
        for name in names:
            folding.scale(name, self.factor(config))


@dataclass(frozen=True)
class Untie:
    """lm_head written out: the embedding's values, times what the model's code multiplies its logits with. Before any fold of
    the embedding."""

    factor: Callable[[Config], float] = lambda config: 1.0

    def apply(self, config: Config, folding: Folding) -> None:
        factor = self.factor(config)
        if folding.matching(rf"^{re.escape(_HEAD)}$"):
            folding.scale(_HEAD, factor)  # stored though tied: `every_tensor` has seen that the two are equal
            return
        embedding = folding.now(_EMBEDDING)
        steps = (Times(factor),) if factor != 1.0 else ()
        dtype = _wide(embedding.dtype) if steps else embedding.dtype
        folding.add(_HEAD, embedding.source, dtype, embedding.shape, *steps)


@dataclass(frozen=True)
class IdentityQuery:
    """A query latent for a model that has none, exact but for the epsilon of a norm: q_a_proj = diag(1 / g), q_a_layernorm = g,
    q_b_proj = q_proj, where g is the gain of input_layernorm. Loads in every runtime; how far it is off (eps / 2v on a query, v
    the mean square of the residual stream) is measured on the real weights."""

    def apply(self, config: Config, folding: Folding) -> None:
        width = int(config["hidden_size"])
        for layer in _without_latent(folding):
            folding.relabel(f"{layer}.self_attn.q_proj.weight", f"{layer}.self_attn.q_b_proj.weight")
            gain = folding.now(f"{layer}.input_layernorm.weight")
            folding.add(f"{layer}.self_attn.q_a_proj.weight", gain.source, _EXACT, (width, width), InverseDiagonal())
            folding.add(f"{layer}.self_attn.q_a_layernorm.weight", gain.source, gain.dtype, (width,))


@dataclass(frozen=True)
class BiasQuery:
    """A query latent for a model that has none, exact in every precision, in classes with attention_bias (transformers'):
    q_a_proj = [I; 0] with bias [0 .. 0, B], n = power of 4 > D rows, q_a_layernorm = B / sqrt(n): the norm divides by B / sqrt(n),
    a power of two, whatever the hidden state is. q_b_proj = [q_proj, 0]; all other biases are 0."""

    def apply(self, config: Config, folding: Folding) -> None:
        width = int(config["hidden_size"])
        rank = bias_rank(width)
        for layer in _without_latent(folding):
            attention = f"{layer}.self_attn"
            folding.relabel(f"{attention}.q_proj.weight", f"{attention}.q_b_proj.weight")
            query = folding.now(f"{attention}.q_b_proj.weight")
            folding.move(query.name, Pad(width, rank), (query.shape[0], rank))
            like, source = query.dtype, f"{layer}.input_layernorm.weight"
            folding.add(f"{attention}.q_a_proj.weight", source, like, (rank, width), Fill(1.0, diagonal=True))
            folding.add(f"{attention}.q_a_proj.bias", source, like, (rank,), Fill(_BIG, only=rank - 1))
            folding.add(f"{attention}.q_a_layernorm.weight", source, like, (rank,), Fill(_BIG / math.sqrt(rank)))
            for name in ("kv_a_proj_with_mqa", "o_proj"):
                if f"{attention}.{name}.bias" not in folding.tensors:
                    rows = folding.now(f"{attention}.{name}.weight").shape[0]
                    folding.add(f"{attention}.{name}.bias", source, like, (rows,), Fill(0.0))


def bias_rank(width: int) -> int:
    """The smallest power of 4 above `width`: its root is a power of two, and one row is left for the bias."""
    rank = 4
    while rank <= width:
        rank *= 4
    return rank


def _without_latent(folding: Folding) -> Iterator[str]:
    """Layers with a q_proj (model.layers.0 ...)."""
    names = folding.matching(r"\.self_attn\.q_proj\.weight$")
    if not names:
        raise CannotFold("q_lora_rank is null, but no self_attn.q_proj.weight is stored as a plain tensor")
    for name in names:
        yield name.removesuffix(".self_attn.q_proj.weight")
