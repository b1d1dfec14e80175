"""A deployment that is stopped or fails is gone on with: what was converted is not converted again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import contents
from command_line import (
    INDEXER_SHARD,
    LAYERS,
    TINY,
    Done,
    assert_refused,
    mla2dsa,
    quick_capture,  # noqa: F401  (a fixture)
    small_conversion,
    small_flags,
)

from mla2dsa.errors import UserError
from mla2dsa.optimizer import deploy
from mla2dsa.optimizer.build import Built
from mla2dsa.optimizer.indexer.progress_store import ProgressStore

pytestmark = pytest.mark.usefixtures("quick_capture")
ENGINE = ("--backend", "tensorrt-rtx", "--sm", 80, "--skip-transformers")


class Builder:
    """In the place of `build`: raises what it is given, or keeps what it is to build from."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.sources: list[dict[str, str]] = []

    def __call__(self, plan: Any, on_progress: Any) -> Built:
        if self.error is not None:
            raise self.error
        self.sources.append(contents(plan.source))
        return Built({"engine": {}}, "key", False)


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    found = Builder()
    monkeypatch.setattr(deploy, "build", found)
    monkeypatch.setattr(deploy, "check_ready", lambda plan: None)
    return found


@pytest.fixture
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    return (*small_flags(tmp_path_factory), *ENGINE, "--json")


def no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "convert", lambda *_, **__: pytest.fail("it was converted again"))


def deployed(room: Path, *flags: object) -> Done:
    before = contents(TINY)
    done = mla2dsa("deploy", TINY, room / "out", *flags)
    assert contents(TINY) == before
    return done


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("the builder gives up")], ids=["ctrl-c", "failed"])
def test_a_finished_conversion_is_taken_again(
    error: BaseException, builder: Builder, flags: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    builder.error = error
    stopped = deployed(tmp_path, *flags)
    code, said = (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (1, "the builder gives up")
    assert stopped.code == code
    assert said in stopped.err.splitlines()[-1]
    assert stopped.err.endswith("what is converted is kept: the same command goes on from there\n")
    assert [path.name for path in tmp_path.iterdir()] == [".out.mla2dsa-deploy"]
    builder.error = None
    no_conversion(monkeypatch)
    assert deployed(tmp_path, *flags).code == 0
    assert builder.sources[0][INDEXER_SHARD] == contents(small_conversion(tmp_path_factory))[INDEXER_SHARD]
    assert not list(tmp_path.iterdir())


def interrupt_after(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save = ProgressStore.save

    def interrupting(self: ProgressStore, result: Any) -> None:
        save(self, result)
        if len(self.layers()) == layers:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressStore, "save", interrupting)


def test_an_unfinished_conversion_is_gone_on_with(
    builder: Builder, flags: tuple[object, ...], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(2, patch)
        assert deployed(tmp_path, *flags).code == 130
    done = deployed(tmp_path, *flags)
    assert done.code == 0, done.err
    kept = [line.partition(":")[0] for line in done.err.splitlines() if line.endswith("kept from before")]
    assert kept == list(LAYERS[:2])
    assert builder.sources[0][INDEXER_SHARD] == contents(small_conversion(tmp_path_factory))[INDEXER_SHARD]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("finished", [False, True], ids=["layers", "checkpoint"])
def test_another_conversion_is_not_gone_on_with(
    finished: bool, builder: Builder, flags: tuple[object, ...], tmp_path: Path
) -> None:
    other = (*flags, "--index-topk", 40)
    with pytest.MonkeyPatch.context() as patch:
        if finished:
            builder.error = KeyboardInterrupt()
        else:
            interrupt_after(2, patch)
        assert deployed(tmp_path, *flags).code == 130
    builder.error = None
    before = contents(tmp_path)
    assert_refused(deployed(tmp_path, *other), 2, "another model, recipe or text", "--overwrite")
    assert contents(tmp_path) == before
    done = deployed(tmp_path, *other, "--overwrite")
    assert done.code == 0, done.err
    assert len(builder.sources) == 1
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_kept(
    builder: Builder, flags: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the user's: taken when it is this conversion's, and replaced under no circumstances."""
    keep = ("--keep-checkpoint", tmp_path / "dsa")
    builder.error = UserError("the builder gives up")
    assert_refused(deployed(tmp_path, *flags, *keep), 1, "the builder gives up")
    assert [path.name for path in tmp_path.iterdir()] == ["dsa"]
    builder.error = None
    no_conversion(monkeypatch)
    assert deployed(tmp_path, *flags, *keep).code == 0
    before = contents(tmp_path)
    for more in ((), ("--overwrite",)):
        done = deployed(tmp_path, *flags, *keep, "--index-topk", 40, *more)
        assert_refused(done, 2, tmp_path / "dsa", "another model, recipe or text")
    assert contents(tmp_path) == before


def test_a_checkpoint_that_was_changed_is_not_taken(
    builder: Builder, flags: tuple[object, ...], tmp_path: Path
) -> None:
    builder.error = UserError("the builder gives up")
    assert deployed(tmp_path, *flags, "--keep-checkpoint", tmp_path / "dsa").code == 1
    (tmp_path / "dsa" / "notes.txt").write_text("mine")
    done = deployed(tmp_path, *flags, "--keep-checkpoint", tmp_path / "dsa")
    assert_refused(done, 2, tmp_path / "dsa", "not empty")


@pytest.mark.parametrize("keep", ["out", "out/dsa", "."])
def test_a_checkpoint_and_an_engine_in_one_another(
    keep: str, builder: Builder, flags: tuple[object, ...], tmp_path: Path
) -> None:
    done = deployed(tmp_path, *flags, "--keep-checkpoint", tmp_path / keep)
    assert done.code == 2
    assert "same folder" in done.err or "inside one another" in done.err
    assert not list(tmp_path.iterdir())


def test_the_manifest_says_what_was_converted(tmp_path_factory: pytest.TempPathFactory) -> None:
    manifest = json.loads((small_conversion(tmp_path_factory) / "mla2dsa.json").read_text())
    assert len(manifest["fingerprint"]) == 64
