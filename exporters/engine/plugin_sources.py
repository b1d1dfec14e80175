"""How the plugin library is made of its sources, with nothing but the standard library: the build of a wheel runs this too."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "tensorrt_plugin"
LIBRARY, DIGEST = "libmla2dsa_trt.so", "libmla2dsa_trt.so.sources"  # of its sources, and of itself
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden")
LIBRARIES = ("-ldl",)
_COMPILERS = ("g++", "c++", "clang++")


def sources(folder: Path = FOLDER) -> list[Path]:
    """Everything that the library is made of."""
    return sorted([*folder.glob("*.cpp"), *folder.glob("*.h"), folder / "exports.map"])


def flags(folder: Path = FOLDER) -> tuple[str, ...]:
    return (*FLAGS, f"-Wl,--version-script={folder / 'exports.map'}")


def digest(folder: Path = FOLDER) -> str:
    """sha256 of the sources, by which a library that was shipped is known to be theirs."""
    made = hashlib.sha256()
    for file in sources(folder):
        made.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    return made.hexdigest()


def shipped(folder: Path = FOLDER) -> Path | None:
    """The library that came with the package, if it is of these very sources, and whole."""
    library, known = folder / LIBRARY, folder / DIGEST
    if library.is_file() and known.is_file() and known.read_text() == _digests(folder):
        return library
    return None


def _digests(folder: Path) -> str:
    return f"{digest(folder)}\n{hashlib.sha256((folder / LIBRARY).read_bytes()).hexdigest()}\n"


def usable_compiler() -> str | None:
    """CXX, or the first C++ compiler on the PATH."""
    named = os.environ.get("CXX")
    return next((path for name in ([named] if named else _COMPILERS) if (path := shutil.which(name))), None)


def compile_into(folder: Path) -> str | None:
    """Compile the sources that lie in `folder` to the library beside them. None when it is there, else why not, in one line."""
    compiler = usable_compiler()
    if compiler is None:
        return "no C++ compiler"
    files = [str(file) for file in sources(folder) if file.suffix == ".cpp"]
    command = [compiler, *flags(folder), "-s", *files, "-o", str(folder / LIBRARY), *LIBRARIES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return f"{compiler} does not compile it: {(done.stderr.splitlines() or ['no reason'])[0][:200]}"
    (folder / DIGEST).write_text(_digests(folder))
    return None
