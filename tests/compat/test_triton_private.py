"""Each private name of Triton: it is there, it does what we use it for, and one line says so when it is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forgetting import complaint, forget

pytest.importorskip("triton")
import triton
import triton.language as tl

from mla2dsa.compat import triton_private as private
from mla2dsa.compat.private_names import MovedError
from mla2dsa.compat.triton_private import TRITON
from mla2dsa.kernels.gpu.emulator.interpreter import interpreted

OPTIONS = {"num_warps": 4, "num_stages": 2, "ptx_version": 87, "enable_fp_fusion": True, "debug": False}


@triton.jit
def store_one(out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out + tl.arange(0, BLOCK), 1.0)


def to_ptx() -> None:
    ptx, metadata = private.to_ptx(store_one, 90, OPTIONS, {"out": "*fp32"}, {"BLOCK": 64}, frozenset(["out"]))
    assert ".target sm_90" in ptx
    assert ".loc" not in ptx  # no file of this machine is named
    assert metadata["name"] == "store_one"


def emulated() -> torch.Tensor:
    out = torch.zeros(64)
    interpreted(store_one)[(1,)](out, BLOCK=64)
    assert torch.equal(out, torch.ones(64))
    return out


CALLS: dict[str, Callable[[], Any]] = {
    **{
        name: to_ptx
        for name in TRITON.names
        if name.startswith(("triton._C", "triton.backends", "triton.compiler", "triton.knobs"))
    },
    "triton.language:core.tensor_descriptor_base": emulated,
    "triton.language:standard": emulated,
    "triton.language:str_to_ty": lambda: private.type_named("*bf16").element_ty == tl.bfloat16,
    "triton.runtime.jit:JITFunction": lambda: private.is_jit(store_one) and not private.is_jit(store_one.fn),
    "triton.runtime.jit:type_canonicalisation_dict": lambda: private.name_of_dtype(torch.bfloat16) == "bf16",
    **{name: private.interpreter for name in TRITON.names if name.startswith("triton.runtime.interpreter")},
    "triton.runtime.interpreter:_patch_lang": emulated,
    "triton.runtime.interpreter:interpreter_builder": emulated,
    "triton.runtime.interpreter:interpreter_semantic": emulated,
    **{name: to_ptx for name in TRITON.attributes if name.startswith("CUDABackend.")},
    "JITFunction.arg_names": lambda: private.parameters(store_one) == ["out", "BLOCK"],
    "JITFunction.fn": lambda: private.python_function(store_one).__name__ == "store_one",
}
LISTED = [*TRITON.names, *TRITON.attributes]


@pytest.mark.parametrize("name", LISTED)
def test_name_is_there(name: str) -> None:
    assert CALLS[name]() is not False


@pytest.mark.parametrize("name", LISTED)
def test_a_name_that_is_gone_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, name)
    with pytest.raises(MovedError, match=complaint(TRITON, name)):
        CALLS[name]()


def test_every_call_is_of_a_listed_name() -> None:
    assert CALLS.keys() == set(LISTED)


def test_the_folder_of_the_assemblers_has_one() -> None:
    assert list(private.bundled_assemblers().glob("ptxas*"))
