"""The shape of the package: imports run one way, heavy libraries load late, files are short, `--help` is quick."""

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT, package_files

# Whom each room may import, beside itself: rooms by their path, a file of the root by its name, the root itself (which holds
# nothing but the version) as "". Where a line is longer than its neighbours', its comment says why.
LOWEST = {"", "errors"}
FILES = {*LOWEST, "files", "files/manifests", "files/model"}
KERNELS = {*FILES, "compat", "kernels"}
GRAPHS = {"passes", "passes/graph", "passes/matching"}
SHARED = {*KERNELS, "runtime", *GRAPHS, "exporters/dsa"}
MODEL = {*SHARED, "exporters/onnx_model"}  # which tensors an ONNX model takes is answered by what reads the checkpoint
EXPORTERS = {"exporters/dsa", "exporters/engine", "exporters/onnx_model", "exporters/report"}
OPTIMIZER = {
    "optimizer",
    "optimizer/after",
    "optimizer/answers",
    "optimizer/before",
    "optimizer/cost",
    "optimizer/indexer",
    "optimizer/model",
    "optimizer/proof",
    "optimizer/proof/tasks",
    "optimizer/recipes",
    "optimizer/share",
}
MAY_IMPORT = {
    "": {"api"},  # when one of its names is asked for: PEP 562
    "errors": set(),
    "stopping": set(),
    "files": LOWEST,
    "files/manifests": {*LOWEST, "files"},
    "files/model": {*LOWEST, "files"},
    "compat": FILES,
    "kernels": {*FILES, "compat", "kernels/gpu"},  # ops are registered here, and dispatched to a GPU when one is asked
    "kernels/gpu": {*KERNELS, "kernels/gpu/emulator", "kernels/gpu/programs", "kernels/gpu/triton_code"},
    "kernels/gpu/triton_code": {*LOWEST, "compat"},
    "kernels/gpu/programs": {*FILES, "kernels"},
    "kernels/gpu/emulator": {*FILES, "compat"},
    "kernels/gpu/binaries": {*FILES, "compat", "kernels/gpu/programs", "kernels/gpu/triton_code"},
    "passes/graph": KERNELS,
    "passes/matching": {*KERNELS, "passes/graph"},
    "passes/building": {*KERNELS, "passes/graph", "passes/matching"},
    "passes": {*KERNELS, "passes/graph", "passes/matching", "passes/building"},
    "runtime/tiled": {*KERNELS, "passes/graph"},  # a graph is run piece by piece: it has to be read
    "runtime": {*KERNELS, "passes/graph", "runtime/tiled"},
    "exporters": set(),
    "exporters/dsa": KERNELS,
    "exporters/onnx_model": KERNELS,
    "exporters/report": LOWEST,
    "exporters/engine": {*KERNELS, "exporters/onnx_model", "kernels/gpu/binaries", "kernels/gpu/programs"},
    # what a conversion will take is counted from the graphs it streams
    "optimizer/before": {
        *KERNELS,
        "passes",
        "passes/matching",
        "runtime",
        "exporters/dsa",
        "optimizer",
        "optimizer/indexer",
        "optimizer/model",
        "optimizer/proof",
        "optimizer/recipes",
        "optimizer/share",
    },
    "optimizer/after": {
        *SHARED,
        "optimizer",
        "optimizer/before",
        "optimizer/indexer",
        "optimizer/model",
        "optimizer/share",
    },
    "optimizer/recipes": {*FILES, "kernels", "optimizer", "optimizer/indexer"},
    "optimizer/model": MODEL,
    "optimizer/answers": {*FILES, "runtime", "optimizer/model"},
    "optimizer/cost": {*LOWEST, "kernels", "passes/matching", "optimizer"},
    "optimizer/indexer": {*SHARED, "optimizer/model"},
    "optimizer/share": {*SHARED, "optimizer/model", "optimizer/indexer"},
    "optimizer/proof": {*SHARED, "optimizer/model", "optimizer/indexer", "optimizer/share"},
    "optimizer/proof/tasks": {*SHARED, "optimizer/model", "optimizer/indexer", "optimizer/proof"},
    "optimizer": {*SHARED, *EXPORTERS, *OPTIMIZER, "kernels/gpu/binaries", "kernels/gpu/programs"},
    "commands/show": {*FILES, *EXPORTERS, *OPTIMIZER},
    "serving": {*LOWEST, "runtime", "optimizer/answers"},
    "commands": {"compat", *FILES, *EXPORTERS, *OPTIMIZER, "runtime", "serving", "commands/show"},
    "cli": {*LOWEST, "stopping", "commands"},
    "api": {*FILES, *OPTIMIZER, "commands/show"},
    "__main__": {"cli"},
}
MOST_FILES = 15  # directly in a room
MAX_FUNCTION = 40  # lines; kernels may be longer, since each is readable alone
HEAVY = {
    "huggingface_hub",
    "matplotlib",
    "onnxruntime",
    "rich",
    "starlette",
    "tensorrt",
    "tensorrt_rtx",
    "transformers",
    "uvicorn",
}
MAX_LINES = 400


