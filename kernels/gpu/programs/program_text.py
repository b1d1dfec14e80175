"""Programs as text, one line a step: what the manifest of a pack holds and a launcher without Python reads.

    mla2dsa 1
    in bf16                                    each input's element type
    out i32 d0.0 d0.1 2048,d1.1,<              each output's element type and dims
    alias 0 0                                  output 0 is input 0, updated in place
    let x0 d0.0,d0.1,*,d1.1,4,^,*              a name for an expression, from here on
    workspace x0,4,*                           bytes
    reserve d0.0,d0.1,*                        bytes enough for all smaller dims too, if that is not the workspace
    repeat t d0.1 256                          the steps up to `end` for t = 0, 256, 512 ... below d0.1
    launch KERNEL d0.0 1 1 t0 w0 id0.1 n n     kernel, grid, then one word for each parameter of the binary
    end

Expressions are those of `expression_text`, over the dims of the tensors, inputs first, then outputs. A parameter is tN
or tN@EXPRESSION (tensor N, so many bytes into it), wEXPRESSION (so many bytes into the workspace), iEXPRESSION (32 bits),
lEXPRESSION (64 bits), fXXXXXXXX (the bits of a float32), n (null; the two pointers that Triton appends to each kernel).
A name given inside of a `repeat` holds to its `end`, and is computed anew each time.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping

from ....errors import UserError
from .expression_text import read_expression, repeated, variables, write_expression
from .program import Expr, Launch, LaunchProgram, Repeat, Tensor, Variant, Workspace, integer

VERSION = 1
HIDDEN_WORDS = ("n", "n")
_INTEGERS = {"i32": "i", "u32": "i", "i64": "l", "u64": "l"}
_NONE = integer(0)


def write_program(program: LaunchProgram, names: Callable[[Variant], str]) -> list[str]:
    """The lines; names: what to call each kernel (no spaces). Raises UserError for an argument its type cannot hold."""
    return _Writer(names).lines(program)


def write_body(program: LaunchProgram, names: Callable[[Variant], str]) -> list[str]:
    """The lines of `write_program` that come after inputs, outputs and aliases."""
    return _Writer(names).body(program)


class _Writer:
    def __init__(self, names: Callable[[Variant], str]) -> None:
        self._kernel = names
        self._known: dict[Expr, str] = {}
        self._count = 0

    def lines(self, program: LaunchProgram) -> list[str]:
        lines = [f"mla2dsa {VERSION}", *(f"in {dtype}" for dtype in program.inputs)]
        lines += [" ".join(["out", dtype, *map(self._text, shape)]) for dtype, shape in program.outputs]
        lines += [f"alias {output} {source}" for output, source in program.aliases]
        return lines + self.body(program)

    def body(self, program: LaunchProgram) -> list[str]:
        """What comes after inputs and outputs."""
        reserve = [] if program.reserve is None else [program.reserve]
        everything = [program.workspace, *reserve, *(expr for step in program.steps for expr in _expressions(step))]
        lines = self._define(expr for expr in repeated(everything) if not variables(expr))
        lines.append(f"workspace {self._text(program.workspace)}")
        lines += [f"reserve {self._text(expr)}" for expr in reserve]
        for step in program.steps:
            lines += [self._launch(step)] if isinstance(step, Launch) else self._loop(step)
        return lines

    def _loop(self, loop: Repeat) -> list[str]:
        outside = dict(self._known)
        head = f"repeat {loop.variable} {self._text(loop.stop)} {self._text(loop.step)}"
        inside = [expr for launch in loop.launches for expr in _expressions(launch)]
        body = self._define(repeated(inside, outside))
        body += [self._launch(launch) for launch in loop.launches]
        self._known = outside
        return [head, *body, "end"]

    def _define(self, exprs: Iterable[Expr]) -> list[str]:
        lines = []
        for expr in exprs:
            name = f"x{self._count}"
            lines.append(f"let {name} {self._text(expr)}")
            self._known[expr] = name
            self._count += 1
        return lines

    def _text(self, expr: Expr) -> str:
        return write_expression(expr, self._known)

    def _launch(self, launch: Launch) -> str:
        types = launch.variant.arguments
        if len(types) != len(launch.arguments):
            raise UserError(
                f"kernel {launch.variant.kernel} takes {len(types)} arguments, the launch has {len(launch.arguments)}"
            )
        words = [self._word(name, kind, value) for (name, kind), value in zip(types, launch.arguments, strict=True)]
        return " ".join(["launch", self._kernel(launch.variant), *map(self._text, launch.grid), *words, *HIDDEN_WORDS])

    def _word(self, name: str, kind: str, value: Tensor | Workspace | Expr | float) -> str:
        if kind.startswith("*") and isinstance(value, Tensor):
            return f"t{value.number}" + ("" if value.offset == _NONE else f"@{self._text(value.offset)}")
        if kind.startswith("*") and isinstance(value, Workspace):
            return f"w{self._text(value.offset)}"
        if kind in _INTEGERS and isinstance(value, Expr):
            return _INTEGERS[kind] + self._text(value)
        if kind == "fp32" and isinstance(value, float):
            return f"f{struct.pack('>f', value).hex()}"
        raise UserError(f"argument {name} of type {kind} cannot be {type(value).__name__} {value}")


def _expressions(step: Launch | Repeat) -> list[Expr]:
    if isinstance(step, Repeat):
        return [step.stop, step.step, *(expr for launch in step.launches for expr in _expressions(launch))]
    offsets = [value.offset for value in step.arguments if isinstance(value, Tensor | Workspace)]
    return [*step.grid, *(value for value in step.arguments if isinstance(value, Expr)), *offsets]


def read_program(lines: list[str], kernels: Mapping[str, Variant]) -> LaunchProgram:
    """Inverse of `write_program`; kernels: variant by the name in the text. Raises UserError with the line's number."""
    reader = ProgramReader(kernels)
    rows = enumerate((line.split() for line in lines), 1)
    number, words = next(rows, (1, []))
    if words != ["mla2dsa", str(VERSION)]:
        raise UserError(f"line {number}: expected 'mla2dsa {VERSION}', the version of programs that is known here")
    for number, words in rows:
        try:
            reader.line(words)
        except UserError as error:
            raise UserError(f"line {number}: {error}") from None
    return reader.program()


