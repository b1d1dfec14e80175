"""A model repository for Triton Inference Server around an engine folder.

    REPO/NAME/config.pbtxt        inputs and outputs, with batch, seq and cache_length open
    REPO/NAME/1/model.plan        the engine (a hard link where the file system has them)
    REPO/README.md                how to start the server

The server opens plugin libraries without registering plugins of our kind, so the plan has to contain the library. The caches
are ordinary inputs and outputs: a client, or a backend in front, feeds each output back as the next input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files.dtypes import BY_NAME
from ...files.writing import place_file, write_new


def write_triton_repo(engine_folder: Path, manifest: Mapping[str, Any], repo: Path, name: str) -> None:
    """Write `repo` (new) for the engine of `engine_folder`, whose manifest this is and whose plan contains the plugin library;
    name: of the model. Raises UserError where it does not."""
    if not manifest["plugin"]["embedded"]:
        raise UserError(f"{engine_folder}: the plan does not contain the plugin library; build it with --embed-plugin")
    place_file(engine_folder / manifest["engine"]["file"], repo / name / "1" / "model.plan", link=True)
    write_new(repo / name / "config.pbtxt", config_text(manifest, name))
    write_new(repo / "README.md", _readme(name, manifest["backend"]))


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
            *_stop_tokens(manifest["model"]["eos_token_id"]),
            f"instance_group [ {{ count: 1, kind: KIND_GPU, profile: [ {profiles} ] }} ]",
            "",
        ]
    )


def _stop_tokens(ids: Sequence[int]) -> list[str]:
    """For whoever feeds the model: the server itself does not generate."""
    text = ",".join(map(str, ids))
    return [f'parameters: {{ key: "eos_token_id" value: {{ string_value: "{text}" }} }}'] if ids else []


def _tensors(role: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for entry in entries:
        dims = ", ".join("-1" if isinstance(dim, str) else str(dim) for dim in entry["shape"])
        lines.append(
            f'{role} [ {{ name: "{entry["name"]}", data_type: TYPE_{BY_NAME[entry["dtype"]].server}, dims: [ {dims} ] }} ]'
        )
    return lines


def _readme(name: str, backend: Mapping[str, str]) -> str:
    return f"""# {name}

A model repository for Triton Inference Server, for {backend["name"]} {backend["version"]}, the version that the engine was
built with. The plugin library is inside of the plan, so host code has to be allowed:

    tritonserver --model-repository=REPO --backend-config=tensorrt,version-compatible=true

The caches (past_*, present_*) are inputs and outputs: feed each output back as the next call's input.
The ids of the tokens that end a text are config.pbtxt's parameter eos_token_id, with commas between.
"""
