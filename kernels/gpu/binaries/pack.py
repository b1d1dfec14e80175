"""Ahead of time: every kernel of a set of programs, for every architecture, into one folder. Needs no GPU."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .... import __version__
from ....errors import UsageError, UserError
from ..programs.program import LaunchProgram, Variant
from .cache import compile_cached
from .compile import Compiled, check_architecture, find_kernel
from .manifest import MANIFEST, Binary, Pack, PackedKernel, kernel_name, read_pack, write_manifest
from .source import source_hash

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
    check_out(out, overwrite=overwrite)
    tasks = [(variant, sm) for sm in wanted for variant in variants_of(wanted[sm])]
    compiled = dict(compile_all(tasks, jobs, functions, on_progress))
    with _replaced(out) as folder:
        kernels: dict[str, PackedKernel] = {}
        for variant in dict.fromkeys(variant for variant, _ in tasks):
            name, source = kernel_name(variant), source_hash(find_kernel(variant, functions))
            made = {sm: compiled[variant, sm] for sm in wanted if (variant, sm) in compiled}
            kernels[name] = PackedKernel(variant, source, {sm: _store(folder, name, it) for sm, it in made.items()})
        names = dict.fromkeys(name for by_name in wanted.values() for name in by_name)
        by_sm = {name: {sm: wanted[sm][name] for sm in wanted if name in wanted[sm]} for name in names}
        write_manifest(Pack(folder, _versions(), tuple(wanted), kernels, by_sm))
    return read_pack(out)


def variants_of(programs: Mapping[str, LaunchProgram]) -> list[Variant]:
    """Every kernel that the programs launch, once, in order."""
    return list(dict.fromkeys(variant for program in programs.values() for variant in program.variants()))


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raises UsageError if `out` holds something that is not to be replaced: only packs are, and only when asked."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise UsageError(f"{out}: is a file; choose another output folder")
    if not overwrite:
        raise UsageError(f"{out}: not empty; choose another output folder, or pass --overwrite to replace it")
    if not (out / MANIFEST).is_file():
        raise UsageError(f"{out}: holds no {MANIFEST}, so it is no kernel pack to overwrite; remove it yourself")


def _architectures(sms: Sequence[int]) -> list[int]:
    for sm in sms:
        check_architecture(sm)
    if not sms:
        raise UsageError("no architecture to build for")
    return sorted(set(sms))


def _versions() -> dict[str, str]:
    import triton

    return {"mla2dsa": __version__, "triton": triton.__version__}


Task = tuple[Variant, int]


def compile_all(
    tasks: Sequence[Task], jobs: int, functions: Mapping[str, Any] | None, on_progress: OnProgress
) -> Iterator[tuple[Task, Compiled]]:
    """Binaries as they are made, in any order; arguments as in `pack`."""
    if jobs <= 1 or functions is not None:
        for done, (variant, sm) in enumerate(tasks, 1):
            yield (variant, sm), compile_cached(variant, sm, functions)
            on_progress(done, len(tasks))
        return
    # Fresh processes: a fork of one that has run torch may hang.
    with ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(compile_cached, *task): task for task in tasks}
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                yield waiting[future], future.result()
                on_progress(done, len(tasks))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _store(folder: Path, name: str, compiled: Compiled) -> Binary:
    file = f"{name}.sm{compiled.sm}.cubin"
    (folder / file).write_bytes(compiled.cubin)
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


@contextmanager
def _replaced(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and is removed when it does not."""
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
    except OSError as error:
        raise UserError(f"{out}: not written, {error.strerror or error}") from error
    folder, old = beside / "new", beside / "old"
    try:
        folder.mkdir()
        yield folder
        if out.exists():
            out.rename(old)
        try:
            folder.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
    except OSError as error:
        raise UserError(f"{out}: not written, {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
