"""Compiles our C++ sources into a shared library with the machine's own compiler, once: kept by what it was made from."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..errors import UserError
from ..files.digests import file_sha256
from ..files.temporary import cache_entry, move_file, replace_file
from ..files.user_cache import code_folder

_COMPILERS = ("g++", "c++", "clang++")


class BuildError(Exception):
    """No compiler, or it refused the sources: one line."""


def compiler() -> str:
    """CXX, or the first of g++, c++, clang++ on the PATH. Raises BuildError."""
    named = os.environ.get("CXX")
    found = next((path for name in ([named] if named else _COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError(f"no C++ compiler ({named or ', '.join(_COMPILERS)}) on the PATH; install one, or set CXX")
    return found


def build_library(name: str, sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[str] = ()) -> Path:
    """lib`name`.so of the .cpp files of `sources`, from the cache if it has been built before. Headers among `sources` are
    part of what it is made from. libraries: flags that come last, as -ldl. Raises BuildError; nothing half-written is ever
    left under the final name."""
    program = compiler()
    command = [program, *flags, *(str(file) for file in sources if file.suffix == ".cpp"), *libraries]
    made_from = [_version(program), *flags, *libraries, *(file.name for file in sources)]
    digest = hashlib.sha256("\0".join(made_from).encode())
    for file in sources:
        digest.update(file.read_bytes())
    try:
        target = code_folder("native") / digest.hexdigest()[:32] / f"lib{name}.so"
        if _is_whole(target):
            return target
        with cache_entry(target.parent) as place:
            built = place / target.name
            done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
            if done.returncode != 0:
                errors = [line for line in done.stderr.splitlines() if "error" in line] or [
                    f"exit code {done.returncode}"
                ]
                raise BuildError(f"{program} cannot compile lib{name}.so: {errors[0][:200]}")
            replace_file(_known(target), file_sha256(built).encode())
            move_file(built, target)
    except UserError as error:
        raise BuildError(str(error)) from error
    except OSError as error:
        raise BuildError(f"{error.filename or name}: {error.strerror or error}") from error
    return target


def _is_whole(library: Path) -> bool:
    """Whether it is what was built: a killed copy or a full disk may have cut it, and then it would crash when it is loaded."""
    known = _known(library)
    return library.is_file() and known.is_file() and known.read_text() == file_sha256(library)


def _known(library: Path) -> Path:
    """Where the digest of a library lies."""
    return library.with_name(library.name + ".sha256")


@cache
def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    return f"{program} {done.stdout.splitlines()[0] if done.stdout else ''}"
