"""A `.pt2` from anywhere: nothing in it is ever run, and what is refused is told in one line before torch sees it."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, mla2dsa, small_conversion
from torch.export import Dim

from mla2dsa.errors import UserError
from mla2dsa.runtime.pt2_archive import load_pt2
from mla2dsa.runtime.pt2_graph import checked_graph

Entries = dict[str, bytes]
GRAPH, SAMPLES = "model/models/model.json", "model/data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = (f"model/data/{name}/model_{name}_config.json" for name in ("weights", "constants"))
ANYTHING: dict[str, Any] = {}  # a manifest that knows no digest


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


class Small(torch.nn.Module):
    """A parameter, a buffer that is saved and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        self.register_buffer("bias", torch.tensor([0.5, 1.5, 2.5]))
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight.T + self.bias).view(x.shape[0] * 3) * self.scale


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `export --format pt2` saves a program: without sample inputs."""
    program = torch.export.export(Small(), (torch.randn(2, 4),), dynamic_shapes=({0: Dim("rows", min=1, max=9)},))
    program._example_inputs = None
    file = tmp_path_factory.mktemp("pt2") / "model.pt2"
    torch.export.save(program, file)
    return file


def entries_of(file: Path) -> Entries:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(file: Path, entries: Entries, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file


def document(edit: Callable[[Any, str], object], name: str = GRAPH) -> Callable[[Entries, Path], object]:
    """An edit of one of the archive's JSON files; it is given Python that would leave a mark."""

    def change(entries: Entries, mark: Path) -> None:
        content = json.loads(entries[name])
        edit(content, f"__import__('os').mkdir('{mark}')")
        entries[name] = json.dumps(content).encode()

    return change


def payload(name: str, save: Callable[[Any], bytes]) -> Callable[[Entries, Path], object]:
    return lambda entries, mark: entries.update({name: save(Payload(mark))})


def torch_saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def graph_of(content: Any) -> Any:
    return content["graph_module"]["graph"]


def size(content: Any) -> Any:
    return next(iter(graph_of(content)["sym_int_values"].values()))["as_expr"]


def signature(content: Any) -> Any:
    return content["graph_module"]["module_call_graph"][0]["signature"]


def first(content: Any) -> Any:
    return next(iter(content["config"].values()))


def legacy(entries: Entries, mark: Path) -> None:
    """What torch 2.7 wrote, which torch.export.load still unpickles when it cannot read the rest."""
    entries.clear()
    entries.update({"version": b"8.1", "serialized_state_dict.pt": torch_saved(Payload(mark))})


