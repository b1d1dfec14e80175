"""The index of tensors against the safetensors library, and one clear line for every bad state of files."""

import contextlib
import gc
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import KINDS, assert_one_line, copier, dense_checkpoint, shards, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mla2dsa.errors import UserError
from mla2dsa.files import safetensors_index
from mla2dsa.files.safetensors_index import INDEX_FILE, SINGLE_FILE, header_bytes, read_header, read_index
from mla2dsa.optimizer.model.checkpoint import Checkpoint

KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return copier(tmp_path, tmp_path_factory)


@pytest.mark.parametrize("kind", KINDS)
def test_index_is_what_safetensors_reads(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = dense_checkpoint(kind, tmp_path_factory)
    index = read_index(folder)
    names = set()
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        for name, tensor in load_file(file).items():
            names.add(name)
            place = index[name]
            assert (place.file, place.shape, place.dtype) == (file, tuple(tensor.shape), "BF16")
            assert raw[place.offset : place.offset + place.nbytes] == tensor.view(torch.uint8).numpy().tobytes()
    assert names == set(index)
    assert (len(shards(folder)) > 1) == ("sharded" in kind)


def test_single_file_wins_over_index(copy: Callable[[str], Path]) -> None:
    """transformers' order: with both present, the index and its shards are not looked at."""
    folder = copy("single")
    (folder / INDEX_FILE).write_text("not even JSON")
    assert {place.file.name for place in read_index(folder).values()} == {SINGLE_FILE}


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["F32", "BF16", "U8"]), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None)
def test_written_header_is_read_by_the_library(
    tmp_path_factory: pytest.TempPathFactory, layout: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    file = tmp_path_factory.mktemp("header") / "x.safetensors"
    sizes = {"F32": 4, "BF16": 2, "U8": 1}
    count = sum(torch.Size(shape).numel() * sizes[dtype] for dtype, shape in layout.values())
    file.write_bytes(header_bytes(layout, {"format": "pt"}) + bytes(count))
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not a mapping)
        assert {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()} == layout
    assert {name: (place.dtype, place.shape) for name, place in read_header(file).items()} == layout


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
TWICE = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
BAD_FILES = {
    "gap": ({**GOOD, "b": {"dtype": "U8", "shape": [4], "data_offsets": [9, 13]}}, bytes(13), "b at byte"),
    "overlap": ({**GOOD, "b": {"dtype": "U8", "shape": [4], "data_offsets": [6, 10]}}, bytes(10), "overlaps"),
    "cut": (GOOD, bytes(7), "a is cut off"),
    "tail": (GOOD, bytes(9), "1 bytes follow"),
    "nbytes": ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8), "needs 12"),
    "dtype": ({"a": {"dtype": "F12", "shape": [2], "data_offsets": [0, 8]}}, bytes(8), "dtype F12"),
    "negative": ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8), "entry of a"),
    "reversed": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8), "entry of a"),
    "no-offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "entry of a"),
    "list": ([1, 2], b"", "JSON object"),
    "no-json": (b'{"a": ', b"", "not valid JSON"),
    "no-utf8": (b"\xff\xfe{}", b"", "not valid JSON"),
    "twice": (TWICE, bytes(1), "names a twice"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_header_is_one_line(tmp_path: Path, fault: str) -> None:
    header, data, part = BAD_FILES[fault]
    write_raw(tmp_path / SINGLE_FILE, header, data)
    with pytest.raises(UserError) as error:
        read_index(tmp_path)
    assert_one_line(error, tmp_path / SINGLE_FILE, part)


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (b"", "truncated (0 bytes"),
        (b"\x07\x00", "truncated (2 bytes"),
        ((999).to_bytes(8, "little") + b"{}", "the header ends at 1007"),
        (b"\xff" * 16, "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    ],
    ids=["empty", "two-bytes", "header-beyond-end", "huge-header", "lfs-pointer"],
)
def test_bad_start_is_one_line(tmp_path: Path, start: bytes, part: str) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(start)
    with pytest.raises(UserError) as error:
        read_index(tmp_path)
    assert_one_line(error, tmp_path / SINGLE_FILE, part)


def test_every_truncation_is_found(copy: Callable[[str], Path]) -> None:
    file = copy("single") / SINGLE_FILE
    whole = file.read_bytes()
    for size in [0, 7, 8, 100, len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(UserError) as error:
            read_index(file.parent)
        assert_one_line(error, file, "truncated")


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def duplicate(folder: Path) -> None:
    """Put a tensor of the first shard into the last one too."""
    first, last = shards(folder)[0], shards(folder)[-1]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(last), name: tensor.clone()}, last, {"format": "pt"})


