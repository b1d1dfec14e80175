"""One kernel for one architecture, compiled without a GPU: the cubin, and all a launcher has to know about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....compat import triton_private
from ....errors import UsageError, UserError
from ..programs.program import Variant
from .ptxas import Assembled, assemble_best, installed

# Bytes of shared memory a block may opt in to (CUDA programming guide, table of technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
ARCHITECTURES = tuple(SHARED_LIMIT)
TMEM_LIMIT = 512  # columns of tensor memory
HIDDEN = ("global_scratch", "profile_scratch")  # pointers that Triton appends to every kernel's parameters
PTX_VERSION = 87  # what ptxas 12.8 reads, which is the first to know every architecture above
_PTX_WIDTH = {"i1": 8, "i8": 8, "u8": 8, "i16": 16, "u16": 16, "fp16": 16, "bf16": 16, "i32": 32, "u32": 32, "fp32": 32}


@dataclass(frozen=True)
class Compiled:
    """A variant's binary for `sm`.

    entry: the kernel's name in the cubin. threads: of a block. shared: bytes of dynamic shared memory (above 48 KB a
    launcher has to opt in). registers: of a thread. spilled: bytes it stores to and loads from local memory.
    parameters: (name, Triton type) in order, the hidden pointers last (null is fine). target: "sm_90a". tmem: columns
    of tensor memory. ptxas: its version.
    """

    cubin: bytes
    sm: int
    entry: str
    threads: int
    shared: int
    registers: int
    spilled: int
    parameters: tuple[tuple[str, str], ...]
    target: str
    tmem: int
    ptxas: str


def compile_variant(variant: Variant, sm: int, functions: Mapping[str, Any] | None = None) -> Compiled:
    """Compile for one of ARCHITECTURES; functions: jit functions by kernel name (default: the registry).

    The same input gives the same bytes. Raises UserError, one line with kernel, architecture, value and limit, for an
    unknown kernel or architecture, arguments that are not the kernel's, and what the architecture cannot run.
    """
    check_architecture(sm)
    ptx, metadata = _to_ptx(find_kernel(variant, functions), variant, sm)
    entry, target = str(metadata["name"]), _target(ptx)
    _check_parameters(variant, sm, ptx, entry)
    _check_limits(variant, sm, ptx, metadata)
    made = _assemble(variant, ptx, target)
    return Compiled(
        cubin=made.cubin,
        sm=sm,
        entry=entry,
        threads=32 * int(metadata["num_warps"]),  # warp specialisation adds to those asked for
        shared=int(metadata["shared"]),
        registers=made.registers,
        spilled=made.spilled,
        parameters=(*variant.arguments, *((name, "*i8") for name in HIDDEN)),
        target=target,
        tmem=int(metadata.get("tmem_size") or 0),
        ptxas=made.ptxas,
    )


def check_architecture(sm: int) -> None:
    """Raises UsageError for one that no kernel is made for."""
    if sm not in ARCHITECTURES:
        raise UsageError(f"sm_{sm} is not supported, expected one of {', '.join(map(str, ARCHITECTURES))}")


def find_kernel(variant: Variant, functions: Mapping[str, Any] | None = None) -> Any:
    """The jit function of a variant, after a check that its arguments and constants are all there, in order."""
    from ..triton_code.registry import KERNELS, jit_function

    known: Mapping[str, Any] = KERNELS if functions is None else functions
    if variant.kernel not in known:
        raise UserError(f"kernel {variant.kernel} is not known, expected one of {', '.join(sorted(known))}")
    function = jit_function(variant.kernel) if functions is None else functions[variant.kernel]
    constants = {name for name, _ in variant.constants}
    takes = triton_private.parameters(function)
    wanted = [name for name in takes if name not in constants]
    given = [name for name, _ in variant.arguments]
    if given != wanted or not constants <= set(takes):
        raise UserError(
            f"kernel {variant.kernel} takes ({', '.join(takes)}), the variant gives ({', '.join(given)})"
            f" and constants ({', '.join(sorted(constants))})"
        )
    unknown = variant.aligned - set(given)
    if unknown:
        raise UserError(f"kernel {variant.kernel}: {', '.join(sorted(unknown))} cannot be aligned, it is no argument")
    return function


def _to_ptx(function: Any, variant: Variant, sm: int) -> tuple[str, dict[str, Any]]:
    """PTX, and what Triton says of it: no driver is asked, nothing is written to Triton's own cache."""
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "ptx_version": PTX_VERSION,
        "enable_fp_fusion": True,
        "debug": False,
    }
    types, constants = dict(variant.arguments), dict(variant.constants)
    try:
        return triton_private.to_ptx(function, sm, options, types, constants, frozenset(variant.aligned))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_where(variant, sm)}: Triton does not compile it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _target(ptx: str) -> str:
    match = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert match is not None
    return match.group(1)


def _check_parameters(variant: Variant, sm: int, ptx: str, entry: str) -> None:
    """The binary takes what the variant lists, with the widths its types have, and the hidden pointers after that."""
    match = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)", ptx, re.DOTALL)
    found = [int(width) for width in re.findall(r"\.param\s+\.[a-z]+(\d+)", match.group(1) if match else "")]
    types = [*(kind for _, kind in variant.arguments), *("*i8" for _ in HIDDEN)]
    wanted = [_PTX_WIDTH.get(kind, 64) for kind in types]
    if found != wanted:
        raise UserError(f"{_where(variant, sm)}: its parameters are {found} bits wide, expected {wanted}")


def _check_limits(variant: Variant, sm: int, ptx: str, metadata: Mapping[str, Any]) -> None:
    where = _where(variant, sm)
    if metadata["shared"] > SHARED_LIMIT[sm]:
        raise UserError(f"{where}: needs {metadata['shared']} bytes of shared memory, the limit is {SHARED_LIMIT[sm]}")
    if (metadata.get("tmem_size") or 0) > TMEM_LIMIT:
        raise UserError(f"{where}: needs {metadata['tmem_size']} columns of tensor memory, the limit is {TMEM_LIMIT}")
    for name in HIDDEN:
        if metadata.get(f"{name}_size"):
            raise UserError(f"{where}: needs {metadata[f'{name}_size']} bytes of {name}, the limit is 0")
    if re.search(r"^\s*trap;", ptx, re.MULTILINE):  # what Triton makes of a kernel that does not fit, silently
        raise UserError(f"{where}: was compiled to a trap, which would abort at run time")


def _assemble(variant: Variant, ptx: str, target: str) -> Assembled:
    try:
        return assemble_best(ptx, target, installed())
    except UserError as error:
        raise UserError(f"kernel {describe(variant)}: {error}") from error


def _where(variant: Variant, sm: int) -> str:
    return f"kernel {describe(variant)} on sm_{sm}"


def describe(variant: Variant) -> str:
    """sparse_mla(HEADS=16, BLOCK=64, 8 warps, 2 stages)"""
    constants = [f"{name}={value}" for name, value in variant.constants]
    return f"{variant.kernel}({', '.join([*constants, f'{variant.num_warps} warps', f'{variant.num_stages} stages'])})"
