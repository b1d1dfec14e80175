"""A number that steers calibration or verification names the benchmark that chose it, or what it is fixed by."""

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import ROOT

ROOMS = ("optimizer/indexer", "optimizer/proof")
FILES = sorted(
    [
        *(file for room in ROOMS for file in (ROOT / room).glob("*.py")),
        ROOT / "optimizer/recipe.py",
        ROOT / "optimizer/verify.py",
    ]
)
RESULTS = ROOT / "benchmarks" / "results" / "constants.txt"
BENCHMARK = re.compile(r"benchmarks/\w+\.py")
FIXED = re.compile(r"[Ff]ixed by \w")
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*")
NO_STEERING = {"seed", "token_axis"}


@dataclass(frozen=True)
class Constant:
    """comment: on its lines and directly above them."""

    name: str
    comment: str

    @property
    def benchmarks(self) -> list[str]:
        return BENCHMARK.findall(self.comment)


def is_number(node: ast.expr | None) -> bool:
    """A number, a tuple of numbers (not of zeros, where a count starts), arithmetic on numbers; or pydantic's Field with a
    number as its default."""
    match node:
        case ast.Constant(value=value):
            return isinstance(value, int | float) and not isinstance(value, bool)
        case ast.UnaryOp(operand=operand):
            return is_number(operand)
        case ast.BinOp(left=left, right=right):
            return is_number(left) and is_number(right)
        case ast.Tuple(elts=elements):
            return all(map(is_number, elements)) and any(ast.unparse(element) != "0" for element in elements)
        case ast.Call(func=ast.Name(id="Field"), keywords=keywords):
            return any(keyword.arg == "default" and is_number(keyword.value) for keyword in keywords)
    return False


def numbers(tree: ast.Module) -> list[tuple[str, ast.stmt | ast.expr]]:
    """Module constants, defaults of class fields and of arguments."""
    found: list[tuple[str, ast.stmt | ast.expr]] = []
    for holder in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for node in holder.body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or not is_number(node.value):
                continue
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and (holder is not tree or CONSTANT.fullmatch(target.id)):
                found.append((target.id, node))
    found += defaults(tree)
    return [(name, node) for name, node in found if name not in NO_STEERING]


def defaults(tree: ast.Module) -> list[tuple[str, ast.expr]]:
    """Of the arguments of every function."""
    functions = [node.args for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    given = [
        (argument.arg, value)
        for args in functions
        for arguments, values in (([*args.posonlyargs, *args.args], args.defaults), (args.kwonlyargs, args.kw_defaults))
        for argument, value in zip(reversed(arguments), reversed(values), strict=False)
    ]
    return [(name, value) for name, value in given if value is not None and is_number(value)]


def constants(source: str) -> list[Constant]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    own_line = {line for line, token in comments.items() if not token.line[: token.start[1]].strip()}
    found = []
    for name, node in numbers(ast.parse(source)):
        lines = list(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        while lines[0] - 1 in own_line:
            lines.insert(0, lines[0] - 1)
        found.append(Constant(name, " ".join(comments[line].string for line in lines if line in comments)))
    return found


def fault(constant: Constant) -> str | None:
    if not constant.benchmarks and not FIXED.search(constant.comment):
        return "names neither a benchmark nor what it is fixed by"
    missing = [file for file in constant.benchmarks if not (ROOT / file).is_file()]
    return f"names {missing[0]}, which is not there" if missing else None


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("A = 1\nb = 2\n_C = 1e-3\nD = 'text'\nE = True", ["A", "_C"]),
        ("A = (1, 0.5)\nB = ()\nZ = (0, 0)\nC = (1, 'x')\nD = 1 << 25\nE = -1", ["A", "D", "E"]),
        ("class A:\n    rows: int = 128\n    seed: int = 0\n    lr: float = Field(default=1e-3, gt=0)", ["rows", "lr"]),
        ("def f():\n    A = 1", []),
        ("def f(a, /, b, rows=3, *, seed=0, c, lr=1e-3, d=None, e=True):\n    pass", ["rows", "lr"]),
    ],
)
def test_numbers_are_read_from_source(source: str, names: list[str]) -> None:
    assert [constant.name for constant in constants(source)] == names


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("A = 1  # benchmarks/quality.py: less is worse", None, id="beside"),
        pytest.param("# benchmarks/quality.py: less\n# is worse\nA = 1", None, id="above"),
        pytest.param("A = (\n    1,  # benchmarks/quality.py: less is worse\n)", None, id="inside"),
        pytest.param("A = 1  # fixed by DeepSeek-V3.2's config.json", None, id="fixed"),
        pytest.param("A = 1", "names neither", id="silent"),
        pytest.param("A = 1  # a good value", "names neither", id="no reason"),
        pytest.param("# benchmarks/quality.py: x\n\nA = 1", "names neither", id="of something else"),
        pytest.param("B = 1  # benchmarks/quality.py: x\nA = 1", "names neither", id="of the line before"),
        pytest.param("A = 1  # benchmarks/no_such.py: x", "which is not there", id="gone"),
    ],
)
def test_reasons_are_read_from_source(source: str, expected: str | None) -> None:
    found = fault(constants(source)[-1])
    assert found is None if expected is None else expected in (found or "")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_number_has_a_reason(file: Path) -> None:
    faults = {constant.name: fault(constant) for constant in constants(file.read_text())}
    assert not {name: text for name, text in faults.items() if text}


def swept() -> list[str]:
    found = (constant for file in FILES for constant in constants(file.read_text()))
    return sorted({constant.name for constant in found if "benchmarks/constants.py" in constant.benchmarks})


@pytest.mark.parametrize("name", swept())
def test_the_benchmark_knows_it(name: str) -> None:
    script = (ROOT / "benchmarks" / "constants.py").read_text()
    assert re.search(rf'Sweep\("[\w/]+\.{name}"|^    "{name}": limits\.', script, re.MULTILINE), (
        f"constants.py does not sweep {name}"
    )


def test_results_are_of_constants_there_are() -> None:
    known = {constant.name for file in FILES for constant in constants(file.read_text())}
    tables = re.findall(r"^[\w/]+\.(\w+)[: ]", RESULTS.read_text(), re.MULTILINE)
    assert tables
    assert set(tables) <= known
