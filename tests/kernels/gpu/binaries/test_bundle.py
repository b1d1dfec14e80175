"""Binaries of kernels as bytes: read back as written, and refused when they are not whole."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_kernels import FUNCTIONS, nested
from plugin_readers import read_bundle

from mla2dsa.errors import UserError
from mla2dsa.kernels.gpu.binaries.bundle import BundledBinary, BundledKernel, bundled, write_bundle
from mla2dsa.kernels.gpu.binaries.compile import compile_variant

CUBIN = b"\x7fELF" + bytes(14) + struct.pack("<H", 190) + bytes(12)
ON_80, ON_90 = BundledBinary(128, 0, "one_0", CUBIN), BundledBinary(256, 70000, "one_1", CUBIN + b"\0")
KERNELS = {
    "one": BundledKernel("pplifnn", (0, 1), {80: ON_80, 90: ON_90}),
    "two": BundledKernel("pnn", (), {80: BundledBinary(32, 1024, "two", CUBIN)}),
}


def test_what_is_written_is_read_back() -> None:
    data = write_bundle(KERNELS)
    assert read_bundle(data) == KERNELS
    assert read_bundle(data + b"\0") == KERNELS  # as TensorRT's parser hands it on
    assert write_bundle(dict(reversed(KERNELS.items()))) == data


def test_a_compiled_kernel() -> None:
    pytest.importorskip("triton")
    made = compile_variant(nested(), 80, FUNCTIONS)
    kernel = bundled(nested(), {80: made})
    assert kernel.parameters == "ppinn"
    assert kernel.aligned == (0,)
    assert read_bundle(write_bundle({"nested": kernel}))["nested"].binaries[80] == BundledBinary(
        made.threads, made.shared, made.entry, made.cubin
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "cut off at byte 0"),
        (lambda data: b"M2DX" + data[4:], "not a bundle of version 1"),
        (lambda data: data[:4] + struct.pack("<I", 2) + data[8:], "not a bundle of version 1"),
        (lambda data: data[:-1], "bytes, expected"),
        (lambda data: data + b"\0\0", "bytes, expected"),
        (lambda data: data + b"x", "bytes, expected"),
        (lambda data: data.replace(b"\x7fELF", b"\x7fELG"), "kernel one for sm_80: not a cubin"),
        (lambda data: data.replace(struct.pack("<H", 190), struct.pack("<H", 62)), "not a cubin"),
        (lambda data: data.replace(b"pplifnn", b"pplixnn"), "parameters 'pplixnn'"),
        (lambda data: data.replace(b"pplifnn" + struct.pack("<II", 2, 0), b"pplifnn" + struct.pack("<II", 2, 7)), "aligned are not known"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused(change: Callable[[bytes], bytes], message: str) -> None:
    data = write_bundle(KERNELS)
    assert change(data) != data
    with pytest.raises(UserError, match=message):
        read_bundle(change(data))


@given(at=st.integers(0, len(write_bundle(KERNELS)) - 1), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_any_changed_byte_is_refused_or_read(at: int, value: int) -> None:
    data = bytearray(write_bundle(KERNELS))
    data[at] = value
    try:
        kernels = read_bundle(bytes(data))
    except UserError:
        return
    assert sum(len(kernel.binaries) for kernel in kernels.values()) <= 3
