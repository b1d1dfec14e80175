"""Generation from exported folders in onnxruntime: the same text as torch, and refusals that name what is wrong."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import captured_once, mla2dsa, small_conversion  # noqa: F401  (a fixture)
from dsa_checkpoints import NAMES, dsa_checkpoint

from mla2dsa.errors import UserError
from mla2dsa.files.manifests.export_manifest import EXPORT_MANIFEST
from mla2dsa.optimizer.export import export
from mla2dsa.optimizer.model.cached_model import open_torch_session
from mla2dsa.runtime import caches, generation
from mla2dsa.runtime.generation import Sampling, Session, generate
from mla2dsa.runtime.ort_session import OrtSession
from mla2dsa.runtime.torch_session import open_pt2_session

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(DSA checkpoint, its float32 export for batches of up to 3): the example, and a mixture of experts."""
    checkpoint = dsa_checkpoint(request.param, tmp_path_factory)
    folder = tmp_path_factory.mktemp("onnx") / request.param
    return checkpoint, export(checkpoint, folder, max_batch=3, max_seq=256).folder


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(1, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def texts(session: Session, prompts: list[list[int]], count: int) -> list[list[int | None]]:
    steps = list(generate(session, prompts, count, Sampling()))
    return [[step[row] for step in steps] for row in range(len(prompts))]


@functools.cache
def torch_text(checkpoint: Path, seed: int, length: int, count: int) -> list[int | None]:
    return texts(open_torch_session(checkpoint, batch=1, capacity=256), [prompt(length, seed)], count)[0]


def test_greedy_text_is_that_of_torch(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """128 tokens, with a cache that has to grow several times on the way."""
    checkpoint, folder = pair
    monkeypatch.setattr(caches, "FIRST_CAPACITY", 16)
    session = OrtSession(folder, batch=1, threads=1)
    assert texts(session, [prompt(70, 0)], 128) == [torch_text(checkpoint, 0, 70, 128)]


@pytest.mark.parametrize("pair", ["moe"], indirect=True)
def test_a_ragged_batch_in_chunks(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, folder = pair
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 16)
    sizes = (45, 3, 20)
    got = texts(OrtSession(folder, batch=3, threads=1), [prompt(size, size) for size in sizes], 12)
    assert got == [torch_text(checkpoint, size, size, 12) for size in sizes]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 4}, "batch 4 is over the maximum of 3"),
        ({"batch": 1, "capacity": 257}, "cache of 257 tokens is over the maximum of 256"),
    ],
    ids=["batch", "capacity"],
)
def test_limits(pair: tuple[Path, Path], values: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OrtSession(pair[1], **values)


@pytest.fixture
def copied(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """An export whose files may be spoilt."""
    return Path(shutil.copytree(pair[1], tmp_path / "copy"))


def weight_file(folder: Path) -> Path:
    return folder / json.loads((folder / EXPORT_MANIFEST).read_text())["weights"]["linked_files"][0]


def test_a_missing_weight_file(copied: Path) -> None:
    weight_file(copied).unlink()
    with pytest.raises(UserError, match=r"safetensors: missing, and the model's weights are in it"):
        OrtSession(copied, batch=1)


def test_another_checkpoint_under_the_graph(copied: Path) -> None:
    content = bytearray(weight_file(copied).read_bytes())
    content[-1] ^= 1
    weight_file(copied).write_bytes(content)
    with pytest.raises(UserError, match=r"not the file this model was exported from"):
        OrtSession(copied, batch=1)


def test_a_dtype_onnxruntime_lacks(copied: Path) -> None:
    text = (copied / EXPORT_MANIFEST).read_text()
    (copied / EXPORT_MANIFEST).write_text(text.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    with pytest.raises(UserError, match=r"exported as bfloat16, which onnxruntime cannot run"):
        OrtSession(copied, batch=1)


def test_a_folder_that_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an exported folder"):
        OrtSession(tmp_path, batch=1)


@pytest.mark.parametrize("pair", ["tiny-mla"], indirect=True)
def test_pt2_generates_the_same_text(pair: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, _ = pair
    folder = export(checkpoint, tmp_path / "pt2", format="pt2", max_seq=256).folder
    assert texts(open_pt2_session(folder, batch=1), [prompt(70, 0)], 128) == [torch_text(checkpoint, 0, 70, 128)]
    with pytest.raises(UserError, match="batch 2 is over the maximum of 1"):
        open_pt2_session(folder, batch=2)
    with pytest.raises(UserError, match="holds a pt2 export, this runtime takes onnx; pass --runtime torch"):
        OrtSession(folder, batch=1)
    file = folder / "model.pt2"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model.pt2: not the model that was exported .*; export again"):
        open_pt2_session(folder, batch=1)
    file.unlink()
    with pytest.raises(UserError, match=r"model.pt2: missing; export again"):
        open_pt2_session(folder, batch=1)


def test_export_generate_and_inspect_from_the_command_line(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    checkpoint, out = small_conversion(tmp_path_factory), tmp_path / "onnx"
    done = mla2dsa("export", checkpoint, out, "--max-seq", 128)
    assert (done.code, done.err) == (0, "")
    assert "MB of weights used in place" in done.out
    by_torch = mla2dsa("generate", checkpoint, "import ", "--max-new-tokens", 10).out
    assert mla2dsa("generate", out, "import ", "--max-new-tokens", 10).out == by_torch
    assert mla2dsa("export", checkpoint, tmp_path / "pt2", "--format", "pt2", "--max-seq", 128).code == 0
    assert mla2dsa("generate", tmp_path / "pt2", "import ", "--max-new-tokens", 10).out == by_torch
    found = mla2dsa("inspect", out, "--json").json()
    assert (found["kind"], found["layers"], found["graph"]["missing_files"]) == ("export", 4, [])
    assert found["graph"]["dsa_ops"]["mla2dsa.SparseMLA"] == 4
    too_long = mla2dsa("generate", out, "import " * 200)
    assert too_long.code == 1
    assert "the cache holds 128" in too_long.err
    assert mla2dsa("export", checkpoint, out).code == 2  # not empty
