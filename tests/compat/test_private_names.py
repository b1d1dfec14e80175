"""Private names of torch, transformers and triton stand in compat/ and nowhere else: read from the source, file and line said.

What an AST shows: imports, attributes of what was imported (followed through aliases), attributes of any other object, and
names given to getattr, setattr, hasattr and delattr as strings. Private is a name with a leading underscore that we do not
define ourselves, a module of PRIVATE_MODULES, and whatever compat lists.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from places import ROOT

from mla2dsa.compat.private_names import Library, MovedError
from mla2dsa.compat.torch_private import TORCH
from mla2dsa.compat.transformers_private import TRANSFORMERS
from mla2dsa.compat.triton_private import TRITON

LIBRARIES = {library.name: library for library in (TORCH, TRANSFORMERS, TRITON)}
# Of no name with an underscore, and still promised to nobody.
PRIVATE_MODULES = (
    "torch.fx.experimental",
    "transformers.integrations",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.models",
    "triton.backends",
    "triton.compiler",
    "triton.knobs",
    "triton.runtime",
)
BY_STRING = {"getattr", "setattr", "hasattr", "delattr"}
SOURCES = [
    path.relative_to(ROOT)
    for path in sorted([*ROOT.glob("*.py"), *(file for folder in ROOT.iterdir() for file in folder.rglob("*.py"))])
    if path.relative_to(ROOT).parts[0] not in ("tests", "compat", "build", "dist")
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def listed() -> frozenset[str]:
    """The attributes of objects that compat lists."""
    return frozenset(name.rpartition(".")[2] for library in LIBRARIES.values() for name in library.attributes)


def defined(tree: ast.AST) -> set[str]:
    """Names that a source gives to functions, classes, variables and attributes."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) in ("self", "cls")
        ):
            found.add(node.attr)
    return found


@cache
def ours() -> frozenset[str]:
    return frozenset(name for file in SOURCES for name in defined(ast.parse((ROOT / file).read_text())))


def imported(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, name in this source, what it is: a.b.c) for everything imported from the three libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.asname or alias.name.split(".")[0], alias.name, alias.asname) for alias in node.names]
            for local, full, renamed in names:
                if full.split(".")[0] in LIBRARIES:
                    yield node.lineno, local, full if renamed else full.split(".")[0]
                    yield node.lineno, "", full
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in LIBRARIES:
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name, f"{node.module}.{alias.name}"


def standard(tree: ast.AST) -> set[str]:
    """Modules of the standard library, by their names in this source: os._exit is documented, and none of the libraries'."""
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import))
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    return {name for name in names if name.split(".")[0] in sys.stdlib_module_names}


def dotted(node: ast.expr) -> str:
    """a.b.c as text; "" where it does not start with a name."""
    if isinstance(node, ast.Name):
        return node.id
    front = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{front}.{node.attr}" if front and isinstance(node, ast.Attribute) else ""


def complaint(full: str) -> bool:
    """Whether a name of one of the libraries, spelled out, is private."""
    inside = any(full == module or full.startswith(f"{module}.") for module in PRIVATE_MODULES)
    known = {name.replace(":", ".").rstrip(".") for name in LIBRARIES[full.split(".")[0]].names}
    return inside or full in known or any(map(is_private, full.split(".")))


