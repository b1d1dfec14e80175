"""What would fail after hours is found before any work, all of it in one message, without loading torch."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import contents, copier, edit_config
from command_line import Done, assert_refused, mla2dsa
from places import HELPERS, TINY

from mla2dsa.errors import SeveralErrors, UsageError, UserError
from mla2dsa.exporters.engine.cache import ENGINE, LAYERS
from mla2dsa.exporters.onnx_model.external_data import DATA_FILE
from mla2dsa.files.manifests.engine_manifest import ENGINE_FILES
from mla2dsa.files.manifests.export_manifest import EXPORT_FILES
from mla2dsa.files.safetensors_index import read_index
from mla2dsa.optimizer.before.findings import Findings
from mla2dsa.optimizer.before.space import Needs
from mla2dsa.optimizer.indexer.sizes import size_faults
from mla2dsa.optimizer.recipe import Recipe

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return copier(tmp_path / "models", tmp_path_factory)


def rename_shard(folder: Path, name: str) -> Path:
    """The weights of a single-file checkpoint under another name."""
    names = read_index(folder)
    (folder / "model.safetensors").rename(folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    return folder


def assert_listed(done: Done, code: int, *findings: tuple[object, ...]) -> None:
    """A line that counts, then a line for each finding, in any order, that names all its parts."""
    first, *lines = done.err.splitlines()
    assert first == f"mla2dsa: {len(findings)} things to mend before this can start:", done.err
    assert len(lines) == len(findings)
    for parts in findings:
        assert any(all(str(part) in line for part in parts) for line in lines), (parts, lines)
    assert (done.code, done.out) == (code, "")


# All at once


def test_everything_is_told_at_once(copy: Callable[[str], Path], tmp_path: Path) -> None:
    model = rename_shard(copy("single"), "model-indexer.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").touch()
    flags = ("--index-topk", 255, "--index-head-dim", 8, "--calibration", tmp_path / "no.txt")
    done = mla2dsa("convert", model, out, *flags)
    assert_listed(
        done, 2, (out, "not empty"), (tmp_path / "no.txt", "no such file or folder of text"),
        ("index_topk 255", "at most 254"), ("index_head_dim 8", "at least 18"),
        (model / "model-indexer.safetensors", "rename it"),
    )  # fmt: skip
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_recipe_that_cannot_be_read_hides_nothing(tmp_path: Path) -> None:
    done = mla2dsa(
        "convert", TINY, tmp_path / "o", "--recipe", tmp_path / "no.yaml", "--calibration", tmp_path / "no.txt"
    )
    assert_listed(done, 2, (tmp_path / "no.yaml", "recipe cannot be read"), (tmp_path / "no.txt", "no such file"))


@pytest.mark.parametrize("command", ["convert", "export", "build", "deploy"])
def test_every_command_that_writes(command: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    done = mla2dsa(command, tmp_path / "a" / "b" / "no", tmp_path / "out")
    assert_listed(done, 2, ("no such folder", "hub id"), (tmp_path / "out", "not empty"))


def test_verify_and_strip_and_generate(tmp_path: Path) -> None:
    no = tmp_path / "no"
    done = mla2dsa("verify", no, tmp_path / "neither", "--text", tmp_path / "no.txt")
    assert_listed(done, 1, (no, "no such folder"), (tmp_path / "neither", "no such folder"), ("no.txt", "no such file"))
    (tmp_path / "file").touch()
    assert_listed(mla2dsa("strip", no, tmp_path / "file"), 2, (no, "no such folder"), (tmp_path / "file", "is a file"))
    assert_refused(mla2dsa("generate", no, "x"), 1, no, "no such folder")


@pytest.mark.parametrize(("worst", "code"), [(UserError, 1), (UsageError, 2)], ids=["wrong-files", "wrong-usage"])
def test_the_exit_code_is_that_of_the_worst(worst: type[UserError], code: int) -> None:
    found = Findings()
    for error in (UserError("one"), worst("two"), UserError("one")):
        found.add(error)
    with pytest.raises(SeveralErrors) as raised, found:
        pass
    assert (raised.value.exit_code, raised.value.lines[1:]) == (code, ["  one", "  two"])


# What the user names


@pytest.mark.parametrize("kind", ["fifo", "fifo-in-a-folder", "dangling"])
def test_text_that_is_no_file(kind: str, tmp_path: Path) -> None:
    text = tmp_path / "texts"
    text.mkdir()
    (text / "a.txt").write_text("a")
    if kind == "dangling":
        (text / "b.txt").symlink_to("gone")
    else:
        os.mkfifo(text / "b.txt")
    named = text / "b.txt" if kind == "fifo" else text
    done = mla2dsa("convert", TINY, tmp_path / "out", "--index-topk", 32, "--calibration", named)
    assert_refused(done, 1, text / "b.txt", "neither a file nor a folder of files")


@pytest.mark.parametrize("donor", ["/no/such/donor", "a/b/c"])
def test_a_donor_that_is_not_there(donor: str, tmp_path: Path) -> None:
    done = mla2dsa("convert", TINY, tmp_path / "out", "--index-topk", 32, "--indexer", f"donor:{donor}")
    assert_refused(done, 1, donor, "no such folder")


# Sizes


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--index-topk", 1023), ("index_topk 1023", "context of 1024", "at most 1022")),
        ((), ("index_topk 2048", "context of 1024")),
        (("--index-topk", 32, "--index-head-dim", 17), ("index_head_dim 17", "at least 18")),
        (("--index-topk", 32, "--recipe", "{recipe}"), ("sequence_length 33", "at least 34")),
        (("--index-topk", 32, "--index-n-heads", 65537), ("index_n_heads 65537", "at most 65536", "--index-n-heads")),
        (
            ("--index-topk", 32, "--index-head-dim", 65537),
            ("index_head_dim 65537", "at most 65536", "--index-head-dim"),
        ),
    ],
    ids=["topk", "default-topk", "head-dim", "sequence-length", "too-many-heads", "too-wide"],
)
def test_sizes_that_do_not_fit(flags: tuple[Any, ...], parts: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("sequence_length: 33\n")
    flags = tuple(tmp_path / "r.yaml" if flag == "{recipe}" else flag for flag in flags)
    assert_refused(mla2dsa("plan", TINY, *flags), 2, *parts)
    assert_refused(mla2dsa("convert", TINY, tmp_path / "out", *flags), 2, *parts)


@pytest.mark.parametrize(("context", "fits"), [(0, False), (2, False), (3, True)], ids=str)
def test_a_context_with_room_for_nothing_is_the_models_fault(context: int, fits: bool) -> None:
    faults = size_faults(Recipe(index_topk=1), {"num_attention_heads": 4}, context)
    assert [("max_position_embeddings" in fault, "at most" in fault) for fault in faults] == [(True, False)] * (
        not fits
    )


def cpu_seconds(arguments: Sequence[str], folder: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_a_wrong_size_is_answered_at_once(command: str, tmp_path: Path) -> None:
    """CPU time, not wall time, which depends on the neighbours, beside what --help takes; and no library that takes long to load."""
    out = [] if command == "plan" else [str(tmp_path / "out")]
    run = ["-X", "importtime", "-P", "-m", "mla2dsa"]
    wrong = [*run, command, str(TINY), *out, "--index-topk", "9999"]
    helped, (took, done) = cpu_seconds([*run, "--help"], tmp_path)[0], cpu_seconds(wrong, tmp_path)
    assert done.returncode == 2
    assert "mla2dsa: index_topk 9999 leaves nothing sparse" in done.stderr
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "pydantic" in loaded, "-X importtime was not read correctly"
    assert not loaded & {"torch", "numpy", "transformers", "triton", "onnx", "safetensors", "huggingface_hub"}
    assert took < 6 * helped  # 3 where this was written; importing torch alone takes 10


# Names that collide


@pytest.mark.parametrize(
    "name",
    [
        "model-indexer.safetensors",
        "model-dense.safetensors",
        "report.json",
        "report.html",
        "mla2dsa-recipe.yaml",
        "mla2dsa.json",
    ],
)
def test_weights_of_a_name_that_is_ours(name: str, copy: Callable[[str], Path], tmp_path: Path) -> None:
    model = rename_shard(copy("single"), name)
    done = mla2dsa("convert", model, tmp_path / "out", "--index-topk", 32)
    assert_refused(done, 1, model / name, "needs the name", "rename it")


@pytest.mark.parametrize("name", ["model.onnx", "model.data", "mla2dsa-export.json"])
def test_shards_that_an_export_would_write_over(name: str, copy: Callable[[str], Path], tmp_path: Path) -> None:
    model = rename_shard(copy("single"), name)
    edit_config(model, {"model_type": "deepseek_v32", "index_topk": 16})
    before = contents(model)
    done = mla2dsa("export", model, tmp_path / "out")
    assert_refused(done, 1, model / name, "needs the name", "rename it")
    assert contents(model) == before


def test_the_names_are_those_that_are_written() -> None:
    assert {DATA_FILE, "model.onnx", "model.pt2"} < EXPORT_FILES
    assert {ENGINE, LAYERS, "libmla2dsa_trt.so"} < ENGINE_FILES


# The place


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = mla2dsa("convert", TINY, tmp_path / "file" / "deep" / "out", "--index-topk", 32)
    assert_refused(done, 1, tmp_path / "file", "Not a directory")


def test_a_name_that_leaves_no_room_for_hidden_folders(tmp_path: Path) -> None:
    done = mla2dsa("convert", TINY, tmp_path / ("x" * 250), "--index-topk", 32)
    assert_refused(done, 2, "its name is too long", "shorten it")


MOUNTS = """
    import sys
    from command_line import mla2dsa
    done = mla2dsa(*sys.argv[1:])
    print(done.code, done.err.splitlines()[-1])
