"""What an op does on a GPU: a short program of kernel launches, with every size an expression over its tensors' dims.

One program has three readers: torch (expressions become numbers, kernels are launched through Triton), the ahead-of-time
packer (which kernels to compile) and a launcher without Python, which reads the expressions as text. Hence no shape may
be looked at while a program is built; what decides its form (dtype, heads, topk, architecture) is known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Env = Mapping[str, int]


@dataclass(frozen=True)
class Expr:
    """An integer: a number, the size of dim `axis` of tensor `tensor` (inputs first, then outputs), a loop variable, or a sum,
    difference, product, quotient (floor, and ceil) or extreme of two. Operators build it: (dim(0, 1) + 3) // 4."""

    op: str  # int | dim | var | + | - | * | // | ceil | min | max
    args: tuple[Expr | int | str, ...]

    def __add__(self, other: Expr | int) -> Expr:
        return _binary("+", self, other)

    def __radd__(self, other: int) -> Expr:
        return _binary("+", integer(other), self)

    def __sub__(self, other: Expr | int) -> Expr:
        return _binary("-", self, other)

    def __rsub__(self, other: int) -> Expr:
        return _binary("-", integer(other), self)

    def __mul__(self, other: Expr | int) -> Expr:
        return _binary("*", self, other)

    def __rmul__(self, other: int) -> Expr:
        return _binary("*", integer(other), self)

    def __floordiv__(self, other: Expr | int) -> Expr:
        return _binary("//", self, other)

    def value(self, shapes: Sequence[Sequence[int]], env: Env | None = None) -> int:
        """The number for tensors of these shapes and these loop variables."""
        if self.op == "int":
            return int(self.args[0])  # type: ignore[arg-type]
        if self.op == "dim":
            tensor, axis = self.args
            return int(shapes[tensor][axis])  # type: ignore[index]
        if self.op == "var":
            return (env or {})[self.args[0]]  # type: ignore[index]
        a, b = (arg.value(shapes, env) for arg in self.args if isinstance(arg, Expr))
        return _EVALUATE[self.op](a, b)


_EVALUATE: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "ceil": lambda a, b: -(-a // b),
    "min": min,
    "max": max,
}


def integer(number: int | Expr) -> Expr:
    return number if isinstance(number, Expr) else Expr("int", (number,))


def dim(tensor: int, axis: int) -> Expr:
    return Expr("dim", (tensor, axis))


def variable(name: str) -> Expr:
    return Expr("var", (name,))


def ceil_div(a: Expr | int, b: Expr | int) -> Expr:
    return _binary("ceil", integer(a), b)


def minimum(a: Expr | int, b: Expr | int) -> Expr:
    return _binary("min", integer(a), b)


def maximum(a: Expr | int, b: Expr | int) -> Expr:
    return _binary("max", integer(a), b)


def _binary(op: str, a: Expr, b: Expr | int) -> Expr:
    """Numbers are folded, so that a program reads as a person would write it."""
    b = integer(b)
    if a.op == b.op == "int":
        return integer(_EVALUATE[op](int(a.args[0]), int(b.args[0])))  # type: ignore[arg-type]
    return Expr(op, (a, b))


@dataclass(frozen=True)
class Variant:
    """One compilation of a Triton kernel: what the compiler has to know, for any GPU.

    kernel: its name in the registry of kernels. constants: its constexpr arguments, and None for a pointer that it does
    without. arguments: names and Triton types ("*bf16", "i32", "i64", "fp32") of all others, in order. aligned: arguments
    divisible by 16 (pointers: 16-byte aligned).
    """

    kernel: str
    constants: tuple[tuple[str, int | bool | str | None], ...]
    arguments: tuple[tuple[str, str], ...]
    aligned: frozenset[str]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tensor:
    """A pointer argument: tensor `number` (inputs first, then outputs), `offset` bytes into it."""

    number: int
    offset: Expr = Expr("int", (0,))


@dataclass(frozen=True)
class Workspace:
    """A pointer argument: `offset` bytes into the workspace."""

    offset: Expr


@dataclass(frozen=True)
class Launch:
    """One kernel launch. arguments: one per entry of variant.arguments; Expr for integers, float for floats."""

    variant: Variant
    grid: tuple[Expr, Expr, Expr]
    arguments: tuple[Tensor | Workspace | Expr | float, ...]


@dataclass(frozen=True)
class Repeat:
    """The launches for variable = 0, step, 2 step ... below stop, one after the other."""

    variable: str
    stop: Expr
    step: Expr
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class LaunchProgram:
    """outputs: (dtype, shape) each. workspace: bytes. steps run in order; a later one sees what an earlier one wrote.

    reserve: bytes that are enough for these dims and all smaller ones (it never shrinks as a dim grows), for a host that
    sets the workspace aside beforehand; None where `workspace` is like that itself. aliases: (output, input) that are the
    same memory: the output is what the steps leave of the input.
    """

    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, tuple[Expr, ...]], ...]
    workspace: Expr
    steps: tuple[Launch | Repeat, ...]
    reserve: Expr | None = None
    aliases: tuple[tuple[int, int], ...] = ()

    def variants(self) -> tuple[Variant, ...]:
        """Every kernel it launches, once."""
        launches = [
            launch for step in self.steps for launch in (step.launches if isinstance(step, Repeat) else (step,))
        ]
        return tuple(dict.fromkeys(launch.variant for launch in launches))
