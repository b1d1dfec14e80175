"""DSA checkpoints against transformers: they load, equal the dense model below index_topk, and `strip` undoes them."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    INDEXER,
    KINDS,
    assert_one_line,
    contents,
    copier,
    dense_checkpoint,
    edit_config,
    random_indexers,
    save_dense,
    shards,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.exporters.dsa.checkpoint import INDEXER_SHARD, MANIFEST, write_dsa_checkpoint
from mla2dsa.exporters.dsa.strip import not_restored, strip
from mla2dsa.files.safetensors_index import INDEX_FILE, SINGLE_FILE, read_index
from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.model.checkpoint import Checkpoint


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return copier(tmp_path, tmp_path_factory)


def convert(source: Path, out: Path, config: IndexerConfig = INDEXER, **options: Any) -> Path:
    weights = options.pop("weights", None) or random_indexers(source, config)
    return write_dsa_checkpoint(source, out, weights, config, manifest={"recipe": {"indexer": "random"}}, **options)


def load(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model by its transformers class; nothing may be missing, left over, or of another shape."""
    import transformers

    model, info = getattr(transformers, name).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def of_the_model(folder: Path) -> dict[str, str]:
    """`contents` without the folder that is no part of the model."""
    return {name: digest for name, digest in contents(folder).items() if not name.startswith("figures/")}


