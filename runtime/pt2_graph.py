"""The graph of a `.pt2`, looked at before torch reads it: torch evaluates strings of it as Python.

| string | what torch does with it |
|---|---|
| expr_str, a size as "s0 + 1" | `sympy.sympify`, which is `eval` |
| an input's name | it becomes an argument of a function whose source is executed |
| target, the op of a node | any attribute of `torch`, so `torch.os.system` too |
| guards_code | `exec`, when a caller asks for the program's module |

So every string has to be of its kind: a name, an op of ours or of ATen, arithmetic on sizes, a shape of arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from ..errors import UserError, short

_NAME = re.compile(r"[A-Za-z0-9_.+\-]{0,512}")
_OP = re.compile(
    r"torch\.ops\.(aten|mla2dsa)\.(?!_)(?!\w*(file|save|load|print|warn|storage|set_data))\w+\.(?!_)\w+"
    r"|_operator\.(add|sub|mul|neg|mod|floordiv|truediv|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|math\.(ceil|floor|trunc)|torch\.sym_(max|min|not|int|float|ite)"
)
_WORD = re.compile(r"[A-Za-z0-9_,>\-]{0,64}")
_SIZES = re.compile(r"[su]\d+|\d{1,19}")
_SIZE_FUNCTIONS = {
    *(
        "Symbol",
        "Integer",
        "Add",
        "Mul",
        "Mod",
        "PythonMod",
        "FloorDiv",
        "CleanDiv",
        "CeilDiv",
        "Max",
        "Min",
        "Eq",
        "Ne",
        "Lt",
        "Le",
    ),
    *("Gt", "Ge", "And", "Or", "Not", "True", "False", "positive", "nonnegative", "integer", "zoo", "oo", "int_oo"),
}
_TOKEN = re.compile(r"\s*(?:(?P<word>\w+)|'(?P<quoted>\w*)'|(?P<sign>//|[-+*/%(),=<>!&|~.\[\]]))")
_MOST_TEXT = 4096
_PLAIN_TREE = {None, "builtins.tuple", "builtins.list", "builtins.dict"}


def checked_graph(document: dict[str, Any], where: str) -> dict[str, Any]:
    """`document` without its notes on where nodes came from. Raises UserError for a string that is not of its kind."""
    try:
        for node in document["graph_module"]["graph"]["nodes"]:
            node["metadata"] = {}
    except (KeyError, TypeError):
        raise UserError(f"{where}: the graph has no nodes; export again") from None
    waiting: list[tuple[str, Any]] = [("", document)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            for name in value:
                _check("name", name, where)
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, item) for item in value]
        elif isinstance(value, str):
            _check(key, value, where)
    return document


def _check(key: str, text: str, where: str) -> None:
    fits = _KINDS.get(key, _is_name)
    if (len(text) > _MOST_TEXT and key not in ("in_spec", "out_spec")) or not fits(text):
        raise UserError(
            f"{where}: its graph has the {key or 'text'} {short(text)}, which no export of mla2dsa has and torch may run as "
            "code; export again"
        )


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def _is_arithmetic(text: str, words: set[str], signs: str) -> bool:
    """Only numbers, sizes, and what is known of functions and operators: no attribute, no power, no call of anything else."""
    at, last = 0, ""
    while at < len(text.rstrip()):
        token = _TOKEN.match(text, at)
        if token is None:
            return False
        word, quoted, sign = token.group("word", "quoted", "sign")
        if word is not None and word not in words and _SIZES.fullmatch(word) is None:
            return False
        if quoted is not None and (quoted == "" or not quoted.isascii()):
            return False
        if sign is not None and (sign not in (*signs, "//") or sign == last == "*"):
            return False
        at, last = token.end(), sign or ""
    return True


def _is_size(text: str) -> bool:
    return _is_arithmetic(text, _SIZE_FUNCTIONS, "-+*/%(),=<>!&|~")


def _is_guard(text: str) -> bool:
    """L['input_ids'].size()[0] == 1 or ..."""
    plain = re.sub(r"L\['\w+'\]\.size\(\)\[\d+\]", "1", text, flags=re.ASCII)
    return _is_arithmetic(plain, {"and", "or", "not"}, "-+*/%()=<>!")


def _is_tree(text: str) -> bool:
    """How arguments are nested, as text: tuples, lists and dicts of names."""
    try:
        version, tree = json.loads(text)
        return version == 1 and _is_plain_tree(tree, 0)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _is_plain_tree(tree: Any, depth: int) -> bool:
    names = json.loads(tree["context"]) if tree["context"] is not None else None
    return (
        set(tree) == {"type", "context", "children_spec"}
        and tree["type"] in _PLAIN_TREE
        and (names is None or all(isinstance(name, str) and _is_name(name) for name in names))
        and depth < 8
        and all(_is_plain_tree(child, depth + 1) for child in tree["children_spec"])
    )


_KINDS: dict[str, Callable[[str], bool]] = {
    "target": lambda text: _OP.fullmatch(text) is not None,
    "expr_str": _is_size,
    "guards_code": _is_guard,
    "in_spec": _is_tree,
    "out_spec": _is_tree,
    "as_string": lambda text: _WORD.fullmatch(text) is not None,
    "as_strings": lambda text: _WORD.fullmatch(text) is not None,
}