def fill(folder: Path, text: str) -> None:
    (folder / INDEX_FILE).write_text(text)


BETWEEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "shard-absent": (lambda f: shards(f)[1].unlink(), ["model-00002", "no such file", "fetch"]),
    "shard-cut": (lambda f: os.truncate(shards(f)[1], 3000), ["model-00002", "truncated"]),
    "index-names-absent": (lambda f: edit_index(f, lambda m: m.update(ghost=shards(f)[0].name)), ["lacks ghost"]),
    "index-forgets": (lambda f: edit_index(f, lambda m: m.pop(KV_A)), [f"holds {KV_A}", "absent from"]),
    "twice": (duplicate, ["again (first in", "model-00001"]),
    "index-leads-out": (lambda f: edit_index(f, lambda m: m.update(ghost="../x.safetensors")), ["../x.safetensors"]),
    "index-no-map": (lambda f: fill(f, '{"metadata": {}}'), [INDEX_FILE, "weight_map"]),
    "index-no-json": (lambda f: fill(f, "{"), [INDEX_FILE, "not valid JSON"]),
    "index-list": (lambda f: fill(f, "[]"), [INDEX_FILE, "found list"]),
    "index-gone": (lambda f: (f / INDEX_FILE).unlink(), ["model-00001", "neither", INDEX_FILE]),
}


@pytest.mark.parametrize("fault", BETWEEN)
def test_index_and_shards_disagree(copy: Callable[[str], Path], fault: str) -> None:
    damage, parts = BETWEEN[fault]
    folder = copy("sharded")
    damage(folder)
    with pytest.raises(UserError) as error:
        Checkpoint.open(folder)
    assert_one_line(error, folder, *parts)


