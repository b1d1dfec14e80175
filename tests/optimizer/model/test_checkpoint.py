"""Opening checkpoints, one tensor at a time: values, FP8 blocks, fingerprints, and one clear line for every fault."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import assert_one_line, contents, copier, dense_checkpoint, edit_config, shards
from safetensors.torch import load_file, save_file

from mla2dsa.errors import UserError
from mla2dsa.files.safetensors_index import INDEX_FILE, SINGLE_FILE
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.model.dequantise import blocks

KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return copier(tmp_path, tmp_path_factory)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["single", "moe-sharded"])
def test_load_equals_safetensors(
    kind: str, dtype: torch.dtype | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = Checkpoint.open(dense_checkpoint(kind, tmp_path_factory))
    for name, place in checkpoint.tensors.items():
        expected = load_file(place.file)[name]
        loaded = checkpoint.load(name, dtype)
        assert loaded.dtype == (dtype or torch.bfloat16)
        assert torch.equal(loaded, expected.to(loaded.dtype))


def test_loaded_tensor_does_not_write_through(copy: Callable[[str], Path]) -> None:
    folder = copy("single")
    before = contents(folder)
    Checkpoint.open(folder).load(KV_A).fill_(7)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("/no/such/folder", "no such folder"),
        (Path("nope"), "no such folder"),
        ("a/b/c", "owner/name"),
        ("..", "no such file"),
        ("owner/absent-model", "not in the hub cache"),
    ],
)
def test_open_names_what_is_missing(
    model: str | Path, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(UserError) as error:
        Checkpoint.open(model, local_files_only=True)
    assert_one_line(error, model, part)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("RepositoryNotFoundError", "not found on the hub"),
        ("GatedRepoError", "hf auth login"),
        ("RevisionNotFoundError", "not that revision"),
        ("LocalEntryNotFoundError", "check name and network"),
        ("OfflineModeIsEnabled", "check name and network"),
    ],
)
def test_hub_errors_are_one_line(kind: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    error_type = getattr(huggingface_hub.errors, kind)

    def fail(*_: object, **__: object) -> str:
        raise error_type.__new__(error_type)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as error:
        Checkpoint.open("owner/name", revision="v9")
    assert_one_line(error, "owner/name (revision v9)", part)


def test_open_from_hub_cache(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = copy("single")
    asked: dict[str, object] = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda model, **options: asked.update(options, model=model) or str(folder)
    )
    checkpoint = Checkpoint.open("owner/name", revision="v1", local_files_only=True)
    assert checkpoint.path == folder
    assert (asked["model"], asked["revision"], asked["local_files_only"]) == ("owner/name", "v1", True)


@pytest.mark.parametrize(("text", "part"), [(None, "no such file"), ("{", "not valid JSON"), ("3", "found int")])
def test_bad_config(copy: Callable[[str], Path], text: str | None, part: str) -> None:
    folder = copy("single")
    if text is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        Checkpoint.open(folder)
    assert_one_line(error, folder / "config.json", part)


def test_a_file_is_not_a_checkpoint(copy: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="give the folder"):
        Checkpoint.open(copy("single") / SINGLE_FILE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values(copy: Callable[[str], Path], value: float) -> None:
    folder = copy("single")
    tensors = load_file(folder / SINGLE_FILE)
    tensors[KV_A][3, 5] = value
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(UserError) as error:
        checkpoint.load(KV_A)
    assert_one_line(error, folder / SINGLE_FILE, KV_A, "1 NaN or infinite")
    assert not torch.isfinite(checkpoint.load(KV_A, finite=False)).all()


def test_missing_tensor(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = dense_checkpoint("single", tmp_path_factory)
    with pytest.raises(UserError) as error:
        Checkpoint.open(folder).load("model.layers.9.weight")
    assert_one_line(error, folder, "no tensor model.layers.9.weight")


def quantise(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain block quantisation to float8 with one scale a block, element by element."""
    grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    scale = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            block = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = block.abs().max().clamp(min=1e-6) / 448
    spread = expand(scale, rows, columns, weight.shape)
    return (weight / spread).to(torch.float8_e4m3fn), scale


