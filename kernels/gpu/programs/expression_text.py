"""Expressions as text: reverse Polish, its parts joined by commas, with names for what comes up more than once.

    d0.1,4,^        the size of dim 1 of tensor 0, divided by 4, rounded up
    x2,vt,-         what `let x2 ...` named, less the loop variable t

Parts: integers; dN.A; vNAME; xN; + - * / (floor) ^ (quotient rounded up) < (least of two) > (greatest of two).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ....errors import UserError
from .program import Expr, dim, integer, variable

_SIGNS = {"+": "+", "-": "-", "*": "*", "//": "/", "ceil": "^", "min": "<", "max": ">"}
_OPERATORS = {sign: op for op, sign in _SIGNS.items()}
_WORTH_A_NAME = 5  # parts of the text


def write_expression(expr: Expr, names: Mapping[Expr, str] | None = None) -> str:
    """Reverse Polish, without spaces; names: expressions that have a name."""
    if names and expr in names:
        return names[expr]
    if expr.op == "int":
        return str(expr.args[0])
    if expr.op == "dim":
        return f"d{expr.args[0]}.{expr.args[1]}"
    if expr.op == "var":
        return f"v{expr.args[0]}"
    return ",".join([*(write_expression(part, names) for part in _operands(expr)), _SIGNS[expr.op]])


def read_expression(text: str, definitions: Mapping[str, Expr] | None = None) -> Expr:
    """Inverse of `write_expression`; definitions: expression by name. Raises UserError on anything else."""
    stack: list[Expr] = []
    for part in text.split(","):
        if part in _OPERATORS:
            if len(stack) < 2:
                raise UserError(f"expression {text!r}: {part} has no two operands")
            right = stack.pop()
            stack.append(Expr(_OPERATORS[part], (stack.pop(), right)))
        elif definitions and part in definitions:
            stack.append(definitions[part])
        else:
            stack.append(_leaf(part, text))
    if len(stack) != 1:
        raise UserError(f"expression {text!r} leaves {len(stack)} values")
    return stack[0]


def repeated(exprs: Iterable[Expr], named: Iterable[Expr] = ()) -> list[Expr]:
    """Every part that comes up more than once and is worth a name, parts of others first; without those already named."""
    uses: dict[Expr, int] = {}
    size: dict[Expr, int] = {}
    known = set(named)

    def visit(expr: Expr) -> int:
        uses[expr] = uses.get(expr, 0) + 1
        if uses[expr] == 1:
            size[expr] = 1 if expr in known else 1 + sum(visit(part) for part in _operands(expr))
        return size[expr]

    for expr in exprs:
        visit(expr)
    worth = [expr for expr in size if uses[expr] > 1 and size[expr] >= _WORTH_A_NAME and expr not in known]
    return sorted(worth, key=lambda expr: size[expr])


def variables(expr: Expr) -> frozenset[str]:
    """The loop variables in it."""
    if expr.op == "var":
        return frozenset((str(expr.args[0]),))
    return frozenset().union(*map(variables, _operands(expr)))


def _operands(expr: Expr) -> list[Expr]:
    return [part for part in expr.args if isinstance(part, Expr)]


def _leaf(part: str, text: str) -> Expr:
    if re.fullmatch(r"-?\d+", part, re.ASCII):
        return integer(int(part))
    at = re.fullmatch(r"d(\d+)\.(\d+)", part, re.ASCII)
    if at:
        return dim(int(at[1]), int(at[2]))
    name = re.fullmatch(r"v([A-Za-z_]\w*)", part, re.ASCII)
    if name:
        return variable(name[1])
    raise UserError(f"expression {text!r}: {part!r} is not known")