def private_names(source: str, own: frozenset[str] = frozenset()) -> list[tuple[int, str]]:
    """(line, name) of every private name that a source uses. own: names that are ours."""
    tree = ast.parse(source)
    found = {(line, full) for line, _, full in imported(tree) if complaint(full)}
    aliases = {local: full for _, local, full in imported(tree) if local}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            head, _, rest = dotted(node.value).partition(".")
            if head in aliases:  # aten = torch.ops.aten
                aliases[node.targets[0].id] = f"{aliases[head]}.{rest}".rstrip(".")
    mine, plain = own | defined(tree), standard(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node.value) not in plain:
            head, _, rest = dotted(node).partition(".")
            full = f"{aliases[head]}.{rest}" if head in aliases else ""
            chain = node.attr == "expr" and isinstance(node.value, ast.Attribute) and node.value.attr == "node"
            unknown = (is_private(node.attr) or (node.attr in listed() and not full)) and node.attr not in mine
            if (full and complaint(full)) or unknown or chain:
                found.add((node.lineno, full or ast.unparse(node)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_STRING:
            name = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else ""
            if isinstance(name, str) and (is_private(name) or name in listed()) and name not in mine:
                found.add((node.lineno, name))
    inner = {
        (line, name) for line, name in found for other in found if other[0] == line and other[1].startswith(f"{name}.")
    }
    return sorted(found - inner)


@pytest.mark.parametrize("file", SOURCES, ids=str)
def test_private_names_stand_in_compat_alone(file: Path) -> None:
    found = private_names((ROOT / file).read_text(), ours())
    assert not found, "give it a name of ours in compat/: " + ", ".join(
        f"{file}:{line}: {name}" for line, name in found
    )


PRIVATE = {
    "import": "import torch._dynamo",
    "import-as": "import torch.utils._pytree as pytree",
    "import-from": "from torch._subclasses import FakeTensor",
    "import-inside": "def f():\n    from transformers.integrations.moe import _default_apply_gate",
    "module-without-underscore": "from torch.fx.experimental.symbolic_shapes import ShapeEnv",
    "module-attribute": "import triton\nprint(triton.runtime.interpreter)",
    "function": "import torch\ntorch._check_value(True)",
    "op": "import torch\naten = torch.ops.aten\nCASTS = {aten._to_copy.default}",
    "alias": "import triton.language as tl\nt = tl.str_to_ty('i32', None)",
    "object": "def f(module):\n    return module._buffers",
    "object-store": "def f(program):\n    program._example_inputs = None",
    "object-without-underscore": "def f(tensor):\n    return tensor.fake_mode",
    "formula": "def f(size):\n    return size.node.expr",
    "own-object": "class M(Module):\n    def f(self):\n        return self._parameters",
    "getattr": "def f(target):\n    return getattr(target, '_schema', None)",
    "hasattr-without-underscore": "def f(kernel):\n    return hasattr(kernel, 'arg_names')",
    "class-of-a-model": "from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention",
}
ALLOWED = {
    "public": "import torch\nfrom torch.export import Dim\ntorch.export.export(None)",
    "own-attribute": "class M:\n    def __init__(self):\n        self._x = 1\n    def f(self, other):\n        return other._x",
    "own-method": "class M:\n    def _x(self): ...\n    def f(self, other):\n        return other._x()",
    "own-word": "class M:\n    def __init__(self):\n        self.fake_mode = 1\ndef f(m):\n    return m.fake_mode",
    "dunder": "def f(x):\n    return x.__dict__",
    "another-library": "from numpy import _core",
    "relative-import": "from .._private import _x",
    "compat": "from ..compat import torch_private\ntorch_private.expression(3)",
    "op": "import torch\nx = torch.ops.aten.linear.default",
    "word-of-the-language": "import triton.language as tl\ntl.math.exp2(1.0)",
}


@pytest.mark.parametrize("source", PRIVATE.values(), ids=PRIVATE)
def test_a_private_name_is_found(source: str) -> None:
    assert [line for line, _ in private_names(source)] == [len(source.splitlines())]


@pytest.mark.parametrize("source", ALLOWED.values(), ids=ALLOWED)
def test_what_is_public_or_ours_is_left_alone(source: str) -> None:
    assert private_names(source) == []


def test_an_unlisted_name_is_not_found() -> None:
    with pytest.raises(KeyError):
        TORCH.find("torch:nn")


def test_a_library_that_is_not_installed_is_not_said_to_have_moved() -> None:
    absent = Library("no_such_library", ">=1", {"no_such_library:x": "a test"}, {})
    with pytest.raises(ModuleNotFoundError):
        absent.find("no_such_library:x")


@pytest.mark.parametrize("name", ["torch._gone:x", "torch:ops.aten._gone.default", "torch:_gone", "torch._gone:"])
def test_a_name_that_is_gone_names_version_and_range(name: str) -> None:
    library = Library("torch", ">=1,<2", {name: "a test"}, {})
    said = name.replace(":", ".").rstrip(".")
    with pytest.raises(MovedError) as caught:
        library.find(name)
    assert (
        str(caught.value)
        == f"torch {version('torch')} moved {said}; mla2dsa supports torch >=1,<2: install one of those"
    )
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_supported_versions_are_those_of_the_package(library: Library) -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    requirement = next(r for r in dependencies if r.startswith((f"{library.name}>", f"{library.name} ")))
    assert requirement.split(";")[0].removeprefix(library.name).strip() == library.supported
