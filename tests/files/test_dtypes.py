"""The table of element types against each library that it speaks of."""

from pathlib import Path

import onnx
import onnx_ir
import pytest
import torch
from safetensors.torch import save_file

from mla2dsa.files.dtypes import (
    BY_NAME,
    BY_SAFETENSORS,
    BY_TRITON,
    ELEMENT_TYPES,
    MODEL_DTYPES,
    ElementType,
    element_type,
    torch_dtype,
)
from mla2dsa.files.safetensors_index import read_header

NAMED = [kind for kind in ELEMENT_TYPES if kind.name]


@pytest.mark.parametrize("kind", NAMED, ids=lambda kind: kind.name)
def test_torch_has_it_in_that_size(kind: ElementType) -> None:
    assert torch_dtype(kind.name).itemsize * 8 == kind.bits
    assert element_type(torch_dtype(kind.name)) is kind


@pytest.mark.parametrize("kind", NAMED, ids=lambda kind: kind.name)
def test_safetensors_calls_it_so(kind: ElementType, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3, dtype=torch_dtype(kind.name))}, tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")["x"]
    assert (found.dtype, found.nbytes) == (kind.safetensors, 3 * kind.bits // 8)


@pytest.mark.parametrize("kind", [kind for kind in ELEMENT_TYPES if kind.onnx], ids=lambda kind: kind.name)
def test_onnx_calls_it_so(kind: ElementType) -> None:
    number = onnx.TensorProto.DataType.Value(kind.onnx)
    assert onnx_ir.DataType[kind.onnx] == number
    assert onnx_ir.DataType(number).bitwidth == kind.bits


@pytest.mark.parametrize("kind", list(BY_TRITON.values()), ids=lambda kind: kind.triton)
def test_triton_calls_it_so(kind: ElementType) -> None:
    language = pytest.importorskip("triton.language")
    name = kind.triton.replace("i", "int").replace("u", "uint") if kind.triton[0] in "iu" else kind.triton
    assert language.dtype(name).primitive_bitwidth == kind.bits


def test_no_spelling_stands_for_two() -> None:
    for table, field in ((BY_NAME, "name"), (BY_SAFETENSORS, "safetensors"), (BY_TRITON, "triton")):
        assert len(table) == len([kind for kind in ELEMENT_TYPES if getattr(kind, field)])


def test_models_run_in_types_that_every_runtime_spells() -> None:
    for name in MODEL_DTYPES:
        kind = BY_NAME[name]
        assert all((kind.safetensors, kind.triton, kind.onnx, kind.server))


def test_what_is_not_in_the_table() -> None:
    with pytest.raises(KeyError):
        element_type(torch.complex128)
    with pytest.raises(KeyError):
        torch_dtype("float128")