Change = Callable[[Entries, Path], object]
CODE: dict[str, tuple[Change, str]] = {
    "pickled-weight": (
        lambda entries, mark: (
            payload("model/data/weights/weight_0", torch_saved)(entries, mark),
            document(lambda it, _: first(it).update(use_pickle=True), WEIGHTS)(entries, mark),
        ),
        "is a pickle",
    ),
    "pickled-constant": (
        lambda entries, mark: (
            payload("model/data/constants/tensor_0", torch_saved)(entries, mark),
            document(lambda it, _: first(it).update(use_pickle=True), CONSTANTS)(entries, mark),
        ),
        "is a pickle",
    ),
    "opaque-constant": (payload("model/data/constants/opaque_obj_0", pickle.dumps), "holds model/data/constants/opaque"),
    "script-object": (payload("model/data/constants/custom_obj_0", pickle.dumps), "holds model/data/constants/custom"),
    "old-weights": (payload("model/data/weights/model.pt", torch_saved), "holds model/data/weights/model.pt"),
    "old-constants": (payload("model/data/constants/model.pt", torch_saved), "holds model/data/constants/model.pt"),
    "old-archive": (legacy, "holds version"),
    "sample-inputs": (payload(SAMPLES, torch_saved), "it is a pickle"),
    "native-library": (payload("model/data/aotinductor/model/x.so", pickle.dumps), "holds model/data/aotinductor"),
    "extra-file": (payload("model/extra/x.pkl", pickle.dumps), "holds model/extra/x.pkl"),
    "size": (document(lambda it, code: size(it).update(expr_str=code)), "expr_str __import__"),
    "size-of-sizes": (document(lambda it, _: size(it).update(expr_str="9**9**9**9")), "expr_str 9**9"),
    "size-method": (document(lambda it, _: size(it).update(expr_str="Symbol('s0').subs(1,2)")), "expr_str Symbol"),
    "input-name": (
        document(lambda it, code: graph_of(it)["inputs"][0]["as_tensor"].update(name=f"x={code}")),
        "name x=__import__",
    ),
    "guard": (document(lambda it, code: it["guards_code"].append(code)), "guards_code __import__"),
    "shell-op": (document(lambda it, _: graph_of(it)["nodes"][0].update(target="torch.os.system")), "torch.os.system"),
    "library-op": (document(lambda it, _: graph_of(it)["nodes"][0].update(target="torch.ops.load_library")), "load_lib"),
    "file-op": (
        document(lambda it, _: graph_of(it)["nodes"][0].update(target="torch.ops.aten.from_file.default")),
        "target torch.ops.aten.from_file",
    ),
    "tree-of-classes": (
        document(lambda it, _: signature(it).update(out_spec='[1, {"type": "a.B", "context": "1", "children_spec": []}]')),
        "out_spec [1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CODE)
def test_nothing_in_an_archive_is_run(kind: str, exported: Path, tmp_path: Path) -> None:
    change, part = CODE[kind]
    entries, mark = entries_of(exported), tmp_path / "mark"
    change(entries, mark)
    with pytest.raises(UserError) as error:
        load_pt2(pack(tmp_path / "model.pt2", entries), ANYTHING)
    assert not mark.exists()
    assert part in str(error.value)
    assert len(str(error.value)) < 400
    assert str(error.value).isprintable()


def test_the_payload_would_run(exported: Path, tmp_path: Path) -> None:
    """What the cases above rest on: torch.export.load does run it."""
    entries, mark = entries_of(exported), tmp_path / "mark"
    payload(SAMPLES, torch_saved)(entries, mark)
    with pytest.raises(Exception):  # noqa: B017, PT011  a folder is no sample input
        torch.export.load(pack(tmp_path / "model.pt2", entries))
    assert mark.exists()


def rename_all(entries: Entries, root: str) -> None:
    renamed = {name.replace("model/", root, 1): content for name, content in entries.items()}
    entries.clear()
    entries.update(renamed)


ODD: dict[str, tuple[Change, str]] = {
    "no-graph": (lambda it, _: it.pop(GRAPH), "has no models/model.json"),
    "no-weights": (lambda it, _: it.pop(WEIGHTS), "has no data/weights/model_weights_config.json"),
    "no-record": (lambda it, _: it.pop("model/data/weights/weight_0"), "lies in weight_0"),
    "empty": (lambda it, _: it.clear(), "an archive of 0 entries"),
    "outside": (lambda it, _: it.update({"../x": b""}), "holds ../x"),
    "no-root": (lambda it, _: rename_all(it, ""), "holds"),
    "another-version": (lambda it, _: it.update({"model/archive_version": b"9"}), "archive_version is not 0"),
    "schema": (document(lambda it, _: it["schema_version"].update(major=7)), "a program of version"),
    "deep": (lambda it, _: it.update({GRAPH: b"[" * 100_000}), "nested too deeply"),
    "huge": (
        document(lambda it, _: first(it)["tensor_meta"].update(sizes=[{"as_int": 2**40}]), WEIGHTS),
        "is larger than its bytes",
    ),
    "negative": (document(lambda it, _: first(it)["tensor_meta"].update(sizes=[{"as_int": -1}]), WEIGHTS), "has the size"),
    "other-device": (
        document(lambda it, _: first(it)["tensor_meta"].update(device={"type": "cuda", "index": 0}), WEIGHTS),
        "is not on the CPU",
    ),
    "no-such-op": (
        document(lambda it, _: graph_of(it)["nodes"][0].update(target="torch.ops.aten.nosuch.default")),
        "cannot load it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_an_archive_of_another_make_is_refused(kind: str, exported: Path, tmp_path: Path) -> None:
    change, part = ODD[kind]
    entries = entries_of(exported)
    change(entries, tmp_path)
    with pytest.raises(UserError) as error:
        load_pt2(pack(tmp_path / "model.pt2", entries), ANYTHING)
    assert part in str(error.value)
    assert len(str(error.value)) < 400


def test_compressed_entries_are_refused(exported: Path, tmp_path: Path) -> None:
    """torch stores them as they are; a kilobyte that unpacks to a terabyte is no export."""
    file = pack(tmp_path / "model.pt2", entries_of(exported), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed or encrypted"):
        load_pt2(file, ANYTHING)


def test_overlapping_entries_are_refused(exported: Path, tmp_path: Path) -> None:
    """Many names for the same bytes take more memory than the file has."""
    entries = entries_of(exported) | {f"model/data/weights/weight_{n}": bytes(5000) for n in range(1, 4)}
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        large = archive.getinfo("model/data/weights/weight_1")
        for number in range(4, 40):
            again = zipfile.ZipInfo(f"model/data/weights/weight_{number}")
            again.header_offset, again.CRC = large.header_offset, large.CRC
            again.file_size = again.compress_size = 5000
            archive.filelist.append(again)
    with pytest.raises(UserError, match="its entries overlap"):
        load_pt2(tmp_path / "model.pt2", ANYTHING)


def test_a_changed_byte_is_found(exported: Path, tmp_path: Path) -> None:
    weights = entries_of(exported)["model/data/weights/weight_0"]
    data = bytearray(exported.read_bytes())
    data[data.index(weights) + 5] ^= 1
    (tmp_path / "model.pt2").write_bytes(data)
    with pytest.raises(UserError, match="Bad CRC-32"):
        load_pt2(tmp_path / "model.pt2", ANYTHING)


def test_what_is_loaded_is_what_torch_saved(exported: Path) -> None:
    x, model = torch.randn(2, 4), Small()
    program = load_pt2(exported, ANYTHING)
    assert torch.equal(program.module()(x), model(x))
    assert torch.equal(program.module()(x), torch.export.load(exported).module()(x))
    assert {name: value.dtype for name, value in program.state_dict.items()} == {
        "weight": torch.float32,
        "bias": torch.float32,
    }


def test_arithmetic_on_sizes_is_taken() -> None:
    texts = [
        "Symbol('s43', positive=True, integer=True)",
        "Mul(Integer(192), Symbol('s53', integer=True))",
        "s0//2 + 1",
    ]
    content = {"graph_module": {"graph": {"nodes": []}}, "sizes": [{"expr_str": text} for text in texts]}
    assert checked_graph(content, "x") == content


def test_generate_refuses_a_foreign_archive(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """By its digest first, and where that is forged or absent by what is in it."""
    folder = tmp_path / "out"
    assert mla2dsa("export", small_conversion(tmp_path_factory), folder, "--format", "pt2", "--max-seq", 128).code == 0
    command = ("generate", folder, "def main():", "--max-new-tokens", 1)
    assert mla2dsa(*command).code == 0
    entries, mark = entries_of(folder / "model.pt2"), tmp_path / "mark"
    payload(SAMPLES, torch_saved)(entries, mark)
    pack(folder / "model.pt2", entries)
    assert_refused(mla2dsa(*command), 1, folder / "model.pt2", "its digest differs", "export again")
    manifest = json.loads((folder / "mla2dsa-export.json").read_text())
    del manifest["digest"]
    (folder / "mla2dsa-export.json").write_text(json.dumps(manifest))
    assert_refused(mla2dsa(*command), 1, folder / "model.pt2", "unlike any .pt2 that mla2dsa exports", "export again")
    assert not mark.exists()