def logits(folder: Path, name: str, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    tokens = torch.randint(0, 160, (2, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        result: Tensor = load(folder, name, dtype)(tokens).logits
    return result


# The oracle: transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_below_index_topk_bit_for_bit(
    kind: str, dtype: torch.dtype, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = dense_checkpoint(kind, tmp_path_factory)
    before = contents(source)
    out = convert(source, tmp_path / "dsa")
    dense = logits(source, "DeepseekV3ForCausalLM", INDEXER.index_topk, dtype)
    assert dense.std() > 0.01
    assert torch.equal(dense, logits(out, "DeepseekV32ForCausalLM", INDEXER.index_topk, dtype))
    assert contents(source) == before


def test_indexers_decide_beyond_index_topk(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The weights that were written are the ones that run: other indexers select otherwise."""
    source = dense_checkpoint("sharded", tmp_path_factory)
    config = IndexerConfig(index_topk=8, index_n_heads=4, index_head_dim=32)
    outs = [convert(source, tmp_path / f"{n}", config, weights=random_indexers(source, config, n)) for n in (1, 2)]
    runs = [logits(outs[0], name, 64) for name in ("DeepseekV32ForCausalLM", "AutoModelForCausalLM")]
    runs.append(logits(outs[1], "DeepseekV32ForCausalLM", 64))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0][:, :8], runs[2][:, :8])
    assert not torch.allclose(runs[0][:, 8:], runs[2][:, 8:], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_written_tensors(dtype: torch.dtype, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = dense_checkpoint("single", tmp_path_factory)
    weights = random_indexers(source)
    out = convert(source, tmp_path / "dsa", weights=weights, dtype=dtype)
    written = load_file(out / INDEXER_SHARD)
    assert len(written) == 15
    for module, indexer in weights.items():
        for name, tensor in indexer.tensors().items():
            kept = torch.float32 if "k_norm" in name else dtype
            assert torch.equal(written[f"{module}.indexer.{name}"], tensor.to(kept))
    state = load(out, "DeepseekV32ForCausalLM", torch.float32).state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in written.items())


# What lies in the folder


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_links_and_the_rest_copies(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = dense_checkpoint(kind, tmp_path_factory)
    out = convert(source, tmp_path / "dsa")
    for file in source.glob("*.safetensors"):
        target = out / {SINGLE_FILE: "model-dense.safetensors"}.get(file.name, file.name)
        assert os.path.samefile(file, target)
    for name in ["tokenizer.json", "generation_config.json"]:
        assert (out / name).read_bytes() == (source / name).read_bytes()
        assert not os.path.samefile(source / name, out / name)
    assert not (out / SINGLE_FILE).exists()
    assert not (out / "figures").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["dsa"]


@pytest.mark.parametrize("kind", ["single", "moe-sharded"])
def test_index_lists_everything(kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = dense_checkpoint(kind, tmp_path_factory)
    out = convert(source, tmp_path / "dsa")
    dense, dsa = read_index(source), read_index(out)
    assert len(dsa) == len(dense) + 15
    assert {name: (dsa[name].offset, dsa[name].nbytes) for name in dense} == {
        name: (place.offset, place.nbytes) for name, place in dense.items()
    }
    index = json.loads((out / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(place.nbytes for place in dsa.values())
    assert Checkpoint.open(out).is_dsa()
    assert Checkpoint.open(out).fingerprint() != Checkpoint.open(source).fingerprint()


def test_manifest(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = dense_checkpoint("sharded", tmp_path_factory)
    out = convert(source, tmp_path / "dsa", prove=lambda folder: {"recall": 0.99})
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["recipe"] == {"indexer": "random"}
    assert manifest["report"] == {"recall": 0.99}
    assert manifest["source"]["config"] == (source / "config.json").read_text()
    assert {"mla2dsa", "torch", "transformers"} == set(manifest["versions"])
    files = {entry["source_name"]: entry for entry in manifest["source"]["files"]}
    assert set(files) == set(of_the_model(source)) - {"config.json"}
    assert manifest["source"]["left_out"] == not_restored(out) == ["figures/"]
    for name, digest in of_the_model(source).items():
        if name != "config.json":
            assert files[name]["sha256"] == digest
            assert files[name]["placed"] == ("hardlink" if name.endswith(".safetensors") else "copy")


def test_manifest_keeps_its_own_entries(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = dense_checkpoint("single", tmp_path_factory)
    with pytest.raises(ValueError, match="source"):
        write_dsa_checkpoint(source, tmp_path / "dsa", random_indexers(source), INDEXER, manifest={"source": {}})


def test_hub_cache_links_are_followed(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """The hub cache holds links into a folder of blobs; the result holds none."""
    real = copy("sharded")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in real.iterdir():
        if file.is_file():
            (snapshot / file.name).symlink_to(Path("../..") / "sharded" / file.name)
    out = convert(snapshot, tmp_path / "dsa")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert all(os.path.samefile(shard, out / shard.name) for shard in shards(real))
    restored = strip(out, tmp_path / "dense")
    assert contents(restored) == contents(snapshot)
    load(out, "DeepseekV32ForCausalLM")


def test_stray_index_of_a_single_file(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """An index that transformers ignores beside model.safetensors is not used: it stays behind, and that is said."""
    source = copy("single")
    (source / INDEX_FILE).write_text('{"weight_map": {"ghost": "gone.safetensors"}}')
    out = convert(source, tmp_path / "dsa")
    load(out, "DeepseekV32ForCausalLM")
    assert not_restored(out) == ["figures/", INDEX_FILE]
    assert set(contents(strip(out, tmp_path / "dense"))) == set(of_the_model(source)) - {INDEX_FILE}


class Lazy(Mapping[str, IndexerWeights]):
    """Indexers made on demand, counted."""

    def __init__(self, weights: Mapping[str, IndexerWeights]) -> None:
        self.weights = weights
        self.fetched: list[str] = []

    def __getitem__(self, name: str) -> IndexerWeights:
        self.fetched.append(name)
        return self.weights[name]

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_indexers_are_fetched_once_in_order(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = dense_checkpoint("single", tmp_path_factory)
    lazy = Lazy(random_indexers(source))
    convert(source, tmp_path / "dsa", weights=lazy)
    assert lazy.fetched == list(lazy.weights)


# strip


@pytest.mark.parametrize("kind", KINDS)
def test_strip_restores_every_byte(kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = dense_checkpoint(kind, tmp_path_factory)
    out = convert(source, tmp_path / "dsa")
    before = contents(out)
    dense = strip(out, tmp_path / "dense")
    assert contents(dense) == of_the_model(source)
    assert contents(out) == before
    assert all(os.path.samefile(file, dense / file.name) for file in source.glob("*.safetensors"))
    load(dense, "DeepseekV3ForCausalLM")


def test_strip_keeps_odd_config_text(copy: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy("single")
    text = (source / "config.json").read_text().replace("\n", "\r\n").replace("{", '{ "note": "Größe \\u00e9",', 1)
    (source / "config.json").write_bytes(text.encode())
    restored = strip(convert(source, tmp_path / "dsa"), tmp_path / "dense")
    assert contents(restored) == of_the_model(source)


def drop_manifest(out: Path) -> None:
    (out / MANIFEST).unlink()


def edit_manifest(edit: Callable[[Any], object]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        manifest = json.loads((out / MANIFEST).read_text())
        edit(manifest)
        (out / MANIFEST).write_text(json.dumps(manifest))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "native": (drop_manifest, [f"no {MANIFEST}", "native"]),
    "newer": (edit_manifest(lambda m: m.update(format=3)), ["format 3", "update mla2dsa"]),
    "no-source": (edit_manifest(lambda m: m.pop("source")), [MANIFEST, "damaged"]),
    "leads-out": (edit_manifest(lambda m: m["source"]["files"][0].update(source_name="../x")), [MANIFEST, "damaged"]),
    "absolute": (edit_manifest(lambda m: m["source"]["files"][0].update(name="/etc/passwd")), [MANIFEST, "damaged"]),
    "file-gone": (lambda out: (out / "tokenizer.json").unlink(), ["tokenizer.json", "missing"]),
    "file-edited": (lambda out: (out / "tokenizer.json").write_text("{}"), ["tokenizer.json", "changed since"]),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_strip_refuses(fault: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    damage, parts = DAMAGE[fault]
    out = convert(dense_checkpoint("single", tmp_path_factory), tmp_path / "dsa")
    damage(out)
    with pytest.raises(UserError) as error:
        strip(out, tmp_path / "dense")
    assert_one_line(error, out, *parts)
    assert not (tmp_path / "dense").exists()


# What cannot be written


def replaced(weights: Mapping[str, IndexerWeights], name: str, edit: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    tensors = {**weights["model.layers.1.self_attn"].tensors()}
    tensors[name] = edit(tensors[name].clone())
    return {**weights, "model.layers.1.self_attn": IndexerWeights.from_tensors(tensors)}


WEIGHTS: dict[str, tuple[Callable[[Any], Any], torch.dtype, list[str]]] = {
    "missing-layer": (
        lambda w: {name: w[name] for name in list(w)[:2]},
        torch.bfloat16,
        ["model.layers.2.self_attn", "no indexer weights"],
    ),
    "unknown-module": (
        lambda w: {**w, "model.layers.7.self_attn": w["model.layers.0.self_attn"]},
        torch.bfloat16,
        ["model.layers.7.self_attn", "no tensors of"],
    ),
    "shape": (
        lambda w: replaced(w, "wk.weight", lambda t: t[:, :-1]),
        torch.bfloat16,
        ["model.layers.1.self_attn.indexer.wk.weight", "[32, 63]", "[32, 64]"],
    ),
    "nan": (
        lambda w: replaced(w, "k_norm.bias", lambda t: t * float("nan")),
        torch.bfloat16,
        ["model.layers.1.self_attn.indexer.k_norm.bias", "was NaN"],
    ),
    "overflow": (
        lambda w: replaced(w, "wq_b.weight", lambda t: t * 1e6),
        torch.float16,
        ["model.layers.1.self_attn.indexer.wq_b.weight", "does not fit torch.float16"],
    ),
    "dtype": (lambda w: w, torch.int8, ["torch.int8", "torch.bfloat16"]),
}


@pytest.mark.parametrize("fault", WEIGHTS)
def test_unfit_weights(fault: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    change, dtype, parts = WEIGHTS[fault]
    source = dense_checkpoint("moe", tmp_path_factory)
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / "dsa", weights=change(random_indexers(source)), dtype=dtype)
    assert_one_line(error, *parts)
    assert list(tmp_path.iterdir()) == []


def add_indexer(source: Path) -> None:
    tensors = load_file(source / SINGLE_FILE)
    save_file({**tensors, "model.layers.0.self_attn.indexer.wk.weight": torch.zeros(2)}, source / SINGLE_FILE)


def take_name(source: Path) -> None:
    """A shard of the name that the indexers' shard gets."""
    names = read_index(source)
    (source / SINGLE_FILE).rename(source / INDEXER_SHARD)
    (source / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, INDEXER_SHARD)}))


SOURCES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "cut": (lambda f: os.truncate(f / SINGLE_FILE, 5000), [SINGLE_FILE, "truncated"]),
    "no-config": (lambda f: (f / "config.json").unlink(), ["config.json", "no such file"]),
    "has-indexer": (add_indexer, [SINGLE_FILE, "already holds indexer tensors"]),
    "name-taken": (take_name, [INDEXER_SHARD, "rename it"]),
    "dangling": (lambda f: (f / "vocab.txt").symlink_to("gone"), ["vocab.txt", "dangling"]),
    "layers": (lambda f: edit_config(f, {"num_hidden_layers": "3"}), ["config.json", "num_hidden_layers", "'3'"]),
}


@pytest.mark.parametrize("fault", SOURCES)
def test_unfit_source(fault: str, copy: Callable[[str], Path], tmp_path: Path) -> None:
    damage, parts = SOURCES[fault]
    source = copy("single")
    weights = random_indexers(source)
    damage(source)
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / "dsa", weights=weights)
    assert_one_line(error, source, *parts)
    assert [entry.name for entry in tmp_path.iterdir()] == ["single"]


@pytest.mark.parametrize("with_indexer", [False, True], ids=["bare", "with-indexer"])
def test_mtp_layer(with_indexer: bool, tmp_path: Path) -> None:
    """Layer num_hidden_layers is the MTP one: its indexer is optional, and its absence is on record."""
    source = tmp_path / "dense"
    save_dense(source)
    mtp = "model.layers.2.self_attn"
    weights = random_indexers(source)
    edit_config(source, {"num_hidden_layers": 2, "first_k_dense_replace": 2})
    if not with_indexer:
        del weights[mtp]
    out = convert(source, tmp_path / "dsa", weights=weights)
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["indexer"]["mtp_layers_without"] == ([] if with_indexer else [mtp])
    assert (f"{mtp}.indexer.wk.weight" in read_index(out)) == with_indexer