def python_files() -> list[Path]:
    extra = (file for folder in ("tests", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py"))
    return [Path("setup.py"), *package_files(), *sorted(file.relative_to(ROOT) for file in extra)]


def part_of(file: Path) -> str:
    """optimizer/plan.py -> optimizer, passes/graph/editor.py -> passes/graph, cli.py -> cli, __init__.py of the root -> ""."""
    return str(file.parent) if len(file.parts) > 1 else file.stem.replace("__init__", "")


def ours(node: ast.Import | ast.ImportFrom, folder: tuple[str, ...]) -> Iterator[str]:
    """The rooms of mla2dsa that an import statement in `folder` reaches. Importing a name of the root gives ""."""
    if isinstance(node, ast.Import):
        targets = [alias.name.split(".") for alias in node.names]
        targets = [target[1:] for target in targets if target[0] == "mla2dsa"]
    else:
        module = node.module.split(".") if node.module else []
        if node.level == 0 and module[:1] != ["mla2dsa"]:
            return
        base = [*folder[: len(folder) + 1 - node.level], *module] if node.level else module[1:]
        targets = [[*base, alias.name] for alias in node.names]
    for target in targets:
        rooms = ["/".join(target[:length]) for length in range(len(target), 0, -1)]
        yield next((room for room in rooms if room in MAY_IMPORT), "")


def imports_of(file: Path, source: str) -> set[str]:
    """The parts of mla2dsa that a file imports anywhere, inside functions too, without its own part."""
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {part for node in statements for part in ours(node, file.parts[:-1])} - {part_of(file)}


def loaded_at_import(source: str) -> set[str]:
    """Top-level names of the modules that importing a file loads (functions and TYPE_CHECKING blocks do not count)."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        waiting += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize(
    ("file", "source", "parts"),
    [
        ("passes/tap.py", "from ..kernels.ops import sparse_mla", {"kernels"}),
        ("passes/tap.py", "from .find_mla import MlaSite", set()),
        ("passes/tap.py", "from .graph.editor import ProgramEditor", {"passes/graph"}),
        ("passes/tap.py", "from .. import exporters", {"exporters"}),
        ("passes/tap.py", "from ..cli import main", {"cli"}),
        ("passes/tap.py", "def f():\n    from ..files.staging import x", {"files"}),
        ("passes/graph/editor.py", "from ...optimizer import plan", {"optimizer"}),
        ("passes/graph/editor.py", "from ..matching import rope", {"passes/matching"}),
        ("passes/graph/editor.py", "from ..tap import tap", {"passes"}),
        ("kernels/ops.py", "import mla2dsa.passes.matching.rope", {"passes/matching"}),
        ("kernels/ops.py", "from mla2dsa import cli", {"cli"}),
        ("cli.py", "from . import __version__\nfrom .errors import UserError", {"", "errors"}),
        ("cli.py", "import torch\nfrom json import loads", set()),
    ],
)
def test_imports_are_read_from_source(file: str, source: str, parts: set[str]) -> None:
    assert imports_of(Path(file), source) == parts


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import transformers.utils", {"transformers"}),
        ("try:\n    from huggingface_hub import snapshot_download\nexcept ImportError:\n    pass", {"huggingface_hub"}),
        ("class A:\n    import rich", {"rich"}),
        ("def f():\n    import transformers", set()),
        ("if TYPE_CHECKING:\n    import transformers", set()),
        ("from .transformers import x", set()),
    ],
)
def test_loads_are_read_from_source(source: str, names: set[str]) -> None:
    assert loaded_at_import(source) == names


def test_every_room_is_there() -> None:
    assert {part_of(file) for file in package_files()} == set(MAY_IMPORT)


@pytest.mark.parametrize("file", package_files(), ids=str)
def test_imports_run_one_way(file: Path) -> None:
    forbidden = imports_of(file, (ROOT / file).read_text()) - MAY_IMPORT[part_of(file)]
    assert not forbidden, (
        f"{file} must not import {sorted(forbidden)}: "
        "cli > commands > serving > optimizer > runtime | exporters | passes > files | compat | kernels"
    )


@pytest.mark.parametrize("room", sorted({part_of(file) for file in package_files() if len(file.parts) > 1}))
def test_no_room_is_full(room: str) -> None:
    files = [file for file in package_files() if part_of(file) == room and file.name != "__init__.py"]
    assert len(files) <= MOST_FILES, f"{room} holds {len(files)} files: cut it by what flows through it"


@pytest.mark.parametrize("file", package_files(), ids=str)
def test_heavy_libraries_load_inside_functions(file: Path) -> None:
    heavy = loaded_at_import((ROOT / file).read_text()) & HEAVY
    assert not heavy, f"{file} imports {sorted(heavy)} at its top: move that into the function that needs it"


STARTS_WITH = ["__init__.py", "__main__.py", "errors.py", "stopping.py", "cli.py", *(ROOT / "commands").glob("*.py")]


@pytest.mark.parametrize("file", STARTS_WITH, ids=lambda file: str(file).removeprefix(f"{ROOT}/"))
def test_command_line_starts_on_the_standard_library_alone(file: str | Path) -> None:
    foreign = loaded_at_import((ROOT / file).read_text()) - set(sys.stdlib_module_names)
    assert not foreign, f"{file} imports {sorted(foreign)} at its top: --help would wait for them"


@pytest.mark.parametrize("file", python_files(), ids=str)
def test_file_is_short(file: Path) -> None:
    lines = len((ROOT / file).read_text().splitlines())
    assert lines <= MAX_LINES, f"{file} has {lines} lines: split it by what its parts do"


@pytest.mark.parametrize(
    "file", [file for file in python_files() if file.parts[0] not in ("kernels", "tests")], ids=str
)
def test_functions_are_short(file: Path) -> None:
    nodes = ast.walk(ast.parse((ROOT / file).read_text()))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION}
    assert not long, f"{file}: {long} lines, at most {MAX_FUNCTION}"


@pytest.mark.parametrize("file", [file for file in package_files() if (ROOT / file).stat().st_size], ids=str)
def test_file_opens_with_what_it_is(file: Path) -> None:
    assert ast.get_docstring(ast.parse((ROOT / file).read_text())), f"{file} has no module docstring"


def run_help(*arguments: str, tmp_path: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """`mla2dsa ... --help` away from the repository, and its CPU seconds (wall time depends on the neighbours)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "mla2dsa", *arguments, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "command",
    [(), ("plan",), ("convert",), ("verify",), ("strip",), ("env",), ("kernels",), ("kernels", "build")],
    ids=" ".join,
)
def test_help_answers_at_once(command: tuple[str, ...], tmp_path: Path) -> None:
    done, seconds = run_help(*command, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage: mla2dsa" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in imported, "-X importtime was not read correctly"
    assert not imported & {"torch", "numpy", "pydantic", "safetensors", "triton", "yaml", *HEAVY}
    assert seconds < 0.5, f"--help took {seconds:.2f} s of CPU time"
