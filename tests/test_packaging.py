"""What a user installs: a wheel with the package and nothing beside it. Also: our folders shadow no other package."""

import ctypes
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import ROOMS, ROOT, package_files

from mla2dsa.errors import UserError
from mla2dsa.exporters.engine import plugin_build, plugin_sources

NOT_SOURCES = (".*", "__pycache__", "*.egg-info", "build", "dist", "demo-out", "*.safetensors")


def run(*command: str, cwd: Path) -> str:
    """Standard output of a command that must succeed. PYTHONPATH and PYTHONSAFEPATH are not set, as for most users."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def packages_in_tree() -> set[str]:
    """mla2dsa and every folder with an __init__.py below it."""
    inits = (init for top in ROOT.glob("*/__init__.py") for init in top.parent.rglob("__init__.py"))
    return {"mla2dsa", *(".".join(("mla2dsa", *init.relative_to(ROOT).parts[:-1])) for init in inits)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the tree: a build in place leaves folders behind that later builds would pick up."""
    work = tmp_path_factory.mktemp("wheel")
    sources = work / "a-checkout.of any name"
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(work))
    run(sys.executable, "-m", "pip", "wheel", str(sources), *flags, cwd=work)
    return zipfile.ZipFile(next(work.glob("*.whl")))


def python_members(wheel: zipfile.ZipFile) -> list[PurePosixPath]:
    return [PurePosixPath(name) for name in wheel.namelist() if name.endswith(".py")]


def test_declared_packages_are_those_in_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(settings["tool"]["setuptools"]["packages"]) == packages_in_tree()


def test_wheel_packages_are_those_in_the_tree(wheel: zipfile.ZipFile) -> None:
    shipped = {".".join(path.parent.parts) for path in python_members(wheel) if path.name == "__init__.py"}
    assert shipped == packages_in_tree()


def test_wheel_modules_are_those_in_the_tree(wheel: zipfile.ZipFile) -> None:
    folders = [ROOT.joinpath(*package.split(".")[1:]) for package in packages_in_tree()]
    expected = {"mla2dsa" / file.relative_to(ROOT) for folder in folders for file in folder.glob("*.py")} - {
        Path("mla2dsa/setup.py")
    }
    assert {Path(path) for path in python_members(wheel)} == expected


def data_in_tree() -> set[Path]:
    """What lies in the package's rooms and is no Python: pages, tables, sources in C++."""
    compiled = {plugin_sources.LIBRARY, plugin_sources.DIGEST}
    files = (file.relative_to(ROOT) for room in ROOMS for file in (ROOT / room).rglob("*") if file.is_file())
    kept = (file for file in files if not any(part.startswith((".", "__pycache__")) for part in file.parts))
    return {file for file in kept if file.suffix != ".py" and file.name not in compiled}


def test_wheel_has_every_file_of_the_package_as_it_is(wheel: zipfile.ZipFile) -> None:
    """The page of `serve` and the prices of `plan --cost` among them: a wheel without them would fail when it is used."""
    data = data_in_tree()
    assert {Path("serving/page.html"), Path("serving/page.js"), Path("serving/page.css")} <= data
    assert {Path("optimizer/cost/gpus.json"), Path("kernels/gpu/programs/tuning.json")} <= data
    expected = {*package_files(), *data, Path("py.typed")}
    names = set(wheel.namelist())
    assert not sorted(str(file) for file in expected if f"mla2dsa/{file}" not in names)
    assert not [file for file in expected if wheel.read(f"mla2dsa/{file}") != (ROOT / file).read_bytes()]


def test_wheel_has_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mla2dsa"}


