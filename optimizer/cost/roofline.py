"""Seconds of a GPU for one token at a position: the larger of computing and reading, part by part.

    prefill, dense   linear layers + attention of expanded heads over all keys
    prefill, DSA     linear layers + index scores + selection + the cheaper of: expanded heads, masked; absorbed heads over top-k
    decode, dense    linear layers (or reading the weights) + absorbed heads over all keys
    decode, DSA      the same over top-k keys + index scores + selection

A share of the peak stands for what kernels reach. The weights are read once a step for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...kernels.spec import IndexerConfig
from ...passes.matching.sites import MlaDims
from .gpus import Gpu, Reached, reached_on

MILLION = 1e6
_BF16 = 2
_FP8_GROUP = 128  # channels of a latent or an index key with one scale in FP32: FlashMLA's and DeepGEMM's caches
_LONGEST = 2**24  # tokens: a crossover beyond is none


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a model depends on.

    layers: of every MLA attention; active: parameters that a token passes, all: parameters that a large batch reads;
    weight_bytes: as stored; index_parameters: of the indexers.
    """

    layers: tuple[MlaDims, ...]
    indexer: IndexerConfig
    active: float
    weight_bytes: float
    index_parameters: float

    @property
    def indexed(self) -> int:
        """Layers with an indexer of their own."""
        return len(self.layers) - len(self.indexer.shared)


@dataclass(frozen=True)
class Roofline:
    """Costs of one model on one GPU at `price` dollars an hour.

    batch: sequences that are decoded at once, on all GPUs together (None: so many that reading weights is no matter).
    speculative: a step takes and gives what gpus.json says of multi-token prediction.
    """

    shape: ModelShape
    gpu: Gpu
    price: float = 2.0
    batch: int | None = None
    speculative: bool = False
    reached: Reached = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reached", reached_on(self.gpu))

    def dollars(self, seconds: float) -> float:
        """Of a million tokens that take `seconds` each."""
        return seconds * MILLION * self.price / 3600

    def prefill(self, position: int, sparse: bool) -> float:
        """Seconds of the token at `position` of a prompt."""
        expanded = self._flops(self._expanded() * position, "dense_prefill", self.gpu.bf16)
        if not sparse:
            return self._linear(self.shape.active) + expanded
        chosen = min(position, self.shape.indexer.index_topk)
        attended = self._flops(self._absorbed() * chosen, "sparse_prefill", self.gpu.bf16)
        return (
            self._linear(self.shape.active + self.shape.index_parameters)
            + min(expanded, attended)
            + self._select(position)
        )

    def decode(self, position: int, sparse: bool) -> float:
        """Seconds of one written token with `position` tokens before it."""
        queries, tokens = (self.reached.queries, self.reached.tokens) if self.speculative else (1.0, 1.0)
        keys = min(position, self.shape.indexer.index_topk) if sparse else position
        name = "sparse_decode" if sparse and self.gpu.has_fp8 else "dense_decode"
        # of a selection each query reads its own keys
        read = self.cache_bytes(sparse) * keys * (queries if sparse else 1)
        attended = max(self._flops(self._absorbed() * keys * queries, name, self.gpu.bf16), self._bytes(read))
        passed = self.shape.active + (self.shape.index_parameters if sparse else 0)
        weights = self.shape.weight_bytes / self.batch if self.batch else 0.0
        step = max(self._linear(passed * queries), self._bytes(weights)) + attended
        return (step + (self._select(position, queries, decoding=True) if sparse else 0.0)) / tokens

    def cache_bytes(self, sparse: bool) -> float:
        """Latent cache of one token, all layers: bf16 for dense, FP8 with bf16 rotary channels for DSA where there is FP8."""
        total = 0.0
        for dims in self.shape.layers:
            if sparse and self.gpu.has_fp8:
                total += dims.kv_lora_rank + 4 * dims.kv_lora_rank / _FP8_GROUP + _BF16 * dims.qk_rope_head_dim
            else:
                total += _BF16 * (dims.kv_lora_rank + dims.qk_rope_head_dim)
        return total

    def index_bytes(self) -> float:
        """Index keys of one token, all layers that have an indexer."""
        width = self.shape.indexer.index_head_dim
        return self.shape.indexed * (width + 4 * width / _FP8_GROUP if self.gpu.has_fp8 else _BF16 * width)

    def memory(self, batch: int, context: int, sparse: bool) -> float:
        """Bytes of weights and caches."""
        token = self.cache_bytes(sparse) + (self.index_bytes() if sparse else 0)
        return (
            self.shape.weight_bytes + (self.shape.index_parameters * _BF16 if sparse else 0) + token * batch * context
        )

    def crossover(self, cost: Callable[[int, bool], float]) -> int | None:
        """The first position from which on DSA is the cheaper one (None: at no length)."""
        if cost(_LONGEST, True) >= cost(_LONGEST, False):
            return None
        low, high = 0, _LONGEST
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if cost(middle, True) < cost(middle, False) else (middle, high)
        return high

    def _expanded(self) -> float:
        """FLOPs of a query and a key, every head with keys and values of its own."""
        return sum(
            2.0 * d.num_heads * (d.qk_nope_head_dim + d.qk_rope_head_dim + d.v_head_dim) for d in self.shape.layers
        )

    def _absorbed(self) -> float:
        """The same in the latent."""
        return sum(2.0 * d.num_heads * (2 * d.kv_lora_rank + d.qk_rope_head_dim) for d in self.shape.layers)

    def _select(self, position: int, queries: float = 1.0, decoding: bool = False) -> float:
        """Index scores of `queries` queries, and the selection. Only decoding reads the keys for so few queries."""
        sizes = self.shape.indexer
        scored = 2.0 * sizes.index_n_heads * sizes.index_head_dim * position * queries * self.shape.indexed
        read = self.index_bytes() * position if decoding else 0.0
        scores = max(self._flops(scored, "index", self.gpu.fp8), self._bytes(read))
        return scores + self.reached.selection * self.shape.indexed * queries

    def _linear(self, parameters: float) -> float:
        return self._flops(2 * parameters, "linear", self.gpu.fp8)

    def _flops(self, count: float, share: str, peak: float) -> float:
        return count / (peak * self.reached.shares[share])

    def _bytes(self, count: float) -> float:
        return count / (self.gpu.bandwidth * self.reached.shares["bandwidth"])


def lengths_of(context: int) -> Sequence[int]:
    """Powers of two from 2K to the context, the context itself last."""
    powers = [2**power for power in range(11, 25) if 2**power < context]
    return [*powers, context]
