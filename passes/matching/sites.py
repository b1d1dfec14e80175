"""The words of the graph passes: an MLA attention that was found, and one that was not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True)
class MlaDims:
    """Sizes of one MLA attention, as proved on the graph. `q_lora_rank` is None without a query latent."""

    hidden_size: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def q_width(self) -> int:
        """Width of what the indexer's wq_b reads: the query latent, or the hidden state without one."""
        return self.q_lora_rank if self.q_lora_rank is not None else self.hidden_size


@dataclass(frozen=True)
class Core:
    """An attention core: softmax(scale * q k^T, masked) v.

    kind: "sdpa", "eager" or "anchor". q: [B, H, T, d]; k: [B, Hk, S, d]; v: [B, Hk, S, dv]; out: [B, H, T, dv].
    mask: None, or a node broadcast over [B, 1, T, S]; `mask_hides` is True where a true entry hides the key.
    """

    kind: str
    q: Node
    k: Node
    v: Node
    out: Node
    scale: float
    mask: Node | None
    mask_hides: bool = False
    is_causal: bool = False


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of k_pe, read off by rotating tags.

    cos, sin: nodes whose last axis is the table; `complex_table` is True when both are one complex node.
    pairs: per frequency, the two k_pe channels that are rotated together, (first, second).
    table: per frequency, the column of cos/sin that is used.
    """

    cos: Node
    sin: Node
    complex_table: bool
    pairs: tuple[tuple[int, int], ...]
    table: tuple[int, ...]


@dataclass(frozen=True)
class MlaSite:
    """One dense causal MLA attention and the nodes a rewrite needs.

    name: module path, from the weight's name (reported, never trusted). index: position among all attention cores.
    hidden: [B, T, hidden_size], what the latent is projected from. q_resid: [B, T, q_lora_rank] or None.
    latent: the normed kv latent, last axis kv_lora_rank. k_pe: the rotated shared key, last axis qk_rope_head_dim.
    kv_a, q_b: the projections (linear nodes); q_b is None when the query is not one linear layer's output.
    uk_rows: [H, qk_nope_head_dim], uv_rows: [H, v_head_dim], row numbers of the kv_b weight.
    k_pe_rows: row numbers of the kv_a weight that become k_pe's channels before rotation.
    rope_first: the rotary channels come first in a query head. padding: the [B, S] key padding input, if any.
    """

    name: str
    index: int
    dims: MlaDims
    core: Core
    hidden: Node
    q_resid: Node | None
    q_b: Node | None
    kv_a: Node
    kv_b_weight: Node
    latent: Node
    k_pe: Node
    rope: Rope | None
    uk_rows: Tensor
    uv_rows: Tensor
    k_pe_rows: tuple[int, ...]
    rope_first: bool
    padding: Node | None

    @property
    def q_input(self) -> Node:
        """What the indexer's query projection reads."""
        return self.q_resid if self.q_resid is not None else self.hidden


@dataclass(frozen=True)
class Miss:
    """An attention core that is not dense causal MLA: where it is, and the first thing that does not hold."""

    name: str
    index: int
    reason: str
    node: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason} (node {self.node})"


class NoMatch(Exception):
    """Raised while a core is examined; becomes a `Miss`. `node` is the one to blame."""

    def __init__(self, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class Found:
    """What `find_mla` returns: every attention core is in exactly one of the two lists."""

    sites: tuple[MlaSite, ...]
    misses: tuple[Miss, ...]
