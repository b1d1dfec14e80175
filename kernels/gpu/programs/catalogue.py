"""The programs that are compiled ahead of time: which cases, and by what names."""

from __future__ import annotations

from .cache_program import CacheWriteCase
from .indexer_program import FORMS as INDEXER_FORMS
from .indexer_program import IndexerCase
from .program import LaunchProgram
from .quantise_program import PackLatentCase, QuantiseRowsCase
from .sparse_program import FORMS as ATTENTION_FORMS
from .sparse_program import AttentionCase, PackedAttentionCase

FAMILIES = (80, 89, 90, 100, 120)  # architectures that cubins are made for
INDEX_HEADS = (8, 16, 32, 64)
INDEX_WIDTH = 128
TOPK = (512, 1024, 2048, 4096)
ATTENTION = ((8, 512, 64), (16, 512, 64), (20, 512, 64), (32, 512, 64), (64, 512, 64), (128, 512, 64), (32, 256, 64))
FIRST_WITH_FP8 = 89
SCALE = 192**-0.5  # of the catalogue's attention programs; it is an argument of their kernels, no part of them


def catalogue(sm: int) -> dict[str, LaunchProgram]:
    """Name -> program for GPU architecture `sm`: the usual models' sizes, bfloat16 and (from sm_89 on) float8."""
    return {**_indexers(sm), **_attention(sm), **_caches(sm), **_quantisers(sm)}


def _indexers(sm: int) -> dict[str, LaunchProgram]:
    dtypes = ("bf16", "fp8e4nv") if sm >= FIRST_WITH_FP8 else ("bf16",)
    return {
        f"lightning_indexer.{dtype}.h{heads}.d{INDEX_WIDTH}.k{topk}.{form}": IndexerCase(
            dtype, heads, INDEX_WIDTH, topk, sm, form, scaled=dtype == "fp8e4nv"
        ).program()
        for dtype in dtypes
        for heads in INDEX_HEADS
        for topk in TOPK
        for form in INDEXER_FORMS
    }


def _attention(sm: int) -> dict[str, LaunchProgram]:
    whole = {
        f"sparse_mla.bf16.h{heads}.r{rank}.d{rope}.{form}": AttentionCase(
            "bf16", heads, rank, rope, SCALE, sm, form
        ).program()
        for heads, rank, rope in ATTENTION
        for form in ATTENTION_FORMS
    }
    packed = {
        f"sparse_mla_fp8.bf16.h{heads}.{form}": PackedAttentionCase(heads, SCALE, sm, form).program()
        for heads, rank, _ in ATTENTION
        if rank == 512
        for form in ATTENTION_FORMS
    }
    return {**whole, **packed}


def _caches(sm: int) -> dict[str, LaunchProgram]:
    widths = sorted({INDEX_WIDTH, *(rank + rope for _, rank, rope in ATTENTION)})
    return {f"cache_write.bf16.d{width}": CacheWriteCase("bf16", "bf16", width, sm).program() for width in widths}


def _quantisers(sm: int) -> dict[str, LaunchProgram]:
    if sm < FIRST_WITH_FP8:
        return {}
    rows = {
        f"quantise_rows.bf16.d{INDEX_WIDTH}.{'ue8m0' if ue8m0 else 'float32'}": QuantiseRowsCase(
            "bf16", INDEX_WIDTH, ue8m0, sm
        ).program()
        for ue8m0 in (False, True)
    }
    return {**rows, "pack_latent.bf16": PackLatentCase("bf16", sm).program()}
