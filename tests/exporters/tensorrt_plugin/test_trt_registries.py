"""The same plugin library in TensorRT's real registries: the lean runtimes of TensorRT 10 and 11, and TensorRT-RTX.

`make test` installs the lean runtimes, each in a folder of its own beside the virtual environment's packages, for two of them
cannot be installed at once. They can load plugins, not build engines.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import HELPERS
from plugin_samples import OPS
from plugin_samples import fields as fields_of

from mla2dsa.exporters.engine.plugin_build import build_plugin

SCRIPT = HELPERS / "registry_script.py"
LEAN = sorted(Path(sys.prefix).glob("lean-*"))
RUNTIMES: list[Any] = [pytest.param("tensorrt_lean_bindings", folder, id=folder.name) for folder in LEAN]
if importlib.util.find_spec("tensorrt_rtx") is not None:
    RUNTIMES.append(pytest.param("tensorrt_rtx", None, id="rtx"))
if not RUNTIMES:
    RUNTIMES.append(
        pytest.param("", None, id="none", marks=pytest.mark.skip(reason="no TensorRT here; make test installs some"))
    )


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fields of a real op of each kind."""
    folder = tmp_path_factory.mktemp("fields")
    for name in ("indexer-h8-d128-k64", "attention-h16-r64-fp16", "cache-d576"):
        program, kernels, _ = fields_of(name)
        (folder / f"{OPS[name].op}-{name}.program").write_bytes(program)
        (folder / f"{OPS[name].op}-{name}.kernels").write_bytes(kernels)
    return folder


@pytest.mark.parametrize(("module", "folder"), RUNTIMES)
def test_a_registry_loads_the_library_and_makes_its_plugins(module: str, folder: Path | None, fields: Path) -> None:
    environment = {**os.environ, **({} if folder is None else {"PYTHONPATH": str(folder)})}
    command = [sys.executable, str(SCRIPT), module, str(build_plugin()), str(fields)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if folder is not None:
        assert found["version"] == folder.name.removeprefix("lean-")
    assert found["creators"] == ["CacheWrite", "LightningIndexer", "SparseMLA"]
    assert [plugin["name"] for plugin in found["plugins"]] == found["creators"]
    for plugin in found["plugins"]:
        assert plugin == {
            "name": plugin["name"], "version": "1", "namespace": "mla2dsa", "outputs": 1,
            "interfaces": ["PLUGIN_V3ONE_CORE 1", "PLUGIN_V3ONE_BUILD 2", "PLUGIN_V3ONE_RUNTIME 1"],
        }  # fmt: skip
    assert not any(refused["plugin"] for refused in found["refused"])
    assert {refused["why"].split(": ", 2)[2] for refused in found["refused"]} == {
        "the program has version 9, this plugin reads 1",
        "lunch is not known inside of a form",
        "lunch is not known inside of repeat",
    }


def test_both_majors_of_tensorrt_are_there() -> None:
    if not LEAN:
        pytest.skip("the lean runtimes are not installed; make test does")
    assert {folder.name.removeprefix("lean-").split(".")[0] for folder in LEAN} == {"10", "11"}
