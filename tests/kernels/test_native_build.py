"""The compiler is called once for a library; what is not whole, or not ours alone, is not loaded."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mla2dsa.kernels import native_build
from mla2dsa.kernels.native_build import BuildError, build_library


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLA2DSA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def source(tmp_path: Path, text: str) -> list[Path]:
    (tmp_path / "two.cpp").write_text(text)
    return [tmp_path / "two.cpp"]


def test_a_library_is_built_once(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, flags = source(tmp_path, 'extern "C" int two() { return 2; }'), ("-shared", "-fPIC")
    built = build_library("two", files, flags)
    assert ctypes.CDLL(str(built)).two() == 2
    written = built.stat().st_mtime_ns
    assert build_library("two", files, flags) == built
    assert built.stat().st_mtime_ns == written
    assert build_library("two", source(tmp_path, 'extern "C" int two() { return 3; }'), flags) != built
    assert {path.name for path in empty_cache.rglob("*") if path.is_file()} == {"libtwo.so", "libtwo.so.sha256"}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda built: built.write_bytes(b""),
    "cut": lambda built: os.truncate(built, built.stat().st_size // 2),
    "changed": lambda built: built.write_bytes(built.read_bytes()[:-1] + b"!"),
    "gone": lambda built: built.unlink(),
    "no-digest": lambda built: built.with_name("libtwo.so.sha256").unlink(),
    "other-digest": lambda built: built.with_name("libtwo.so.sha256").write_text("0" * 64),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_library_that_is_not_whole_is_built_again(damage: str, empty_cache: Path, tmp_path: Path) -> None:
    files, flags = source(tmp_path, 'extern "C" int two() { return 2; }'), ("-shared", "-fPIC")
    built = build_library("two", files, flags)
    DAMAGES[damage](built)
    again = build_library("two", files, flags)
    assert again == built
    assert ctypes.CDLL(str(shutil.copy(again, tmp_path / "copy.so"))).two() == 2
    assert built.stat().st_mode & 0o777


@pytest.mark.parametrize("folder", ["cache/native", "cache"])
def test_a_library_that_others_may_have_put_there_is_not_loaded(folder: str, empty_cache: Path, tmp_path: Path) -> None:
    """Digest and all: whoever may write the library may write its digest too."""
    files = source(tmp_path, 'extern "C" int two() { return 2; }')
    build_library("two", files, ("-shared", "-fPIC"))
    (tmp_path / folder).chmod(0o777)
    with pytest.raises(BuildError, match=f"{folder}: others may write to it"):
        build_library("two", files, ("-shared", "-fPIC"))


def test_what_the_compiler_refuses(empty_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot compile libtwo\.so: .*error") as caught:
        build_library("two", source(tmp_path, "int two() { return nosuch; }"), ("-shared", "-fPIC"))
    assert len(str(caught.value).splitlines()) == 1
    assert not [path for path in empty_cache.rglob("*") if path.is_file()]


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        BuildError, match=r"no C\+\+ compiler \(g\+\+, c\+\+, clang\+\+\) on the PATH; install one, or set CXX"
    ):
        native_build.compiler()
    monkeypatch.setenv("CXX", "nosuch")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler \(nosuch\)"):
        native_build.compiler()
