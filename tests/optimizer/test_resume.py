"""Interrupted conversions: Ctrl-C and kill -9 while calibrating and while proving, and going on from there."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
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
    start,
    stop_when,
)

from mla2dsa.errors import UserError
from mla2dsa.optimizer.indexer import layer_fit
from mla2dsa.optimizer.indexer.progress_store import ProgressStore

pytestmark = pytest.mark.usefixtures("quick_capture")


def looks_finished(folder: Path) -> list[Path]:
    """Folders that a runtime would load, or that carry our manifest."""
    return [path for name in ("config.json", "mla2dsa.json", "report.json") for path in folder.rglob(name)]


def layer_files(folder: Path) -> set[str]:
    return {path.name.removesuffix(".safetensors") for path in folder.glob("model.layers.*.safetensors")}


# Real processes, stopped from outside


@pytest.fixture
def stopped(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, signal.Signals], Done]]:
    """Runs a conversion to tmp_path/dsa and stops it at a stage."""
    processes: list[subprocess.Popen[str]] = []

    def first_layer() -> bool:
        return bool(layer_files(tmp_path / ".dsa.mla2dsa-layers"))

    def written() -> bool:
        return any(tmp_path.glob(".dsa.mla2dsa-work-*/in/config.unproven.json"))

    def run(stage: str, number: signal.Signals) -> Done:
        process = start("convert", TINY, tmp_path / "dsa", *small_flags(tmp_path_factory))
        processes.append(process)
        return stop_when(process, first_layer if stage == "calibrating" else written, number)

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        pytest.param("calibrating", signal.SIGINT, id="calibrating-ctrl-c"),
        pytest.param("calibrating", signal.SIGKILL, id="calibrating-kill-9"),
        pytest.param("proving", signal.SIGTERM, id="proving-term"),
        pytest.param("proving", signal.SIGKILL, id="proving-kill-9"),
    ],
)
def test_stopped_and_resumed(
    stage: str, number: signal.Signals, stopped: Callable[[str, signal.Signals], Done], tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, fitted: list[str],
) -> None:  # fmt: skip
    source, complete = contents(TINY), small_conversion(tmp_path_factory)
    fitted.clear()
    done = stopped(stage, number)
    kept = layer_files(tmp_path / ".dsa.mla2dsa-layers")
    assert done.out == ""
    if number != signal.SIGKILL:
        assert done.code == 128 + number
        expected = f"mla2dsa: interrupted; nothing was left half-written; {len(kept)} finished indexers are kept, pass --resume to go on"
        assert done.err.splitlines()[-1] == expected
        assert all(": captures " in line for line in done.err.splitlines()[:-1])
        assert [path.name for path in tmp_path.iterdir()] == [".dsa.mla2dsa-layers"]
    else:
        assert done.code == -signal.SIGKILL
        roles = {path.name.removeprefix(".dsa.mla2dsa-").partition("-")[0] for path in tmp_path.iterdir()}
        assert {"lock", "layers"} <= roles <= {"lock", "layers", "work"}
    assert kept == set(LAYERS) if stage == "proving" else kept
    assert not looks_finished(tmp_path)
    assert contents(TINY) == source
    refused = mla2dsa("convert", TINY, tmp_path / "dsa", *small_flags(tmp_path_factory))
    assert_refused(refused, 2, tmp_path / "dsa", "unfinished conversion", "--resume", "--overwrite")
    resumed = mla2dsa(
        "convert", TINY, tmp_path / "dsa", *small_flags(tmp_path_factory), "--resume", "--skip-transformers"
    )
    assert resumed.code == 0, resumed.err
    assert fitted == [layer for layer in LAYERS if layer not in kept]
    assert {line.partition(":")[0] for line in resumed.err.splitlines() if line.endswith("kept from before")} == kept
    assert contents(tmp_path / "dsa")[INDEXER_SHARD] == contents(complete)[INDEXER_SHARD]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "dsa", complete)]
    assert reports[0]["layers"] == reports[1]["layers"]
    assert [path.name for path in tmp_path.iterdir()] == ["dsa"]
    assert contents(TINY) == source


# The store, in this process


@pytest.fixture
def unfinished(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a conversion was interrupted when its third layer was done."""
    save = ProgressStore.save

    def interrupting(self: ProgressStore, result: Any) -> None:
        save(self, result)
        if len(self.layers()) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressStore, "save", interrupting)
        done = mla2dsa("convert", TINY, tmp_path / "dsa", *small_flags(tmp_path_factory))
    assert_refused(done, 130, "interrupted", "3 finished indexers are kept, pass --resume")
    assert layer_files(tmp_path / ".dsa.mla2dsa-layers") == set(LAYERS[:3])
    return tmp_path / "dsa"


