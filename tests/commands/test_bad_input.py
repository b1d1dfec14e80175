"""Everything that can be wrong with what `convert` is given: one line, exit code, source untouched, nothing left behind."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import contents, copier, dense_checkpoint, edit_config, shards, write_raw
from command_line import (
    LAYERS,
    SMALL_RECIPE,
    TINY,
    Done,
    assert_refused,
    mla2dsa,
    quick_capture,  # noqa: F401  (a fixture)
    small_conversion,
    small_flags,
    training_text,
)
from places import HELPERS
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("quick_capture")

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLAGS = ("--index-topk", 32, "--tokens", 1024)
NORM = "model.layers.0.self_attn.kv_a_layernorm.weight"


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return copier(tmp_path / "models", tmp_path_factory)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """The folder that the output goes into."""
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


def convert_in(room: Path, model: Path, *flags: object) -> Done:
    """Convert to room/dsa; whatever comes of it, the model's files are what they were."""
    before = contents(model)
    done = mla2dsa("convert", model, room / "dsa", *flags)
    assert contents(model) == before
    return done


def assert_nothing_left(room: Path) -> None:
    assert sorted(path.name for path in room.iterdir()) == []


# Files of the model


def truncate(folder: Path) -> None:
    file = folder / SINGLE
    os.truncate(file, file.stat().st_size - 10)


def lose_shard(folder: Path) -> None:
    shards(folder)[1].unlink()


