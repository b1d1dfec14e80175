"""Ahead of time: every kernel of a set of programs, for every architecture, into one folder. Needs no GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .... import __version__
from ....errors import UsageError
from ....files.staging import claim, staged_folder
from ....files.writing import write_new
from ..programs.program import LaunchProgram, Variant
from .cache import compile_cached
from .compile import Compiled, check_architecture, find_kernel
from .manifest import Binary, Pack, PackedKernel, kernel_name, read_pack, write_manifest
from .source import source_hash
from .workers import Task, compiled_by

Catalogue = Callable[[int], Mapping[str, LaunchProgram]]
OnProgress = Callable[[int, int], None]


def pack(
    programs: Catalogue,
    sms: Sequence[int],
    out: Path,
    *,
    overwrite: bool = False,
    jobs: int = 1,
    functions: Mapping[str, Any] | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Pack:
    """Compile what `programs(sm)` launch, for each architecture, and write the pack `out`; the same input gives the
    same files.

    jobs: processes (with `functions`, jit functions by kernel name in place of the registry's, always one).
    Raises UsageError if `out` is in the way, UserError if a kernel cannot be made; then `out` is as it was.
    """
    wanted = {sm: dict(programs(sm)) for sm in _architectures(sms)}
    tasks = [(variant, sm) for sm in wanted for variant in variants_of(wanted[sm])]
    with claim(out, overwrite=overwrite):
        compiled = dict(compile_all(tasks, jobs, functions, on_progress))
        _write(out, wanted, tasks, compiled, functions)
    return read_pack(out)


def _write(
    out: Path,
    wanted: Mapping[int, Mapping[str, LaunchProgram]],
    tasks: Sequence[Task],
    compiled: Mapping[Task, Compiled],
    functions: Mapping[str, Any] | None,
) -> None:
    with staged_folder(out) as folder:
        kernels: dict[str, PackedKernel] = {}
        for variant in dict.fromkeys(variant for variant, _ in tasks):
            name, source = kernel_name(variant), source_hash(find_kernel(variant, functions))
            made = {sm: compiled[variant, sm] for sm in wanted if (variant, sm) in compiled}
            kernels[name] = PackedKernel(variant, source, {sm: _store(folder, name, it) for sm, it in made.items()})
        names = dict.fromkeys(name for by_name in wanted.values() for name in by_name)
        by_sm = {name: {sm: wanted[sm][name] for sm in wanted if name in wanted[sm]} for name in names}
        write_manifest(Pack(folder, _versions(), tuple(wanted), kernels, by_sm))


def variants_of(programs: Mapping[str, LaunchProgram]) -> list[Variant]:
    """Every kernel that the programs launch, once, in order."""
    return list(dict.fromkeys(variant for program in programs.values() for variant in program.variants()))


def _architectures(sms: Sequence[int]) -> list[int]:
    for sm in sms:
        check_architecture(sm)
    if not sms:
        raise UsageError("no architecture to build for")
    return sorted(set(sms))


def _versions() -> dict[str, str]:
    import triton

    return {"mla2dsa": __version__, "triton": triton.__version__}


def compile_all(
    tasks: Sequence[Task], jobs: int, functions: Mapping[str, Any] | None, on_progress: OnProgress
) -> Iterator[tuple[Task, Compiled]]:
    """Binaries as they are made, in any order; arguments as in `pack`."""
    if jobs <= 1 or functions is not None:
        for done, (variant, sm) in enumerate(tasks, 1):
            yield (variant, sm), compile_cached(variant, sm, functions)
            on_progress(done, len(tasks))
        return
    for done, made in enumerate(compiled_by(jobs, tasks), 1):
        yield made
        on_progress(done, len(tasks))


def _store(folder: Path, name: str, compiled: Compiled) -> Binary:
    file = f"{name}.sm{compiled.sm}.cubin"
    write_new(folder / file, compiled.cubin)
    return Binary(
        file=file,
        sha256=hashlib.sha256(compiled.cubin).hexdigest(),
        bytes=len(compiled.cubin),
        entry=compiled.entry,
        target=compiled.target,
        threads=compiled.threads,
        shared=compiled.shared,
        registers=compiled.registers,
        spilled=compiled.spilled,
        tmem=compiled.tmem,
        ptxas=compiled.ptxas,
    )
