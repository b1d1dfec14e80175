"""Folders of code: ours alone, or refused in one line."""

import os
from pathlib import Path

import pytest

from mla2dsa.errors import UserError
from mla2dsa.files.user_cache import code_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLA2DSA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o002, 0o077], ids=oct)
def test_made_for_us_alone(cache: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert code_folder("native") == cache / "native"
    finally:
        os.umask(before)
    assert (mode(cache), mode(cache / "native")) == (0o700, 0o700)


def test_one_that_others_may_read_becomes_ours_alone(cache: Path) -> None:
    (cache / "native").mkdir(parents=True)
    (cache / "native").chmod(0o755)
    assert mode(code_folder("native")) == 0o700


@pytest.mark.parametrize(
    ("name", "bits"), [("cache/native", 0o777), ("cache/native", 0o770), ("cache/native", 0o702), ("cache", 0o777)]
)
def test_one_that_others_may_write_to_is_refused(cache: Path, name: str, bits: int) -> None:
    """Made private now, it would still hold what they have put there."""
    (cache / "native").mkdir(parents=True)
    (cache.parent / name).chmod(bits)
    with pytest.raises(UserError, match=rf"{name}: others may write to it .mode {bits:04o}.*set MLA2DSA_CACHE"):
        code_folder("native")
    assert mode(cache.parent / name) == bits


def test_a_shared_folder_that_is_sticky_may_hold_ours(cache: Path) -> None:
    """MLA2DSA_CACHE=/tmp: nobody else can rename what is ours there."""
    cache.mkdir()
    cache.chmod(0o1777)
    assert mode(code_folder("native")) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
@pytest.mark.parametrize("name", ["cache", "cache/native"])
def test_another_users_is_refused(cache: Path, name: str) -> None:
    code_folder("native")
    os.chown(cache.parent / name, 54_321, 54_321)
    with pytest.raises(UserError, match=rf"{name}: belongs to another user .uid 54321."):
        code_folder("native")


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLA2DSA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(UserError, match=r"no home folder .* set MLA2DSA_CACHE"):
        code_folder("native")
