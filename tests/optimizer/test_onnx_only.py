"""`build --onnx-only`: a folder of its own, whose small files are copies, and which only mla2dsa's own may be replaced by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from checkpoints import contents, random_indexers, save_dense

from mla2dsa.errors import UsageError, UserError
from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.files.ownership import FILES_MANIFEST, why_not_ours
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer import build
from mla2dsa.optimizer.build_plan import BuildOptions, plan_build
from mla2dsa.optimizer.export import export

INDEXER = IndexerConfig(index_topk=16, index_n_heads=4, index_head_dim=32)
OPTIONS = BuildOptions(backend="tensorrt-rtx", sms=(80,))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("onnx-only")
    save_dense(place / "dense", num_hidden_layers=1, first_k_dense_replace=1)
    weights = random_indexers(place / "dense", INDEXER)
    dsa = write_dsa_checkpoint(place / "dense", place / "dsa", weights, INDEXER, manifest={})
    return export(dsa, place / "onnx", max_seq=64).folder


@pytest.fixture(autouse=True)
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is compiled, and the plugin is a file."""
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "libmla2dsa_trt.so").write_bytes(b"library")
    monkeypatch.setattr(build, "attach", lambda *_: [])
    monkeypatch.setattr(build, "build_plugin", lambda: tmp_path / "plugin" / "libmla2dsa_trt.so")


def write(source: Path, out: Path, **options: Any) -> None:
    build.build_onnx(plan_build(source, out, BuildOptions(**{**vars(OPTIONS), **options})))


def test_small_files_are_copies(made: Path, tmp_path: Path) -> None:
    before, out = contents(made), tmp_path / "out"
    write(made, out)
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "tokenizer.json", "model.onnx", "libmla2dsa_trt.so", FILES_MANIFEST} <= names
    for file in out.iterdir():
        twin = made / file.name
        linked = twin.exists() and os.path.samefile(file, twin)
        assert linked == (file.suffix == ".safetensors"), file.name
        if not linked:
            file.write_text("edited")
    assert contents(made) == before


def test_it_may_be_replaced_and_nothing_else(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(made, out)
    assert why_not_ours(out) is None
    write(made, out, overwrite=True)
    (out / "trtexec.log").write_text("mine")
    with pytest.raises(UsageError, match=r"holds trtexec\.log, which mla2dsa did not write"):
        write(made, out, overwrite=True)
    assert (out / "trtexec.log").read_text() == "mine"


@pytest.mark.parametrize("name", ["layers.json", "libmla2dsa_trt.so", FILES_MANIFEST, "model.engine", "PLUGINS"])
def test_files_of_an_export_called_like_ours(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    source = Path(shutil.copytree(made, tmp_path / "onnx"))
    (source / name).write_text("mine")
    monkeypatch.setattr(build, "attach", lambda *_: pytest.fail("kernels were compiled"))
    with pytest.raises(UserError, match=r"the output needs the name .* for a file of its own; rename it"):
        write(source, tmp_path / "out")
    assert (source / name).read_text() == "mine"
    assert not (tmp_path / "out").exists()