def name_absent_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = shards(folder)[0].name
    (folder / INDEX).write_text(json.dumps(index))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    del tensors[NORM]
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def poison(value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        tensors[NORM][3] = value
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return damage


Damage = Callable[[Path], Any]
DAMAGES: dict[str, tuple[str, Damage, list[str]]] = {
    "truncated": ("single", truncate, [SINGLE, "truncated", "is cut off", "fetch the file again"]),
    "empty-file": ("single", lambda f: (f / SINGLE).write_bytes(b""), [SINGLE, "truncated (0 bytes"]),
    "corrupt-header": ("single", lambda f: write_raw(f / SINGLE, b"{not json"), [SINGLE, "corrupt header"]),
    "html": ("single", lambda f: (f / SINGLE).write_text("<html>" * 9), [SINGLE, "not a safetensors file"]),
    "lfs": ("single", lambda f: (f / SINGLE).write_text("version https://git-lfs"), [SINGLE, "git lfs pull"]),
    "no-weights": ("single", lambda f: (f / SINGLE).unlink(), ["no safetensors file found", SINGLE]),
    "shard-missing": ("sharded", lose_shard, ["model-00002-of-", "no such file", INDEX, "fetch the shard"]),
    "absent-tensor": ("sharded", name_absent_tensor, ["lacks model.layers.7.mlp.up_proj.weight", INDEX]),
    "no-index": ("sharded", lambda f: (f / INDEX).unlink(), [INDEX, "fetch the index"]),
    "index-not-json": ("sharded", lambda f: (f / INDEX).write_text("{"), [INDEX, "not valid JSON"]),
    "no-config": ("single", lambda f: (f / "config.json").unlink(), ["config.json: no such file"]),
    "config-not-json": ("single", lambda f: (f / "config.json").write_text("{"), ["config.json: not valid JSON"]),
    "unknown-model": (
        "single",
        lambda f: edit_config(f, {"model_type": "oracle9"}),
        ["oracle9", "not one transformers knows"],
    ),
    "config-of-strings": ("single", lambda f: edit_config(f, {"kv_lora_rank": "32"}), ["config.json", "kv_lora_rank"]),
    "negative-size": (
        "single",
        lambda f: edit_config(f, {"q_lora_rank": -48}),
        ["config.json", "DeepseekV3ForCausalLM"],
    ),
    "other-size": (
        "single",
        lambda f: edit_config(f, {"kv_lora_rank": 24}),
        ["tensors disagree with config.json", "kv_b_proj.weight is [128, 32]", "gives [128, 24]", "same revision"],
    ),
    "more-layers": ("single", lambda f: edit_config(f, {"num_hidden_layers": 4}), ["model.layers.3", "is missing"]),
    "tensor-missing": ("single", drop_tensor, [f"{NORM} is missing", "tensors disagree with config.json"]),
    "nan": ("single", poison(float("nan")), [SINGLE, f"{NORM} has 1 NaN or infinite values", "fetch the file again"]),
    "inf": ("single", poison(float("inf")), [SINGLE, f"{NORM} has 1 NaN or infinite values"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models(damage: str, copy: Callable[[str], Path], room: Path) -> None:
    kind, break_it, parts = DAMAGES[damage]
    model = copy(kind)
    break_it(model)
    assert_refused(convert_in(room, model, *FLAGS), 1, *parts)
    assert_nothing_left(room)


def test_weights_that_fit_are_converted(copy: Callable[[str], Path], room: Path) -> None:
    """What all damages above start from does convert: it is the damage that is refused."""
    assert convert_in(room, copy("single"), *FLAGS, "--skip-verification").code == 0
    assert [path.name for path in room.iterdir()] == ["dsa"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [("/no/such/folder", ["/no/such/folder: no such folder"]), ("a/b/c", ["a/b/c: no such folder"])],
    ids=["path", "neither"],
)
def test_model_that_is_not_there(name: str, parts: list[str], room: Path) -> None:
    assert_refused(mla2dsa("convert", name, room / "dsa", *FLAGS), 1, *parts)
    assert_nothing_left(room)


def test_model_that_is_a_file(room: Path) -> None:
    assert_refused(mla2dsa("convert", TINY / SINGLE, room / "dsa", *FLAGS), 1, SINGLE, "is a file")
    assert_nothing_left(room)


# Text


def write(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = folder / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return make


def empty_folder(folder: Path) -> Path:
    (folder / "texts").mkdir()
    (folder / "texts" / "README.md").write_text("These are no texts.")
    return folder / "texts"


TEXTS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "absent": (lambda folder: folder / "nowhere.txt", ["nowhere.txt", "no such file or folder of text"]),
    "empty": (write("t.txt", ""), ["t.txt", "no text in it", "give a text file"]),
    "blank": (write("t.txt", "\n \t\n"), ["t.txt", "no text in it"]),
    "empty-folder": (empty_folder, ["texts", "no text in it"]),
    "empty-jsonl": (write("t.jsonl", '{"text": ""}\n\n{"text": " "}\n'), ["t.jsonl", "no text in it"]),
    "jsonl-field": (write("t.jsonl", '{"text": "a"}\n{"body": "b"}\n'), ["t.jsonl: line 2", '"text"']),
    "jsonl-broken": (write("t.jsonl", '{"text": "a"\n'), ["t.jsonl: line 1", '"text"']),
    "binary": (write("t.txt", b"\x80\x81" * 50), ["t.txt", "not UTF-8 text", "byte 0"]),
    "shorter-than-topk": (write("t.txt", "def f(): pass\n" * 6), ["t.txt", "expected at least 102", "index_topk 32"]),
    "one-sequence": (write("t.txt", "x = 1\n" * 18), ["t.txt", "tokens", "three sequences", "give more text"]),
}


@pytest.mark.parametrize("text", TEXTS)
def test_unfit_text(text: str, tmp_path: Path, room: Path) -> None:
    make, parts = TEXTS[text]
    assert_refused(convert_in(room, TINY, *FLAGS, "--calibration", make(tmp_path)), 1, *parts)
    assert_nothing_left(room)


@pytest.mark.parametrize(
    ("length", "code", "parts"),
    [
        (33, 2, ["sequence_length 33", "at least 34", "context of 1024"]),
        (2000, 2, ["sequence_length 2000", "at most the context of 1024"]),
        (512, 1, ["three sequences of 512", "give more text"]),
    ],
)
def test_unfit_sequence_length(
    length: int, code: int, parts: list[str], tmp_path: Path, room: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = write("r.yaml", f"sequence_length: {length}")(tmp_path)
    text = training_text(tmp_path_factory, 2000)
    assert_refused(convert_in(room, TINY, *FLAGS, "--recipe", recipe, "--calibration", text), code, *parts)
    assert_nothing_left(room)


def test_model_without_a_tokenizer(copy: Callable[[str], Path], room: Path, tmp_path: Path) -> None:
    model, text = copy("single"), write("t.txt", "words")(tmp_path)
    (model / "tokenizer.json").unlink()
    assert_refused(convert_in(room, model, *FLAGS, "--calibration", text), 1, model, "no tokenizer")
    assert_nothing_left(room)


def test_tokenizer_of_another_model(copy: Callable[[str], Path], room: Path, tmp_path: Path) -> None:
    """The example's tokenizer knows 4096 tokens, this model 160."""
    model = copy("single")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, model / name)
    text = write("t.txt", "def function(argument): return argument\n" * 99)(tmp_path)
    done = convert_in(room, model, *FLAGS, "--calibration", text)
    assert_refused(done, 1, model, "tokenizer gives token", "vocab_size 160", "same revision")
    assert_nothing_left(room)


# What is in the way


def test_outputs_that_are_refused(copy: Callable[[str], Path], room: Path) -> None:
    model = copy("single")
    (room / "photos").mkdir()
    (room / "photos" / "cat.png").touch()
    (room / "file").touch()
    (room / "link").symlink_to(model)
    before = contents(room.parent)
    for out, flags, part in [
        (model, ["--overwrite"], "same folder"),
        (model / "dsa", [], "inside one another"),
        (room / "link" / "dsa", [], "inside one another"),
        (model.parent, ["--overwrite"], "inside one another"),
        (room / "photos", [], "not empty"),
        (room / "photos", ["--resume"], "not empty"),
        (room / "photos", ["--overwrite"], "holds no manifest of mla2dsa"),
        (room / "file", ["--overwrite"], "is a file"),
    ]:
        done = mla2dsa("convert", model, out, *FLAGS, *flags)
        assert_refused(done, 2, out.resolve(), part)
    assert contents(room.parent) == before
    assert {path.name for path in room.iterdir()} == {"photos", "file", "link"}


def test_parent_that_is_a_file(copy: Callable[[str], Path], room: Path) -> None:
    (room / "file").touch()
    done = mla2dsa("convert", copy("single"), room / "file" / "dsa", *FLAGS)
    assert_refused(done, 1, room / "file", "Not a directory")


# A disk that fills up


def raise_at(call: int, code: int) -> Callable[..., None]:
    """Does nothing, but raises from the `call`th time on."""
    count = 0

    def fake(*_: object) -> None:
        nonlocal count
        count += 1
        if count >= call:
            raise OSError(code, os.strerror(code))

    return fake


@pytest.mark.parametrize(
    ("call", "code", "layers", "parts"),
    [
        (1, errno.ENOSPC, 0, [".dsa.mla2dsa-layers: cannot be written"]),
        (2, errno.EDQUOT, 1, [".dsa.mla2dsa-layers: cannot be written", "--resume"]),
        (5, errno.ENOSPC, 3, ["dsa: not written, no space left on the disk"]),
    ],
    ids=["at-once", "second-layer", "checkpoint"],
)
def test_full_disk(
    call: int, code: int, layers: int, parts: list[str], copy: Callable[[str], Path], room: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three layers, then the checkpoint reach the disk: finished layers stay, to go on from."""
    model = copy("single")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raise_at(call, code))
        assert_refused(convert_in(room, model, *FLAGS, "--skip-verification"), 1, *parts)
    left = {path.name for path in room.rglob("*")}
    files = {f"model.layers.{n}.self_attn.safetensors" for n in range(layers)}
    assert left == ({".dsa.mla2dsa-layers", *files} if layers else set())
    done = convert_in(room, model, *FLAGS, "--skip-verification", "--resume")
    assert (done.code, done.err.count("kept from before")) == (0, layers)
    assert [path.name for path in room.iterdir()] == ["dsa"]


SMALL_DISK = """
    import os, sys
    from pathlib import Path
    from command_line import mla2dsa
    model = sys.argv[1]
    done = mla2dsa("convert", model, "small/dsa", "--index-topk", 32, "--tokens", 1024, "--skip-verification")
    print(done.code, done.err.splitlines()[-1], sorted(os.listdir("small")))
"""


def test_disk_that_is_really_full(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A file system of 400 KiB, where the checkpoint's files have to be copied to: seen before anything is written."""
    model = dense_checkpoint("single", tmp_path_factory)
    before = contents(model)
    mount = 'mkdir -p small && mount -t tmpfs -o size=400k none small && exec "$@"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    try:
        subprocess.run([*unshare, "true"], cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a mount of its own (unshare and user namespaces)")
    environment = {**os.environ, "PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-P", "-c", textwrap.dedent(SMALL_DISK), str(model)]
    done = subprocess.run([*unshare, *program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 mla2dsa: ")
    assert "bytes are needed there" in done.stdout
    assert "the model's weights, which cannot be linked from there), 409600 bytes are free" in done.stdout
    assert done.stdout.rstrip().endswith("[]")
    assert contents(model) == before


# An output that is there already


@pytest.fixture
def earlier(room: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """room/dsa holds a conversion; returns what its files are."""
    shutil.copytree(small_conversion(tmp_path_factory), room / "dsa")
    return contents(room / "dsa")


@pytest.mark.parametrize("how", ["bad-text", "bad-result", "full-disk"])
def test_failed_overwrite_leaves_the_earlier_output(
    how: str, room: Path, earlier: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    flags = [*small_flags(tmp_path_factory), "--overwrite", "--skip-transformers"]
    if how == "bad-text":
        flags += ["--calibration", write("t.txt", "")(tmp_path)]
    elif how == "bad-result":
        flags += ["--index-topk", 8]
    else:
        monkeypatch.setattr(os, "fsync", raise_at(6, errno.ENOSPC))
    done = convert_in(room, TINY, *flags)
    parts = {
        "bad-text": "no text in it",
        "bad-result": "verification failed: loss increase",
        "full-disk": "no space left",
    }
    assert_refused(done, 1, parts[how])
    assert contents(room / "dsa") == earlier
    assert {path.name for path in room.iterdir()} == {"dsa", *([".dsa.mla2dsa-layers"] if how != "bad-text" else [])}


def test_result_that_does_not_hold(room: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The layers are kept: with another limit, the conversion goes on where it failed."""
    flags = [*small_flags(tmp_path_factory), "--index-topk", 8, "--skip-transformers"]
    done = convert_in(room, TINY, *flags)
    assert_refused(done, 1, "verification failed: loss increase on text", "expected at most 0.05", "calibrate on more")
    assert [path.name for path in room.iterdir()] == [".dsa.mla2dsa-layers"]
    recipe = write("r.yaml", SMALL_RECIPE.replace("sequences", "max_loss_delta: 2.0, sequences"))(tmp_path)
    done = convert_in(room, TINY, *flags, "--recipe", recipe, "--resume")
    assert (done.code, done.err.count("kept from before")) == (0, len(LAYERS))
    assert [path.name for path in room.iterdir()] == ["dsa"]


def test_layer_that_is_read_only_later(copy: Callable[[str], Path], room: Path) -> None:
    """NaN in the second layer is found when the first is done: that one is kept, and looks like nothing finished."""
    model = copy("single")
    tensors = load_file(model / SINGLE)
    tensors[NORM.replace("layers.0", "layers.1")][3] = float("nan")
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    assert_refused(convert_in(room, model, *FLAGS), 1, "layers.1.self_attn.kv_a_layernorm.weight has 1 NaN")
    assert {path.name for path in room.rglob("*")} == {
        ".dsa.mla2dsa-layers",
        "model.layers.0.self_attn.safetensors",
    }