"""
MOUNT = 'mkdir -p m && mount -t tmpfs -o {} none m && exec "$@"'
IN_A_MOUNT = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh"]


def run_with_mount(options: str, tmp_path: Path, *arguments: object) -> str:
    """What `mla2dsa ARGUMENTS` prints where the folder m is a file system of its own."""
    unshare = [part.format(options) for part in IN_A_MOUNT]
    try:
        subprocess.run([*unshare, "true"], cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a mount of its own (unshare and user namespaces)")
    environment = {**os.environ, "PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-P", "-c", "\n".join(line[4:] for line in MOUNTS.splitlines()), *map(str, arguments)]
    done = subprocess.run([*unshare, *program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("options", "out", "code", "part"),
    [
        ("size=64m", "m", 2, "is where a disk is mounted, which cannot be replaced; choose a folder in it"),
        ("ro", "m/out", 1, "cannot be written to (Read-only file system)"),
        ("size=1m", "m/out", 1, "the model's weights, which cannot be linked from there), 1.0 MiB are free"),
        ("nr_inodes=1", "m/out", 1, "cannot be written to (No space left on device)"),
    ],
    ids=["mount-point", "read-only", "no-room", "no-inode"],
)
def test_file_systems(options: str, out: str, code: int, part: str, tmp_path: Path) -> None:
    printed = run_with_mount(options, tmp_path, "convert", TINY, out, "--index-topk", 32)
    assert printed.startswith(f"{code} mla2dsa: ")
    assert part in printed


# Room


def test_room_is_summed_by_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    needs = Needs()
    needs.add(tmp_path / "a" / "b", 60, "this")
    needs.add(tmp_path, 40, "that")
    assert needs.faults() == []
    needs.add(tmp_path / "c", 2**20, "more")
    (fault,) = needs.faults()
    assert "1.0 MiB are needed there (60 bytes this, 40 bytes that, 1.0 MiB more), 100 bytes are free" in fault


def test_links_take_no_room(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"w" * 50)
    needs = Needs()
    needs.links(tmp_path / "out", [tmp_path / "weights.safetensors"], "weights")
    assert needs == Needs()
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize(
    ("command", "flags", "parts"),
    [
        ("convert", ("--index-topk", 32), ("indexers", "finished layers")),
        ("deploy", ("--index-topk", 32), ("indexers", "finished layers", "the engine")),
        ("export", ("--format", "pt2"), ("all weights",)),
        ("export", ("--copy-weights",), ("all weights",)),
    ],
    ids=["convert", "deploy", "pt2", "copy-weights"],
)
def test_what_needs_room(
    command: str, flags: tuple[Any, ...], parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    assert_refused(
        mla2dsa(command, TINY, tmp_path / "out", *flags), 1, tmp_path, "are needed there", *parts, "10 bytes are free"
    )
    assert not (tmp_path / "out").exists()