def test_wheel_is_typed_and_licensed(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "mla2dsa/py.typed" in names
    licence = next(name for name in names if name.endswith("licenses/LICENSE"))
    assert "Apache License" in wheel.read(licence).decode()
    metadata = Parser().parsestr(wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_wheel_declares_the_command(wheel: zipfile.ZipFile) -> None:
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "mla2dsa = mla2dsa.cli:program" in wheel.read(entry).decode()


def test_wheel_runs_without_the_repository(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked and put first on the path, with site packages (and so the editable install) only after it."""
    wheel.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        "import mla2dsa.cli, mla2dsa.kernels.spec\n"
        "print(mla2dsa.cli.__file__)"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == str(tmp_path / "site" / "mla2dsa" / "cli.py")


PLUGIN = "mla2dsa/exporters/tensorrt_plugin/"


def test_wheel_has_the_plugin_compiled_and_its_sources(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Compiled, the wheel is for one platform and any Python; what it brings is used, and no compiler is asked for."""
    names = set(wheel.namelist())
    assert {f"{PLUGIN}{file.name}" for file in plugin_sources.sources()} <= names
    assert wheel.filename is not None
    assert "-py3-none-linux_" in wheel.filename
    assert {PLUGIN + plugin_sources.LIBRARY, PLUGIN + plugin_sources.DIGEST} <= names
    wheel.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        "from mla2dsa.exporters.engine.plugin_build import build_plugin\n"
        "print(build_plugin())"
    )
    used = run(sys.executable, "-c", code, cwd=tmp_path).strip()
    assert used == str(tmp_path / "site" / PLUGIN / plugin_sources.LIBRARY)
    assert hasattr(ctypes.CDLL(used), "getCreators")


def test_a_library_of_other_sources_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "plugin"
    shutil.copytree(plugin_sources.FOLDER, folder)
    assert plugin_sources.compile_into(folder) is None
    assert plugin_sources.shipped(folder) == folder / plugin_sources.LIBRARY
    whole = (folder / plugin_sources.LIBRARY).read_bytes()
    for damaged in (b"", whole[:-1], whole + b"x"):
        (folder / plugin_sources.LIBRARY).write_bytes(damaged)
        assert plugin_sources.shipped(folder) is None
    (folder / plugin_sources.LIBRARY).write_bytes(whole)
    assert plugin_sources.shipped(folder) == folder / plugin_sources.LIBRARY
    (folder / "plugin.cpp").write_text("// changed")
    assert plugin_sources.shipped(folder) is None


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert plugin_sources.compile_into(tmp_path) == "no C++ compiler"
    monkeypatch.setattr(plugin_build, "shipped", lambda: None)
    with pytest.raises(
        UserError, match=r"the TensorRT plugin cannot be compiled: no C\+\+ compiler .*install one, or set CXX"
    ):
        plugin_build.build_plugin()


# What stands before the guard's work is checked too: without the trap, the guard would have nothing to prove.
GUARD_PROBE = """
import importlib.util, os, runpy, sys
def kernels_is_ours():
    spec = importlib.util.find_spec("kernels")
    return spec is not None and os.path.realpath(spec.origin).startswith(os.path.realpath(os.getcwd()) + os.sep)
assert kernels_is_ours(), "the repository root is not on sys.path: nothing to guard against"
sys.argv = ["mla2dsa", "--help"]
try:
    runpy.run_module("mla2dsa", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
assert not kernels_is_ours(), "the guard in __main__ left the repository root on sys.path"
from transformers import DeepseekV3ForCausalLM
"""


def test_main_guards_against_the_kernels_folder() -> None:
    run(sys.executable, "-c", GUARD_PROBE, cwd=ROOT)


def test_transformers_models_import_from_the_repository_root() -> None:
    run(sys.executable, "-c", "from transformers import DeepseekV3ForCausalLM", cwd=ROOT)


def test_env_runs_from_the_repository_root() -> None:
    assert "transformers" in run(sys.executable, "-m", "mla2dsa", "env", cwd=ROOT)


def pins() -> dict[str, str]:
    """What constraints.txt pins: version by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def requirements(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return [Requirement(text) for text in texts]


def test_constraints_pin_every_dependency() -> None:
    names = {canonicalize_name(requirement.name) for requirement in requirements("test", "browser", "docs")}
    assert names <= pins().keys(), f"constraints.txt lacks {sorted(names - pins().keys())}"
    assert pins()["torch"] == "2.13.0", "a local version (+cpu) would shut out every other build"


@pytest.mark.parametrize("requirement", requirements("tensorrt", "rtx", "test", "browser", "docs"), ids=str)
def test_pin_lies_within_its_bounds(requirement: Requirement) -> None:
    pin = pins().get(canonicalize_name(requirement.name))
    if pin is None:
        assert requirement.name == "tensorrt", "not pinned: only TensorRT is, for it needs a GPU"
        return
    assert requirement.specifier.contains(pin), (
        f"constraints.txt pins {requirement.name} {pin}: outside of {requirement.specifier}"
    )


@pytest.mark.parametrize("requirement", requirements("tensorrt", "rtx"), ids=str)
def test_what_users_install_is_bounded_on_both_sides(requirement: Requirement) -> None:
    operators = {bound.operator for bound in requirement.specifier}
    assert operators == {">=", "<"}, f"{requirement}: say the oldest and, exclusive, the newest version that was tested"