@pytest.mark.parametrize("what", ["recipe", "topk", "text", "model"])
def test_another_conversion_is_not_resumed(
    what: str, unfinished: Path, tmp_path_factory: pytest.TempPathFactory, fitted: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    flags = [*small_flags(tmp_path_factory)]
    model = TINY
    if what == "recipe":
        (folder / "r.yaml").write_text(Path(str(flags[1])).read_text() + "seed: 1\n")
        flags += ["--recipe", folder / "r.yaml"]
    elif what == "topk":
        flags += ["--index-topk", 40]
    elif what == "text":
        text = Path(str(flags[5])).read_text()
        (folder / "t.txt").write_text(text[1000:] + text[:1000])
        flags += ["--calibration", folder / "t.txt"]
    else:
        model = Path(shutil.copytree(TINY, folder / "model"))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    before = contents(unfinished.parent)
    done = mla2dsa("convert", model, unfinished, *flags, "--resume")
    assert_refused(done, 2, unfinished, "another model, recipe or text", "--overwrite")
    assert contents(unfinished.parent) == before
    assert not fitted


def test_overwrite_starts_again(unfinished: Path, tmp_path_factory: pytest.TempPathFactory, fitted: list[str]) -> None:
    flags = [*small_flags(tmp_path_factory), "--index-topk", 40, "--skip-verification"]
    assert mla2dsa("convert", TINY, unfinished, *flags, "--overwrite").code == 0
    assert fitted == list(LAYERS)
    assert [path.name for path in unfinished.parent.iterdir()] == ["dsa"]


def test_dry_run_leaves_it_alone(unfinished: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before, flags = contents(unfinished.parent), small_flags(tmp_path_factory)
    assert_refused(mla2dsa("convert", TINY, unfinished, *flags, "--dry-run"), 2, unfinished, "--resume")
    assert mla2dsa("convert", TINY, unfinished, *flags, "--dry-run", "--resume").code == 0
    assert mla2dsa("convert", TINY, unfinished, *flags, "--dry-run", "--overwrite").code == 0
    assert contents(unfinished.parent) == before


def test_damaged_layer_file(unfinished: Path, tmp_path_factory: pytest.TempPathFactory, fitted: list[str]) -> None:
    """Only a disk or a person can damage one; removed, it is calibrated again."""
    file = unfinished.parent / ".dsa.mla2dsa-layers" / f"{LAYERS[1]}.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    flags = [*small_flags(tmp_path_factory), "--skip-verification", "--resume"]
    assert_refused(mla2dsa("convert", TINY, unfinished, *flags), 1, file, "damaged", "remove it")
    file.unlink()
    assert mla2dsa("convert", TINY, unfinished, *flags).code == 0
    assert fitted == [LAYERS[1], LAYERS[3]]
    assert contents(unfinished)[INDEXER_SHARD] == contents(small_conversion(tmp_path_factory))[INDEXER_SHARD]


def test_resume_without_anything_to_resume(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A script may always pass --resume. A run killed before its first layer has left nothing to ask about."""
    (tmp_path / ".dsa.mla2dsa-layers").mkdir()
    flags = [*small_flags(tmp_path_factory), "--skip-verification"]
    assert mla2dsa("convert", TINY, tmp_path / "dsa", *flags, "--dry-run").code == 0
    assert mla2dsa("convert", TINY, tmp_path / "dsa", *flags, "--resume").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dsa"]


def test_failure_before_the_first_layer_leaves_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("does not converge")

    monkeypatch.setattr(layer_fit, "closed_form", fail)
    done = mla2dsa("convert", TINY, tmp_path / "dsa", *small_flags(tmp_path_factory))
    assert_refused(done, 1, f"{LAYERS[0]}: does not converge")
    assert not list(tmp_path.iterdir())
