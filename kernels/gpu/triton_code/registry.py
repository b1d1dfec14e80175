"""Where each Triton kernel is defined, by the name that programs use. Importing this does not import triton."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ....errors import UserError

KERNELS = {
    "indexer_prefill": "indexer_kernel",
    "indexer_decode": "indexer_kernel",
    "topk_row": "topk_kernels",
    "topk_histogram": "topk_split_kernels",
    "topk_compact": "topk_split_kernels",
    "topk_finish": "topk_split_kernels",
    "sparse_mla": "sparse_mla_kernel",
    "sparse_mla_split": "sparse_mla_kernel",
    "sparse_mla_fp8": "sparse_mla_fp8_kernel",
    "sparse_mla_fp8_split": "sparse_mla_fp8_kernel",
    "combine": "combine_kernel",
    "cache_write": "cache_write_kernel",
    "quantise_rows": "quantise_kernel",
    "pack_latent": "quantise_kernel",
}


def jit_function(kernel: str) -> Any:
    """The `triton.JITFunction` of a kernel. Raises UserError if triton is not installed."""
    try:
        module = import_module(f".{KERNELS[kernel]}", __package__)
    except ImportError as error:
        raise UserError(
            f"the GPU kernels need triton, which does not load here ({error}): install triton, or set MLA2DSA_KERNELS=reference"
        ) from error
    return getattr(module, kernel)