class ProgramReader:
    """Takes a program line by line, as words."""

    def __init__(self, kernels: Mapping[str, Variant]) -> None:
        self._kernels = kernels
        self._inputs: list[str] = []
        self._outputs: list[tuple[str, tuple[Expr, ...]]] = []
        self._aliases: list[tuple[int, int]] = []
        self._workspace: Expr | None = None
        self._reserve: Expr | None = None
        self._steps: list[Launch | Repeat] = []
        self._loop: tuple[str, Expr, Expr] | None = None
        self._body: list[Launch] = []
        self._names: dict[str, Expr] = {}
        self._outside: dict[str, Expr] = {}

    def line(self, words: list[str]) -> None:
        """The next one. Raises UserError for one that is not known, or not here."""
        match words:
            case ["in", dtype]:
                self._inputs.append(dtype)
            case ["out", dtype, *dims]:
                self._outputs.append((dtype, tuple(map(self._expression, dims))))
            case ["alias", output, source] if re.fullmatch(r"\d+ \d+", f"{output} {source}", re.ASCII):
                self._aliases.append((int(output), int(source)))
            case ["let", name, text] if re.fullmatch(r"x\d+", name, re.ASCII) and name not in self._names:
                self._names[name] = self._expression(text)
            case ["workspace", size]:
                self._workspace = self._expression(size)
            case ["reserve", size]:
                self._reserve = self._expression(size)
            case ["repeat", name, stop, step] if self._loop is None:
                self._loop = (name, self._expression(stop), self._expression(step))
                self._outside = dict(self._names)
            case ["end"] if self._loop is not None:
                self._steps.append(Repeat(*self._loop, tuple(self._body)))
                self._loop, self._body, self._names = None, [], self._outside
            case ["launch", kernel, x, y, z, *arguments]:
                launch = self._launch(kernel, (x, y, z), arguments)
                (self._steps if self._loop is None else self._body).append(launch)
            case _:
                raise UserError(f"{' '.join(words)!r} is not known here")

    def program(self) -> LaunchProgram:
        """What the lines say. Raises UserError if some are missing."""
        if self._workspace is None or self._loop is not None:
            raise UserError("the program has no workspace line" if self._loop is None else "repeat without end")
        return LaunchProgram(
            tuple(self._inputs),
            tuple(self._outputs),
            self._workspace,
            tuple(self._steps),
            self._reserve,
            tuple(self._aliases),
        )

    def _expression(self, text: str) -> Expr:
        return read_expression(text, self._names)

    def _launch(self, kernel: str, grid: tuple[str, str, str], words: list[str]) -> Launch:
        if kernel not in self._kernels:
            raise UserError(f"kernel {kernel} is not in the pack")
        variant = self._kernels[kernel]
        visible = words[: -len(HIDDEN_WORDS)]
        if tuple(words[-len(HIDDEN_WORDS) :]) != HIDDEN_WORDS or len(visible) != len(variant.arguments):
            raise UserError(f"{kernel} takes {len(variant.arguments)} arguments and two nulls, got {' '.join(words)!r}")
        arguments = tuple(
            self._argument(word, kind) for word, (_, kind) in zip(visible, variant.arguments, strict=True)
        )
        x, y, z = map(self._expression, grid)
        return Launch(variant, (x, y, z), arguments)

    def _argument(self, word: str, kind: str) -> Tensor | Workspace | Expr | float:
        letter, rest = word[0], word[1:]
        if kind.startswith("*") and letter == "t":
            number, _, offset = rest.partition("@")
            if re.fullmatch(r"\d+", number, re.ASCII):
                return Tensor(int(number), self._expression(offset) if offset else _NONE)
        elif kind.startswith("*") and letter == "w":
            return Workspace(self._expression(rest))
        elif letter == _INTEGERS.get(kind):
            return self._expression(rest)
        elif kind == "fp32" and re.fullmatch(r"f[0-9a-f]{8}", word):
            value: float = struct.unpack(">f", bytes.fromhex(rest))[0]
            return value
        raise UserError(f"argument {word!r} does not fit type {kind}")
