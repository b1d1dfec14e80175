"""The indexer as vLLM and SGLang score with it: queries and keys in e4m3, a power-of-two scale a row, the rest as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import ops_fp8  # noqa: F401  (registers torch.ops.mla2dsa.lightning_indexer_fp8)
from .baselines import QUERY_ROWS


class Fp8Scores:
    """Stands in for the op `lightning_indexer`. same: the share of keys that the float scores would have chosen, too, over the
    rows with more keys than places; NaN before there was one."""

    def __init__(self) -> None:
        self._same = self._places = 0

    @property
    def same(self) -> float:
        return self._same / self._places if self._places else float("nan")

    def __call__(
        self, q: Tensor, k: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int
    ) -> Tensor:  # arguments of `lightning_indexer`
        codes, scales = torch.ops.mla2dsa.quantize_fp8_rows(k.float(), True)
        chosen = torch.empty(*q.shape[:2], min(topk, k.shape[1]), dtype=torch.int32, device=q.device)
        for start in range(0, q.shape[1], QUERY_ROWS):
            rows = slice(start, start + QUERY_ROWS)
            ranges = (key_begin[:, rows], key_end[:, rows])
            query, query_scales = torch.ops.mla2dsa.quantize_fp8_rows(q[:, rows].float(), True)
            folded = weights[:, rows].float() * query_scales  # ReLU lets a positive factor through
            chosen[:, rows] = torch.ops.mla2dsa.lightning_indexer_fp8(query, codes, scales, folded, *ranges, topk)
            exact = torch.ops.mla2dsa.lightning_indexer(q[:, rows], k, weights[:, rows], *ranges, topk)
            self._count(chosen[:, rows], exact, ranges[1] - ranges[0] > topk)
        return chosen

    def _count(self, found: Tensor, exact: Tensor, rows: Tensor) -> None:
        """found, exact: [B, t, K]; rows: [B, t], which of them have a choice."""
        if not bool(rows.any()):
            return
        one, two = found[rows], exact[rows]  # [R, K], ascending
        at = torch.searchsorted(two.contiguous(), one.contiguous()).clamp(max=two.shape[-1] - 1)
        self._same += int((two.gather(-1, at) == one).sum())
        self._places += one.numel()
