"""A pack on disk: a folder of cubins and the `manifest.json` that says what they are and how to launch them.

docs/kernels.md has the format. Reading one needs neither triton nor a GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ....errors import UserError
from ....files.digests import file_sha256
from ....files.manifests.schema import Bytes, Entries, FileName, Manifest, Sha256, Size, Strict, Text, read_manifest
from ....files.ownership import write_manifest as write_owned
from ..programs.program import LaunchProgram, Variant
from ..programs.program_text import read_program, write_program
from .compile import HIDDEN

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Binary:
    """A kernel for one architecture: its file in the pack, and what a launcher needs (see `compile.Compiled`)."""

    file: str
    sha256: str
    bytes: int
    entry: str
    target: str
    threads: int
    shared: int
    registers: int
    spilled: int
    tmem: int
    ptxas: str


class _Binary(Strict):
    """`Binary`, as the manifest has it."""

    file: FileName
    sha256: Sha256
    bytes: Bytes
    entry: Text
    target: Text
    threads: Size
    shared: Bytes
    registers: Bytes
    spilled: Bytes
    tmem: Bytes
    ptxas: Text


class _Kernel(Strict):
    """`PackedKernel`, as the manifest has it."""

    kernel: Text
    constants: Annotated[dict[Text, int | float | str | bool], Entries]
    arguments: Annotated[list[Annotated[list[Text], Field(min_length=2, max_length=2)]], Entries]
    aligned: Annotated[list[Text], Entries]
    num_warps: Size
    num_stages: Size
    source: Text
    binaries: Annotated[dict[Annotated[str, Field(pattern="^[0-9]{1,4}$")], _Binary], Entries]


class _Program(Strict):
    """A program, and the architectures that it is for."""

    sms: Annotated[list[Size], Entries]
    program: Annotated[list[Text], Entries]


class _PackManifest(Manifest):
    sms: Annotated[list[Size], Entries]
    kernels: Annotated[dict[Text, _Kernel], Entries]
    programs: Annotated[dict[Text, Annotated[list[_Program], Entries]], Entries]


@dataclass(frozen=True)
class PackedKernel:
    """A variant, the hash of its Python source, and its binaries by architecture."""

    variant: Variant
    source: str
    binaries: Mapping[int, Binary]


@dataclass(frozen=True)
class Pack:
    """folder; versions: of mla2dsa and triton; kernels by name in the pack; programs by name and architecture."""

    folder: Path
    versions: Mapping[str, str]
    sms: tuple[int, ...]
    kernels: Mapping[str, PackedKernel]
    programs: Mapping[str, Mapping[int, LaunchProgram]]

    def cubin(self, kernel: str, sm: int) -> bytes:
        """The binary of a kernel of the pack."""
        return (self.folder / self.kernels[kernel].binaries[sm].file).read_bytes()


def variant_fields(variant: Variant) -> dict[str, Any]:
    """A variant as JSON holds it, the same for equal variants."""
    return {
        "kernel": variant.kernel,
        "constants": dict(variant.constants),
        "arguments": [list(argument) for argument in variant.arguments],
        "aligned": sorted(variant.aligned),
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
    }


def kernel_name(variant: Variant) -> str:
    """What a variant is called in a pack: sparse_mla-0123456789ab."""
    canonical = json.dumps(variant_fields(variant), sort_keys=True)
    return f"{variant.kernel}-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"


def write_manifest(pack: Pack) -> None:
    """manifest.json of a pack whose cubins are in place. The same pack gives the same bytes."""
    kernels = {
        name: {
            **variant_fields(kernel.variant),
            "hidden": list(HIDDEN),
            "source": kernel.source,
            "binaries": {str(sm): asdict(binary) for sm, binary in sorted(kernel.binaries.items())},
        }
        for name, kernel in sorted(pack.kernels.items())
    }
    content = {
        "format": FORMAT,
        "versions": dict(sorted(pack.versions.items())),
        "sms": list(pack.sms),
        "kernels": kernels,
        "programs": {name: _written(by_sm) for name, by_sm in sorted(pack.programs.items())},
    }
    write_owned(pack.folder, MANIFEST, content, indent=1)


def _written(by_sm: Mapping[int, LaunchProgram]) -> list[dict[str, Any]]:
    """Architectures with the same program share one entry."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for sm, program in sorted(by_sm.items()):
        groups.setdefault(tuple(write_program(program, kernel_name)), []).append(sm)
    return [{"sms": sms, "program": list(lines)} for lines, sms in groups.items()]


def read_pack(folder: Path) -> Pack:
    """A pack that is whole: every file there with the bytes the manifest says, every program with its kernels.

    Raises UserError, one line with the folder and what is wrong with it.
    """
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder}: no {MANIFEST} there, so it is no kernel pack; mla2dsa kernels build writes one")
    pack = _from_json(folder, read_manifest(folder / MANIFEST, _PackManifest, FORMAT, "build the pack again"))
    _check_files(pack)
    _check_launches(pack)
    return pack


def _from_json(folder: Path, content: Mapping[str, Any]) -> Pack:
    kernels = {name: _kernel(fields) for name, fields in content["kernels"].items()}
    variants = {name: kernel.variant for name, kernel in kernels.items()}
    programs: dict[str, dict[int, LaunchProgram]] = {}
    for name, entries in content["programs"].items():
        for entry in entries:
            try:
                program = read_program(entry["program"], variants)
            except UserError as error:
                raise UserError(f"{folder}: program {name}: {error}") from error
            programs.setdefault(name, {}).update(dict.fromkeys(entry["sms"], program))
    return Pack(folder, dict(content["versions"]), tuple(content["sms"]), kernels, programs)


def _kernel(fields: Mapping[str, Any]) -> PackedKernel:
    variant = Variant(
        kernel=fields["kernel"],
        constants=tuple(fields["constants"].items()),
        arguments=tuple((name, kind) for name, kind in fields["arguments"]),
        aligned=frozenset(fields["aligned"]),
        num_warps=fields["num_warps"],
        num_stages=fields["num_stages"],
    )
    binaries = {int(sm): Binary(**binary) for sm, binary in fields["binaries"].items()}
    return PackedKernel(variant, fields["source"], binaries)


def _check_files(pack: Pack) -> None:
    for kernel in pack.kernels.values():
        for binary in kernel.binaries.values():
            file = pack.folder / binary.file
            if not file.exists():
                raise UserError(f"{pack.folder}: {binary.file} is missing; build the pack again")
            if file_sha256(file) != binary.sha256:
                raise UserError(f"{pack.folder}: {binary.file} is not what {MANIFEST} says; build the pack again")


def _check_launches(pack: Pack) -> None:
    for name, by_sm in pack.programs.items():
        for sm, program in by_sm.items():
            for kernel in map(kernel_name, program.variants()):
                if sm not in pack.kernels[kernel].binaries:
                    raise UserError(f"{pack.folder}: program {name} needs {kernel} for sm_{sm}, which is not there")
