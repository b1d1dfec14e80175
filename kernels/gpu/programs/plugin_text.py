"""An op's program as the field `program` of a TensorRT plugin. docs/tensorrt.md has the format."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ....errors import UserError
from .expression_text import read_expression, write_expression
from .op_program import Form, OpProgram, Rule
from .program import Expr, Variant
from .program_text import ProgramReader, write_body

VERSION = 1
_ANY = "*"
# What the plugin takes (docs/tensorrt.md), so that what it would refuse is not written.
MOST_BYTES, MOST_TENSORS, MOST_FORMS, MOST_LAUNCHES, MOST_PARAMETERS, MOST_PARTS, MOST_NAMES = (
    2**20,
    16,
    64,
    64,
    64,
    256,
    4096,
)


def write_op(op: OpProgram, names: Callable[[Variant], str]) -> str:
    """The text; names: what to call each kernel (no spaces)."""
    lines = [f"mla2dsa-plugin {VERSION}", f"op {op.op}"]
    lines += [" ".join(["in", kind, *map(_rule, rules)]) for kind, rules in op.inputs]
    lines += [" ".join(["out", kind, *map(write_expression, dims)]) for kind, dims in op.outputs]
    lines += [f"alias {output} {source}" for output, source in op.aliases]
    for form in op.forms:
        sms = ",".join(map(str, form.sms))
        lines.append(f"form {form.name} {sms} {write_expression(form.guard)}")
        lines += [*write_body(form.program, names), "end"]
    text = "\n".join(lines) + "\n"
    _check(text)
    return text


def read_op(text: str, kernels: Mapping[str, Variant]) -> OpProgram:
    """Inverse of `write_op`; kernels: variant by the name in the text. Raises UserError with the line's number."""
    _check(text)
    reader = _Reader(kernels)
    rows = enumerate(text.removesuffix("\n").split("\n"), 1)
    number, line = next(rows)
    if line != f"mla2dsa-plugin {VERSION}":
        raise UserError(f"line {number}: expected 'mla2dsa-plugin {VERSION}', the version that is known here")
    for number, line in rows:
        try:
            reader.line(line.split(" "))
        except UserError as error:
            raise UserError(f"line {number}: {error}") from None
    return reader.op()


def _check(text: str) -> None:
    """Raises UserError where the text is over a limit of the format."""
    if len(text) > MOST_BYTES:
        raise UserError(f"the program has {len(text)} bytes, the most is {MOST_BYTES}")
    lines = [line.split(" ") for line in text.split("\n")]
    if sum(line[0] in ("in", "out") for line in lines) > MOST_TENSORS:
        raise UserError(f"the program has more than {MOST_TENSORS} inputs and outputs")
    if sum(line[0] == "form" for line in lines) > MOST_FORMS:
        raise UserError(f"the program has more than {MOST_FORMS} forms")
    counts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        counts = {} if line[0] == "form" else counts
        counts[line[0]] = counts.get(line[0], 0) + 1
        over = counts.get("launch", 0) > MOST_LAUNCHES or counts.get("let", 0) > MOST_NAMES
        over |= line[0] == "launch" and len(line) - 5 > MOST_PARAMETERS
        over |= any(word.count(",") >= MOST_PARTS for word in line)
        if over:
            raise UserError(f"line {number}: over a limit of the format ({' '.join(line)[:60]})")


class _Reader:
    def __init__(self, kernels: Mapping[str, Variant]) -> None:
        self._kernels = kernels
        self._op = ""
        self._inputs: list[tuple[str, tuple[Rule, ...]]] = []
        self._outputs: list[tuple[str, tuple[Expr, ...]]] = []
        self._aliases: list[tuple[int, int]] = []
        self._forms: list[Form] = []
        self._open: tuple[str, tuple[int, ...], Expr] | None = None
        self._body = ProgramReader(kernels)

    def line(self, words: list[str]) -> None:
        if self._open is not None:
            self._inside(self._open, words)
            return
        match words:
            case ["op", name] if not self._op:
                self._op = name
            case ["in", kind, *rules] if not self._outputs:
                self._inputs.append((kind, tuple(None if it == _ANY else read_expression(it) for it in rules)))
            case ["out", kind, *dims]:
                self._outputs.append((kind, tuple(map(read_expression, dims))))
            case ["alias", output, source] if output.isdecimal() and source.isdecimal():
                self._aliases.append((int(output), int(source)))
            case ["form", name, sms, guard] if re.fullmatch(r"\d+(,\d+)*", sms, re.ASCII):
                self._open = (name, tuple(map(int, sms.split(","))), read_expression(guard))
                self._body = self._fresh()
            case _:
                raise UserError(f"{' '.join(words)!r} is not known here")

    def op(self) -> OpProgram:
        if not self._forms or self._open is not None:
            raise UserError("the program has no form" if self._open is None else "form without end")
        return OpProgram(self._op, tuple(self._inputs), tuple(self._outputs), tuple(self._aliases), tuple(self._forms))

    def _inside(self, form: tuple[str, tuple[int, ...], Expr], words: list[str]) -> None:
        if words == ["end"] and not self._body.in_loop():
            self._forms.append(Form(*form, self._body.program()))
            self._open = None
        elif words[0] in ("in", "out", "alias"):
            raise UserError(f"{' '.join(words)!r} is not known inside of a form")
        else:
            self._body.line(words)

    def _fresh(self) -> ProgramReader:
        """A reader that knows inputs and outputs: those of the op are those of each form's program."""
        body = ProgramReader(self._kernels)
        for kind, _ in self._inputs:
            body.line(["in", kind])
        for kind, dims in self._outputs:
            body.line(["out", kind, *map(write_expression, dims)])
        for output, source in self._aliases:
            body.line(["alias", str(output), str(source)])
        return body


def _rule(rule: Rule) -> str:
    return _ANY if rule is None else write_expression(rule)