@pytest.mark.parametrize(
    ("files", "part"), [([], "no safetensors file"), (["pytorch_model.bin"], "only pytorch_model.bin")]
)
def test_no_safetensors(tmp_path: Path, files: list[str], part: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        Checkpoint.open(tmp_path)
    assert_one_line(error, tmp_path, part)


def test_dangling_link_is_reported(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(UserError, match="a link to nowhere"):
        read_index(tmp_path)


def entry(shape: object = (0,), end: object = 0) -> bytes:
    return json.dumps({"dtype": "U8", "shape": shape, "data_offsets": [0, end]}).encode()


def many_names(count: int) -> bytes:
    """Ends with a name that is there already."""
    return b"{" + b",".join(b'"%d":%s' % (number % (count - 1), entry()) for number in range(count)) + b"}"


HOSTILE: dict[str, tuple[bytes, str]] = {
    "twice-at-the-end": (many_names(30_000), "names 0 twice"),
    "all-twice": (b"{" + b",".join([b'"a":%s' % entry()] * 20_000) + b"}", "names a twice"),
    "long-shape": (b'{"a":%s}' % entry([10**100] * 40_000), "corrupt header entry of a"),
    "huge-dims": (b'{"a":%s}' % entry([2**62] * 64), "needs a number of"),
    "dim-over-64-bits": (b'{"a":%s}' % entry([2**63, 0]), "corrupt header entry of a"),
    "huge-offset": (b'{"a":%s}' % entry([1], 10**4000), "takes a number of"),
    "deep-list": (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
    "deep-object": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
    "deep-within-recursion": (b'{"a":' * 300 + b"1" + b"}" * 300, "nested more than 64 deep"),
    "many-values": (b'{"a":[' + b"0," * 5_000_000 + b"0]}", "more than 4000000 values"),
    "digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', "not valid JSON"),
    "long-name": (b'{"%s":1}' % (b"n" * 100_000), "corrupt header entry of nnn"),
    "terminal-codes": (b'{"a\\n\\u001b[2J":1}', r"a\n\x1b[2J"),
    "half-a-character": (b'{"\\ud800":%s}' % entry(), r"corrupt header entry of \ud800"),
    "long-dtype": (b'{"a":{"dtype":"%s","shape":[1],"data_offsets":[0,1]}}' % (b"F" * 9999), "has dtype FFF"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_header_is_refused_at_once(tmp_path: Path, fault: str) -> None:
    """Linear in the file's size, and one short line however long what is wrong."""
    header, part = HOSTILE[fault]
    write_raw(tmp_path / SINGLE_FILE, header)
    gc.freeze()  # what the other tests left behind is not the reader's to collect
    started = time.process_time()
    with pytest.raises(UserError) as error:
        read_index(tmp_path)
    taken = time.process_time() - started
    gc.unfreeze()
    assert taken < 2
    assert_one_line(error, tmp_path / SINGLE_FILE, part)
    assert len(str(error.value)) < 400
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE, "model-00001-of-00002.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder"])
def test_only_regular_files_are_read(
    copy: Callable[[str], Path], kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO would wait for a writer for ever."""
    folder = copy("single" if name == SINGLE_FILE else "sharded")
    file = shards(folder)[0] if name.startswith("model-") else folder / name
    file.unlink()
    with contextlib.ExitStack() as stack:
        if kind == "socket":
            monkeypatch.chdir(folder)  # a socket's path may have about 100 characters
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(file.name)
        else:
            {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}[kind](file)
        with pytest.raises(UserError) as error:
            Checkpoint.open(folder)
    assert_one_line(error, file)


@pytest.mark.parametrize("shard", ["a\0b", "a\nb", "/etc/passwd", "..", "", "sub/x", "..\\x", "x" * 300, 3, None])
def test_shard_names_are_plain(copy: Callable[[str], Path], shard: object) -> None:
    folder = copy("sharded")
    edit_index(folder, lambda names: names.update({KV_A: shard}))  # type: ignore[dict-item]
    with pytest.raises(UserError) as error:
        Checkpoint.open(folder)
    assert_one_line(error, folder / INDEX_FILE, "expected a file name in the same folder")
    assert len(str(error.value)) < 400


def test_a_header_is_parsed_once_until_its_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, parsed = tmp_path / SINGLE_FILE, []
    parse = safetensors_index._parse_header
    monkeypatch.setattr(safetensors_index, "_parse_header", lambda file: parsed.append(file) or parse(file))
    write_raw(tmp_path / SINGLE_FILE, b'{"a":%s}' % entry())
    read_header(file), read_header(file)
    assert len(parsed) == 2  # too new: a change within a tick of the clock would go unseen
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 10**10)
    first = read_header(file)
    first.pop("a")  # the caller's own
    assert set(read_header(file)) == {"a"}
    assert len(parsed) == 3
    file.write_bytes(file.read_bytes().replace(b'"a"', b'"b"'))
    os.utime(file, ns=(10**9, 10**9))  # the two writes may be within one tick
    assert set(read_header(file)) == {"b"}
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        read_header(file)


@pytest.fixture
def two_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has been looked at, in files old enough to be remembered."""
    shards = {"a": "1.safetensors", "b": "2.safetensors"}
    for name, shard in shards.items():
        write_raw(tmp_path / shard, b'{"%s":%s}' % (name.encode(), entry()))
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": shards}))
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 10**10)
    read_index(tmp_path).pop("a")  # the caller's own
    return tmp_path


def test_a_folder_is_put_together_once(two_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_index, "_weight_map", lambda index: pytest.fail("read again"))
    assert list(read_index(two_shards)) == ["a", "b"]


def _renamed(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"b"', b'"c"'))
    os.utime(file, ns=(10**9, 10**9))  # the two writes may be within one tick


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: _renamed(folder / "2.safetensors"), "2.safetensors: lacks b"),
        (lambda folder: _renamed(folder / INDEX_FILE), "2.safetensors: lacks c"),
        (lambda folder: (folder / "2.safetensors").unlink(), "no such file, but .* says it holds b"),
        (lambda folder: (folder / INDEX_FILE).unlink(), f"neither {SINGLE_FILE} nor"),
        (lambda folder: (folder / SINGLE_FILE).write_bytes(b"12345678"), f"{SINGLE_FILE}: "),
    ],
    ids=["shard", "index", "shard gone", "index gone", "single file"],
)
def test_a_folder_that_changes_is_read_again(two_shards: Path, change: Callable[[Path], object], said: str) -> None:
    change(two_shards)
    with pytest.raises(UserError, match=said):
        read_index(two_shards)
