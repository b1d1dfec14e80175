"""The binaries of an op's kernels as the field `kernels` of a TensorRT plugin. docs/tensorrt.md has the format."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ..programs.program import Variant
from .compile import HIDDEN, Compiled

MAGIC, VERSION = b"M2DK", 1
_LETTERS = {"i32": "i", "u32": "i", "i64": "l", "u64": "l", "fp32": "f"}


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


def _text(text: str) -> bytes:
    data = text.encode("ascii")
    return struct.pack("<I", len(data)) + data
