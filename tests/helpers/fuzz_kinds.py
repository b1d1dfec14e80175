"""What is fuzzed: the files that the commands read, each with the commands that read it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from fuzzing import (
    PROMPT,
    Kind,
    damaged_archive,
    damaged_bytes,
    damaged_document,
    damaged_header,
    damaged_recipe,
    run,
)
from places import TINY

from mla2dsa.cli import main
from mla2dsa.errors import UserError
from mla2dsa.files.digests import file_digest, file_sha256

RECIPE = "sequence_length: 192\ntokens: 2304\nrows: 64\nindex_topk: 32\nverify: {sequences: 2}\n"


def make(place: Path, engine: bool) -> dict[str, Path]:
    """The folders that are damaged. engine: with one of TensorRT-RTX, which builds without a GPU."""
    dense = place / "dense"
    shutil.copytree(TINY, dense, ignore=shutil.ignore_patterns("held_out", "__pycache__"))
    (dense / "recipe.yaml").write_text(RECIPE)
    dsa, onnx, pt2, plan = (place / name for name in ("dsa", "onnx", "pt2", "engine"))
    size = ("--max-seq", 128)
    _done("convert", dense, dsa, "--recipe", dense / "recipe.yaml", "--skip-verification")
    _done("export", dsa, onnx, *size)
    _done("export", dsa, pt2, "--format", "pt2", *size)
    found = {"dense": dense, "dsa": dsa, "onnx": onnx, "pt2": pt2}
    if engine:
        _done("build", onnx, plan, "--backend", "tensorrt-rtx", "--sm", 89, "--max", "batch=1,cache_length=128")
        found["engine"] = plan
    return found


def _done(*command: object) -> None:
    if main([str(word) for word in command]) != 0:
        raise RuntimeError(f"{command}: failed")


def load_libraries() -> None:
    """So that no fork has to: it would be most of its time."""
    import onnxruntime  # noqa: F401
    import yaml  # noqa: F401
    from transformers import AutoTokenizer, DeepseekV3ForCausalLM, DeepseekV32ForCausalLM  # noqa: F401

    import mla2dsa.optimizer.deploy
    import mla2dsa.optimizer.generate
    import mla2dsa.optimizer.inspect  # noqa: F401


def capture_once(model: Path) -> None:
    """The undamaged `model` is captured here, and by no fork again: it is most of a command's time."""
    from mla2dsa.optimizer import plan, verify
    from mla2dsa.optimizer.model import cached_model
    from mla2dsa.optimizer.model.capture import capture

    config = json.loads((model / "config.json").read_text())
    known = capture(config)

    def captured(asked: Any, *arguments: Any, dtype: torch.dtype = torch.float32) -> Any:
        same = dict(asked) == config and dtype == torch.float32 and arguments in ((), ("anchor",))
        return known if same else capture(asked, *arguments, dtype=dtype)

    for module in (plan, verify, cached_model):
        module.capture = captured


def kinds(folders: dict[str, Path]) -> dict[str, Kind]:
    """By name."""
    dense, dsa, onnx, pt2 = (folders[name] for name in ("dense", "dsa", "onnx", "pt2"))
    capture_once(dense)
    inspect, plan = ("inspect", "FOLDER"), ("convert", "FOLDER", "OUT", "--dry-run", "--index-topk", "32")
    generate = ("generate", "FOLDER", PROMPT, "--max-new-tokens", "2")
    strip = ("strip", "FOLDER", "OUT")
    recipe = "FOLDER/recipe.yaml"
    found = {
        "header": Kind(dense, "model.safetensors", (plan, inspect), damaged_header),
        "index": Kind(dsa, "model.safetensors.index.json", (generate, inspect), damaged_document),
        "config": Kind(dense, "config.json", (plan, inspect), damaged_document),
        "checkpoint manifest": Kind(dsa, "mla2dsa.json", (strip, generate, inspect), damaged_document),
        "export manifest": Kind(onnx, "mla2dsa-export.json", (generate, inspect), damaged_document),
        "recipe": Kind(
            dense, "recipe.yaml",
            (("plan", "FOLDER", "--recipe", recipe), ("convert", "FOLDER", "OUT", "--dry-run", "--recipe", recipe)),
            damaged_recipe,
        ),
        "onnx": Kind(onnx, "model.onnx", (generate, inspect), damaged_bytes),
        "onnx, forged digest": Kind(onnx, "model.onnx", (inspect,), damaged_bytes, prepare=_forge),
        "pt2": Kind(pt2, "model.pt2", (generate,), damaged_archive),
        "pt2, forged digest": Kind(pt2, "model.pt2", (generate,), damaged_archive, prepare=_forge),
    }  # fmt: skip
    if "engine" in folders:
        found["engine manifest"] = Kind(
            folders["engine"], "mla2dsa-engine.json", (generate, inspect), damaged_document, before=_as_on_a_gpu
        )
    return {name: _with_expected(kind) for name, kind in found.items()}


def _with_expected(kind: Kind) -> Kind:
    """What the undamaged folder gives. A forged program is another program, and says what it likes."""
    generate = next((command for command in kind.commands if command[0] == "generate"), None)
    if generate is None or kind.prepare is _forge or kind.before is _as_on_a_gpu:
        return kind
    ended = run([str(kind.folder) if word == "FOLDER" else word for word in generate])
    if ended.code != 0:
        raise RuntimeError(f"{kind.folder}: {ended.err}")
    return replace(kind, expected=ended.out)


def _forge(folder: Path) -> None:
    file = folder / "mla2dsa-export.json"
    manifest: dict[str, Any] = json.loads(file.read_text())
    manifest["digest"] = file_digest(folder / manifest["file"])
    file.unlink()
    file.write_text(json.dumps(manifest))


def _as_on_a_gpu() -> None:
    """All that stands between an engine folder and TensorRT is run, TensorRT is not."""
    from mla2dsa.runtime import tensorrt_session

    def refuse(backend: object, library: Path, plugins: object) -> NoReturn:
        raise UserError(f"would load a library with hash {file_sha256(library)[:12]}")

    tensorrt_session.gpu_sm = lambda: 89
    tensorrt_session.load_plugins = refuse