def expand(scale: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    return torch.stack(
        [torch.stack([scale[i // rows, j // columns] for j in range(shape[1])]) for i in range(shape[0])]
    )


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (16, 32), (5, 7)], ids=lambda size: str(size))
@pytest.mark.parametrize("shape", [(1, 1), (20, 33), (48, 64), (130, 257)], ids=lambda shape: "x".join(map(str, shape)))
def test_fp8_blocks(tmp_path: Path, shape: tuple[int, int], rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[1])
    stored, scale = quantise(weight, rows, columns)
    reference = stored.float() * expand(scale, rows, columns, weight.shape)
    save_file({"x.weight": stored, "x.weight_scale_inv": scale}, tmp_path / SINGLE_FILE)
    quantisation = {"quant_method": "fp8", "weight_block_size": [rows, columns]}
    settings = {} if rows == 128 else {"quantization_config": quantisation}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.load("x.weight", torch.float32), reference)
    assert torch.equal(checkpoint.load("x.weight"), reference.to(torch.bfloat16))
    assert torch.equal(blocks(stored, scale, rows, columns), reference)
    assert (reference - weight).abs().le(0.07 * weight.abs() + scale.max() * 2**-9).all()


@pytest.mark.parametrize(
    ("extra", "part"),
    [({}, "without x.weight_scale_inv"), ({"x.weight_scale_inv": torch.ones(2, 2)}, "expected [1, 1]")],
    ids=["no-scale", "wrong-grid"],
)
def test_fp8_without_fitting_scale(tmp_path: Path, extra: dict[str, torch.Tensor], part: str) -> None:
    save_file({"x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), **extra}, tmp_path / SINGLE_FILE)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        Checkpoint.open(tmp_path).load("x.weight")
    assert_one_line(error, tmp_path / SINGLE_FILE, part)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64], ids=str
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_in_any_dtype(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    fine = torch.arange(-40, 40).to(dtype)
    bad = fine.clone()
    bad[17] = value
    save_file({"fine": fine, "bad": bad, "none": fine[:0]}, tmp_path / SINGLE_FILE)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.load("fine"), fine)
    assert checkpoint.load("none").numel() == 0
    with pytest.raises(UserError, match="NaN or infinite"):
        checkpoint.load("bad")


def test_fp8_not_finite(tmp_path: Path) -> None:
    values = torch.ones(4, 4)
    values[0, 0] = float("nan")
    save_file(
        {"x.weight": values.to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.ones(1, 1)}, tmp_path / SINGLE_FILE
    )
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="1 NaN or infinite"):
        Checkpoint.open(tmp_path).load("x.weight")


def test_packed_weight_is_named(tmp_path: Path) -> None:
    save_file({"x.weight_packed": torch.zeros(4, dtype=torch.int32)}, tmp_path / SINGLE_FILE)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"only there as x\.weight_packed"):
        Checkpoint.open(tmp_path).load("x.weight")


def test_fingerprint_follows_the_bytes(copy: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    original = Checkpoint.open(dense_checkpoint("sharded", tmp_path_factory)).fingerprint()
    folder = copy("sharded")
    os.utime(shards(folder)[0], (1, 1))
    (folder / "notes.txt").write_text("not part of the model")
    assert Checkpoint.open(folder).fingerprint() == original
    assert set(Checkpoint.open(folder).source_hashes()) == {"config.json", INDEX_FILE} | {
        s.name for s in shards(folder)
    }
    with shards(folder)[0].open("r+b") as stream:  # one bit of one weight
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    assert Checkpoint.open(folder).fingerprint() != original


@pytest.mark.parametrize("file", ["config.json", INDEX_FILE])
def test_fingerprint_follows_the_json(copy: Callable[[str], Path], file: str) -> None:
    folder = copy("sharded")
    original = Checkpoint.open(folder).fingerprint()
    (folder / file).write_text((folder / file).read_text() + "\n")
    assert Checkpoint.open(folder).fingerprint() != original


def test_large_files_are_hashed_by_their_header(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla2dsa.files.digests.WHOLE_HASH_LIMIT", 5000)
    folder = copy("single")
    checkpoint = Checkpoint.open(folder)
    entry = checkpoint.source_hashes()[SINGLE_FILE]
    first = min(place.offset for place in checkpoint.tensors.values())
    assert (entry["size"], entry["hashed"]) == ((folder / SINGLE_FILE).stat().st_size, first)
    original = checkpoint.fingerprint()
    tensors = load_file(folder / SINGLE_FILE)
    save_file({f"{name}x": tensor for name, tensor in tensors.items()}, folder / SINGLE_FILE, {"format": "pt"})
    assert Checkpoint.open(folder).fingerprint() != original


def test_an_indexer_size_makes_it_dsa(copy: Callable[[str], Path]) -> None:
    folder = copy("moe")
    assert not Checkpoint.open(folder).is_dsa()
    edit_config(folder, {"index_topk": 64})
    assert Checkpoint.open(folder).is_dsa()
    edit_config(folder, {"index_topk": None, "text_config": {"index_topk": 64}})
    assert Checkpoint.open(folder).is_dsa()
    edit_config(folder, {"index_topk": None, "text_config": None})
    assert not Checkpoint.open(folder).is_dsa()


def test_indexer_tensors_make_it_dsa(copy: Callable[[str], Path]) -> None:
    folder = copy("single")
    tensors = load_file(folder / SINGLE_FILE)
    save_file({**tensors, "model.layers.0.self_attn.indexer.wk.weight": torch.zeros(2, 2)}, folder / SINGLE_FILE)
    assert Checkpoint.open(folder).is_dsa()


def test_check_shapes(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = Checkpoint.open(dense_checkpoint("single", tmp_path_factory))
    right = {name: place.shape for name, place in checkpoint.tensors.items()}
    checkpoint.check_shapes(right)
    wrong = {**right, KV_A: (48, 32), "ghost": (1,), **{f"ghost.{i}": (1,) for i in range(5)}}
    with pytest.raises(UserError) as error:
        checkpoint.check_shapes(wrong)
    assert_one_line(error, f"7 of {len(wrong)}", f"{KV_A} is [48, 64], config.json gives [48, 32]", "ghost is missing")
    assert "and 4 more" in str(error.value)
