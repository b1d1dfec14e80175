"""A plugin made by hand: a program that uses every word of the format, and kernels that only look like cubins."""

from __future__ import annotations

import struct

from mla2dsa.kernels.gpu.binaries.bundle import BundledBinary, BundledKernel, write_bundle


def cubin(tail: bytes = b"") -> bytes:
    """An ELF header for a GPU, without sections."""
    return b"\x7fELF\x02\x01\x01".ljust(18, b"\0") + struct.pack("<H", 190) + bytes(44) + tail


PROGRAM = """mla2dsa-plugin 1
op SparseMLA
in bf16 * * 8
in bf16 d0.0 * 8
in i32 d0.0 d0.1 *
out bf16 d0.0 d0.1 4
out i32 d0.0 d0.1 d2.2
alias 1 2
form few 80,90 vunits,d0.0,d0.1,*,-
let x0 d0.0,d0.1,*
workspace x0,32,*
reserve x0,64,*
launch first x0 1 1 t0 w0 id0.1 ld1.1 f3f800000 n n
repeat t d0.1 2
let x1 d0.1,vt,-,2,<
launch second x1 2 d0.0 t1@vt,16,* wx0,16,* t4 ivt n n
end
end
form many 90 1
workspace 0
launch first 1 1 1 t0 t3 id0.1 l1 f00000000 n n
end
"""
FIRST = {80: BundledBinary(64, 0, "f80", cubin(b"a")), 90: BundledBinary(128, 60_000, "f90", cubin(b"b"))}
SECOND = {80: BundledBinary(32, 16, "s80", cubin(b"c")), 90: BundledBinary(96, 16, "s90", cubin(b"d"))}
KERNELS = {"first": BundledKernel("ppilfnn", (0, 1), FIRST), "second": BundledKernel("pppinn", (), SECOND)}
TYPES = ("bf16", "bf16", "i32", "bf16", "i32")


def text(*changes: tuple[str, str]) -> bytes:
    """The program with some of it replaced; each has to be there."""
    program = PROGRAM
    for old, new in changes:
        assert old in program, old
        program = program.replace(old, new, 1)
    return program.encode()


def kernels() -> bytes:
    return write_bundle(KERNELS)


def shapes(batch: int = 2, queries: int = 5, slots: int = 9, selected: int = 3) -> list[tuple[int, ...]]:
    return [
        (batch, queries, 8),
        (batch, slots, 8),
        (batch, queries, selected),
        (batch, queries, 4),
        (batch, queries, selected),
    ]
