"""An op's program as the field `program` of a TensorRT plugin. docs/tensorrt.md has the format."""

from __future__ import annotations

from collections.abc import Callable

from ....errors import UserError
from .expression_text import write_expression
from .op_program import OpProgram, Rule
from .program import Variant
from .program_text import write_body

VERSION = 1
ANY = "*"
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
    check_limits(text)
    return text


def check_limits(text: str) -> None:
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


def _rule(rule: Rule) -> str:
    return ANY if rule is None else write_expression(rule)
