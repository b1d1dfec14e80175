"""A model repository for Triton Inference Server around an engine folder.

    REPO/NAME/config.pbtxt        inputs and outputs, with batch, seq and cache_length open
    REPO/NAME/1/model.plan        the engine (a hard link where the file system has them)
    REPO/plugins/libmla2dsa_trt.so
    REPO/README.md                how to start the server

The caches are ordinary inputs and outputs: a client, or a backend in front, feeds each output back as the next input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .staging import place_file

_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16"}


def write_triton_repo(engine_folder: Path, manifest: Mapping[str, Any], repo: Path, name: str) -> None:
    """Write `repo` (new) for the engine of `engine_folder`, whose manifest this is; name: of the model."""
    place_file(engine_folder / manifest["engine"]["file"], repo / name / "1" / "model.plan", link=True)
    (repo / name / "config.pbtxt").write_text(config_text(manifest, name), encoding="utf-8")
    plugin = manifest["plugin"]["file"]
    place_file(engine_folder / plugin, repo / "plugins" / plugin, link=True)
    (repo / "README.md").write_text(_readme(name, plugin, bool(manifest["plugin"]["embedded"])), encoding="utf-8")


def config_text(manifest: Mapping[str, Any], name: str) -> str:
    """config.pbtxt. max_batch_size is 0: the batch is a dim like the others, as the caches have one too."""
    profiles = ", ".join(f'"{number}"' for number in range(len(manifest["profiles"])))
    return "\n".join(
        [
            f'name: "{name}"',
            'platform: "tensorrt_plan"',
            "max_batch_size: 0",
            *_tensors("input", manifest["inputs"]),
            *_tensors("output", manifest["outputs"]),
            f"instance_group [ {{ count: 1, kind: KIND_GPU, profile: [ {profiles} ] }} ]",
            "",
        ]
    )


def _tensors(role: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for entry in entries:
        dims = ", ".join("-1" if isinstance(dim, str) else str(dim) for dim in entry["shape"])
        lines.append(f'{role} [ {{ name: "{entry["name"]}", data_type: {_TYPES[entry["dtype"]]}, dims: [ {dims} ] }} ]')
    return lines


def _readme(name: str, plugin: str, embedded: bool) -> str:
    served = f"""# {name}

A model repository for Triton Inference Server, with the TensorRT version that the engine was built with. The caches
(past_*, present_*) are inputs and outputs: feed each output back as the next call's input.

"""
    if embedded:
        return f"""{served}The plugin is inside the plan, and host code has to be allowed:

    tritonserver --model-repository=REPO --backend-config=tensorrt,version-compatible=true
"""
    return f"""{served}The server opens plugin libraries but does not register them by TensorRT's newer way, which {plugin} uses. Build the
engine with `--embed-plugin`, which puts the library into the plan, and write the repository again.
"""
