"""Cases that the Triton kernels are tested on: small ones in the interpreter, large ones on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from op_samples import randn
from torch import Tensor

from mla2dsa.kernels.gpu.launch import TRITON_NAMES, Launcher
from mla2dsa.kernels.gpu.programs.indexer_program import IndexerCase, scores_program
from mla2dsa.kernels.gpu.programs.program import LaunchProgram
from mla2dsa.kernels.gpu.programs.sparse_program import FORMS as FORMS
from mla2dsa.kernels.gpu.programs.sparse_program import AttentionCase, PackedAttentionCase
from mla2dsa.kernels.gpu.programs.topk_program import topk_program

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 5e-4}  # relative RMS against float64


@dataclass(frozen=True)
class Target:
    """Where programs run: the interpreter (sm 0), or a CUDA device."""

    device: str
    sm: int

    def run(self, program: LaunchProgram, *inputs: Tensor) -> Tensor:
        """The first output, on the CPU."""
        return Launcher(program, self.sm == 0)(*(tensor.to(self.device).contiguous() for tensor in inputs))[0].cpu()

    def topk(self, scores: Tensor, begin: Tensor, end: Tensor, topk: int, form: str) -> Tensor:
        slots = scores.shape[2]
        if slots % 4:  # rows of whole groups of four, as the program wants them; what is added must not be read
            scores, end = torch.nn.functional.pad(scores, (0, -slots % 4), value=torch.inf), end.clamp(max=slots)
        program = topk_program(topk, self.sm, form, TRITON_NAMES[begin.dtype])
        return self.run(program, scores, begin, end)[..., : min(topk, slots)]

    def indexer(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        begin: Tensor,
        end: Tensor,
        topk: int,
        form: str,
        budget_mb: int = 512,
    ) -> Tensor:
        names = (TRITON_NAMES[weights.dtype], TRITON_NAMES[begin.dtype])
        facts = (TRITON_NAMES[q.dtype], q.shape[2], q.shape[3], topk, self.sm, form, False, *names, budget_mb)
        return self.run(IndexerCase(*facts).program(), q, k, weights, begin, end)

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        begin: Tensor,
        end: Tensor,
        form: str,
        k_scale: Tensor | None = None,
    ) -> Tensor:
        """[B,T,S], rubbish outside of the ranges."""
        names = (TRITON_NAMES[weights.dtype], TRITON_NAMES[begin.dtype])
        facts = (TRITON_NAMES[q.dtype], q.shape[2], q.shape[3], self.sm, form, k_scale is not None, *names)
        scale = () if k_scale is None else (k_scale,)
        return self.run(scores_program(*facts), q, k, *scale, weights, begin, end)[..., : k.shape[1]]

    def sparse(self, q: Tensor, kv: Tensor, indices: Tensor, scale: float, rank: int, form: str) -> Tensor:
        facts = (TRITON_NAMES[q.dtype], q.shape[2], rank, q.shape[3] - rank, scale, self.sm, form)
        return self.run(AttentionCase(*facts).program(), q, kv, indices)

    def sparse_fp8(
        self, q: Tensor, packed: Tensor, indices: Tensor, scale: float, form: str, native: bool = True
    ) -> Tensor:
        return self.run(PackedAttentionCase(q.shape[2], scale, self.sm, form, native).program(), q, packed, indices)


def score_rows(batch: int, queries: int, slots: int) -> dict[str, Tensor]:
    """Scores that have made other selectors wrong, [batch,queries,slots] float32."""
    shape = (batch, queries, slots)
    normal = randn(*shape, dtype=torch.float32)
    g = torch.Generator().manual_seed(7)
    rows = {
        "normal": normal,
        "close together": normal * 1e-6 + 10,
        "all equal": torch.full(shape, 3.25),
        "zeros of both signs": torch.where(normal > 0, 0.0, -0.0),
        "many ties": torch.randint(-3, 4, shape, generator=g).float(),
        "mostly zero": normal.clamp(min=0.5) - 0.5,
        "negative": -normal.abs() - 1,
        "denormals": normal * 1e-40,
        "every exponent": normal.sign() * torch.exp2(torch.randint(-140, 127, shape, generator=g).float()),
        "huge": normal * 1e38,
        "neighbours": (normal > 0.7).float() * 2.0**-23 + 1,
        "one octave": torch.rand(shape, generator=g) + 1,
    }
    special = normal.clone()
    for value, every in ((torch.nan, 3), (-torch.nan, 11), (torch.inf, 13), (-torch.inf, 5)):
        special[torch.randint(0, every, shape, generator=g) == 0] = value
    return rows | {
        "nan and inf": special,
        "only nan": torch.full(shape, torch.nan),
        "only -inf": torch.full(shape, -torch.inf),
    }


def selection(batch: int, queries: int, slots: int, count: int, seed: int = 3) -> Tensor:
    """Slots in any order, repeated and out of range at either end; the first query has none that is valid."""
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(-slots // 4 - 1, slots + slots // 4 + 1, (batch, queries, count), generator=g)
    indices[:, 0] = torch.where(indices[:, 0] < slots, -1, 2**31 - 1)
    if queries > 2:
        indices[:, 2] = indices[:, 2].clamp(0, slots - 1)
    return indices.to(torch.int32)
