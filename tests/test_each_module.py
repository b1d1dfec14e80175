"""Every module that names the DSA ops can be the first one that a program imports."""

import subprocess
import sys

import pytest
from places import ROOT, package_files

FIRST = """
import os, sys
import torch

failed = []
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            __import__(module)
        except BaseException as error:
            print(f"{module}: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        failed.append(module)
sys.exit(bool(failed))
"""


def modules_that_name(text: str) -> list[str]:
    files = [file for file in package_files() if text in (ROOT / file).read_text()]
    names = [".".join(("mla2dsa", *file.with_suffix("").parts)) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def import_first(*modules: str) -> subprocess.CompletedProcess[str]:
    """Each of `modules` in a process that has torch and nothing of ours yet."""
    return subprocess.run([sys.executable, "-P", "-c", FIRST, *modules], capture_output=True, text=True, timeout=600)


def test_modules_that_name_the_ops_import_them() -> None:
    modules = modules_that_name("torch.ops.mla2dsa")
    assert len(modules) > 10
    done = import_first(*modules)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    "text", ["import torch\nat = torch.ops.mla2dsa.no_such_op.default\n"], ids=["op-not-registered"]
)
def test_a_module_that_does_not_is_found(
    text: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("path")
    (folder / "bare_module.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    done = import_first("bare_module")
    assert done.returncode == 1
    assert "bare_module: AttributeError" in done.stdout
