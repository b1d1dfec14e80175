"""The binaries of an op's kernels as the field `kernels` of a TensorRT plugin. docs/tensorrt.md has the format."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ....errors import UserError
from ..programs.program import Variant
from .compile import HIDDEN, Compiled

MAGIC, VERSION = b"M2DK", 1
_LETTERS = {"i32": "i", "u32": "i", "i64": "l", "u64": "l", "fp32": "f"}
_CUDA_ELF, _MACHINE_AT = 190, 18  # e_machine of a cubin, and where an ELF header has it


@dataclass(frozen=True)
class BundledBinary:
    """threads: of a block. shared: bytes of dynamic shared memory. entry: the function's name in the cubin."""

    threads: int
    shared: int
    entry: str
    cubin: bytes


@dataclass(frozen=True)
class BundledKernel:
    """parameters: a letter each (p pointer, i 32 bits, l 64 bits, f float32, n null). aligned: numbers of those divisible
    by 16. binaries by architecture."""

    parameters: str
    aligned: tuple[int, ...]
    binaries: Mapping[int, BundledBinary]


def bundled(variant: Variant, compiled: Mapping[int, Compiled]) -> BundledKernel:
    """A variant with its binaries by architecture."""
    letters = ["p" if kind.startswith("*") else _LETTERS[kind] for _, kind in variant.arguments]
    aligned = tuple(number for number, (name, _) in enumerate(variant.arguments) if name in variant.aligned)
    binaries = {sm: BundledBinary(it.threads, it.shared, it.entry, it.cubin) for sm, it in sorted(compiled.items())}
    return BundledKernel("".join(letters) + "n" * len(HIDDEN), aligned, binaries)


def write_bundle(kernels: Mapping[str, BundledKernel]) -> bytes:
    """The bytes; kernels by name."""
    parts = [struct.pack("<I", len(kernels))]
    for name, kernel in sorted(kernels.items()):
        parts += [_text(name), _text(kernel.parameters)]
        parts.append(struct.pack(f"<{1 + len(kernel.aligned)}I", len(kernel.aligned), *kernel.aligned))
        parts.append(struct.pack("<I", len(kernel.binaries)))
        for sm, binary in sorted(kernel.binaries.items()):
            parts.append(struct.pack("<III", sm, binary.threads, binary.shared))
            parts += [_text(binary.entry), struct.pack("<I", len(binary.cubin)), binary.cubin]
    body = b"".join(parts)
    return MAGIC + struct.pack("<II", VERSION, len(MAGIC) + 8 + len(body)) + body


def read_bundle(data: bytes) -> dict[str, BundledKernel]:
    """Inverse of `write_bundle`; one NUL may follow. Raises UserError if it is not whole."""
    reader = _Reader(data)
    if reader.take(len(MAGIC)) != MAGIC or reader.number() != VERSION:
        raise UserError(f"the kernels are not a bundle of version {VERSION}")
    size = reader.number()
    if size not in (len(data), len(data) - 1) or (size < len(data) and data[size]):
        raise UserError(f"the bundle of kernels has {len(data)} bytes, expected {size}")
    kernels = dict(reader.kernel() for _ in range(reader.number()))
    if reader.at != size:
        raise UserError(f"the bundle of kernels ends at byte {reader.at}, expected {size}")
    return kernels


def _text(text: str) -> bytes:
    data = text.encode("ascii")
    return struct.pack("<I", len(data)) + data


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self.at:
            raise UserError(f"the bundle of kernels is cut off at byte {len(self._data)}")
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self) -> int:
        (value,) = struct.unpack("<I", self.take(4))
        return int(value)

    def text(self) -> str:
        return self.take(self.number()).decode("ascii", errors="replace")

    def kernel(self) -> tuple[str, BundledKernel]:
        name, parameters = self.text(), self.text()
        aligned = tuple(self.number() for _ in range(self.number()))
        binaries = dict(self._binary(name) for _ in range(self.number()))
        if set(parameters) - set("pilfn") or any(number >= len(parameters) for number in aligned):
            raise UserError(f"kernel {name}: parameters {parameters!r} with {aligned} aligned are not known here")
        return name, BundledKernel(parameters, aligned, binaries)

    def _binary(self, kernel: str) -> tuple[int, BundledBinary]:
        sm, threads, shared = self.number(), self.number(), self.number()
        entry, cubin = self.text(), self.take(self.number())
        machine = cubin[_MACHINE_AT : _MACHINE_AT + 2]
        if cubin[:4] != b"\x7fELF" or machine != struct.pack("<H", _CUDA_ELF):
            raise UserError(f"kernel {kernel} for sm_{sm}: not a cubin")
        return sm, BundledBinary(threads, shared, entry, cubin)
