"""NVIDIA's assembler: which ones this machine has, and the one that keeps a kernel's variables in registers.

Versions of ptxas differ more than block sizes do: the same PTX spills nothing with 12.8 and hundreds of bytes with 13.4.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ....compat.triton_private import bundled_assemblers
from ....errors import UserError
from ....files.system_calls import die_with_parent
from ....files.temporary import scratch_folder
from ....files.writing import write_new

_VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
_TOOLKITS = ("CUDA_HOME", "CUDA_PATH")
_ADDR_NO_RANDOMIZE = 0x0040000  # <sys/personality.h>


@dataclass(frozen=True)
class Ptxas:
    version: tuple[int, ...]  # (12, 8, 93)
    path: Path

    @property
    def name(self) -> str:
        return ".".join(map(str, self.version))


@dataclass(frozen=True)
class Assembled:
    """A cubin, and what ptxas reports of it: registers of a thread, bytes stored to and loaded from local memory."""

    cubin: bytes
    registers: int
    spilled: int
    ptxas: str


@functools.cache
def installed() -> tuple[Ptxas, ...]:
    """Every assembler there is, one per version, oldest first: Triton's own, TRITON_PTXAS_PATH, the CUDA toolkit's."""
    found: dict[tuple[int, ...], Path] = {}
    for path in _candidates():
        version = _version(path) if path.is_file() and os.access(path, os.X_OK) else None
        if version is not None:
            found.setdefault(version, path)
    if not found:
        raise UserError(
            "no ptxas works on this machine: install triton (x86-64 Linux), or set TRITON_PTXAS_PATH to one"
        )
    return tuple(Ptxas(version, path) for version, path in sorted(found.items()))


def _candidates() -> Iterable[Path]:
    yield from sorted(bundled_assemblers().glob("ptxas*"))
    yield from (Path(os.environ[name]) for name in _VARIABLES if os.environ.get(name))
    roots = [*(os.environ[name] for name in _TOOLKITS if os.environ.get(name)), "/usr/local/cuda"]
    yield from (Path(root) / "bin" / "ptxas" for root in roots)
    on_path = shutil.which("ptxas")
    if on_path:
        yield Path(on_path)


def _version(path: Path) -> tuple[int, ...] | None:
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else None


def assemble(ptx: str, architecture: str, tool: Ptxas) -> Assembled:
    """The cubin of a PTX module with one kernel; architecture: "sm_90a". Raises UserError with what ptxas says."""
    with scratch_folder("ptxas") as folder:
        source, target = folder / "kernel.ptx", folder / "kernel.cubin"
        write_new(source, ptx)
        command = [str(tool.path), "-v", f"--gpu-name={architecture}", source.name, "-o", target.name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={}, preexec_fn=_prepare)
        said = done.stderr + done.stdout
        if done.returncode != 0 or not target.is_file():
            complaint = next((line for line in said.splitlines() if "error" in line or "fatal" in line), said.strip())
            raise UserError(f"ptxas {tool.name} for {architecture}: {complaint or f'exit code {done.returncode}'}")
        registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
        spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
        return Assembled(target.read_bytes(), registers, spilled, tool.name)


def _fixed_addresses() -> None:
    """ptxas orders by pointer here and there (sm_100): with random addresses the same PTX gives one of two cubins.

    Where a sandbox forbids this the cubins are as good, only not the same each time.
    """
    ctypes.CDLL(None).personality(_ADDR_NO_RANDOMIZE)


def _prepare() -> None:
    _fixed_addresses()
    die_with_parent(os.getppid())


def assemble_best(ptx: str, architecture: str, tools: Iterable[Ptxas]) -> Assembled:
    """By the assembler that spills least; of equals the oldest, whose cubins the most drivers load.

    `tools` oldest first; the first without spills ends the search. Raises UserError if none takes the module.
    """
    best: Assembled | None = None
    refusals = []
    for tool in tools:
        try:
            made = assemble(ptx, architecture, tool)
        except UserError as error:
            refusals.append(str(error))
            continue
        if best is None or made.spilled < best.spilled:
            best = made
        if best.spilled == 0:
            break
    if best is None:
        raise UserError("; ".join(refusals))
    return best
