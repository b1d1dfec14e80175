"""All that a host without Python has to know about one op of a model: its declaration with the model's types and sizes,
and what to launch on each GPU architecture, in each form.

    OpSpec + types + sizes + attributes --builders of `dispatch`'s programs--> OpProgram --plugin_text--> a plugin's field
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ....errors import UserError
from ...op_spec import OP_SPECS, OpSpec
from .cache_program import CacheWriteCase
from .indexer_program import IndexerCase, indexer_guards
from .program import Expr, LaunchProgram, Variant, dim, integer, minimum
from .sparse_program import AttentionCase, attention_guards
from .tuning import NoBlocks

Rule = Expr | None  # what a dim of an input has to be; None: any size
Attributes = Mapping[str, int | float]


@dataclass(frozen=True)
class Form:
    """What to launch on these architectures where `guard` (over the inputs' dims and the variable `units`) is above 0."""

    name: str
    sms: tuple[int, ...]
    guard: Expr
    program: LaunchProgram


@dataclass(frozen=True)
class OpProgram:
    """inputs, outputs: (type, dims) each, types by Triton's names. Of the forms that have the GPU's architecture, the first
    whose guard holds is the one to run."""

    op: str
    inputs: tuple[tuple[str, tuple[Rule, ...]], ...]
    outputs: tuple[tuple[str, tuple[Expr, ...]], ...]
    aliases: tuple[tuple[int, int], ...]
    forms: tuple[Form, ...]

    def binaries(self) -> list[tuple[Variant, int]]:
        """Kernel and architecture of every binary it needs, once."""
        return list(dict.fromkeys((it, sm) for form in self.forms for it in form.program.variants() for sm in form.sms))


def spec_of(node: str) -> OpSpec:
    """The op of an ONNX node or plugin. Raises UserError if it is none of ours."""
    for spec in OP_SPECS:
        if spec.node == node:
            return spec
    raise UserError(f"{node} is no op with GPU kernels, expected one of {', '.join(spec.node for spec in OP_SPECS)}")


def op_program(
    spec: OpSpec,
    types: Sequence[str],
    shapes: Sequence[Sequence[int | None]],
    attributes: Attributes,
    sms: Sequence[int],
) -> OpProgram:
    """The op with inputs of these types ("bf16", "i64") and shapes (None: a dim that is known at run time only).

    Raises UserError for a type or a size that there is no kernel for.
    """
    _check(spec, types, shapes)
    sizes = {letter: size for letter, size in spec.sizes(shapes).items() if size is not None}
    rules = _rules(spec, shapes)
    forms: dict[tuple[str, Expr, LaunchProgram], list[int]] = {}
    for sm in sorted(set(sms)):
        try:
            found = _BUILDERS[spec.name](types, sizes, attributes, sm)
        except NoBlocks as error:
            raise UserError(f"{spec.node}: {error}; leave sm_{sm} out of --sm") from error
        for name, (guard, program) in found.items():
            forms.setdefault((name, guard, program), []).append(sm)
    model = next(iter(forms))[2]
    known = {letter: integer(size) if size is not None else at for letter, (at, size) in _letters(spec, shapes).items()}
    known |= {name: integer(int(value)) for name, value in attributes.items()}
    output = tuple(spec.output_shape(known, minimum))
    return OpProgram(
        op=spec.node,
        inputs=tuple(zip(types, rules, strict=True)),
        outputs=((model.outputs[0][0], output),),
        aliases=model.aliases,
        forms=_in_order(forms),
    )


def _check(spec: OpSpec, types: Sequence[str], shapes: Sequence[Sequence[int | None]]) -> None:
    if len(types) != len(spec.inputs) or len(shapes) != len(spec.inputs):
        raise UserError(f"{spec.node} takes {len(spec.inputs)} inputs, got {len(types)}")
    for operand, kind, shape in zip(spec.inputs, types, shapes, strict=True):
        if kind not in _TYPES[operand.kind]:
            expected = ", ".join(_TYPES[operand.kind])
            raise UserError(f"{spec.node}: input {operand.name} is {kind}, there are kernels for {expected} only")
        if len(shape) != len(operand.dims):
            raise UserError(f"{spec.node}: input {operand.name} has {len(shape)} dims, expected {len(operand.dims)}")


def _letters(spec: OpSpec, shapes: Sequence[Sequence[int | None]]) -> dict[str, tuple[Expr, int | None]]:
    """Where each letter comes up first, and its size if that is known from any input."""
    found: dict[str, tuple[Expr, int | None]] = {}
    for number, (operand, shape) in enumerate(zip(spec.inputs, shapes, strict=True)):
        for axis, (letter, size) in enumerate(zip(operand.dims, shape, strict=True)):
            at, known = found.get(letter, (dim(number, axis), None))
            if known is not None and size is not None and known != size:
                raise UserError(f"{spec.node}: dim {axis} of input {operand.name} is {size}, expected {known}")
            found[letter] = (at, size if known is None else known)
    return found


def _rules(spec: OpSpec, shapes: Sequence[Sequence[int | None]]) -> list[tuple[Rule, ...]]:
    letters = _letters(spec, shapes)

    def rule(letter: str, here: Expr) -> Rule:
        first, size = letters[letter]
        if size is not None:
            return integer(size)
        return None if first == here else first

    return [
        tuple(rule(letter, dim(number, axis)) for axis, letter in enumerate(operand.dims))
        for number, operand in enumerate(spec.inputs)
    ]


def _in_order(forms: Mapping[tuple[str, Expr, LaunchProgram], Sequence[int]]) -> tuple[Form, ...]:
    """Grouped by name, in the order in which the builder names them: guards are tried in that order."""
    names = list(dict.fromkeys(name for name, _, _ in forms))
    ordered = sorted(forms.items(), key=lambda item: names.index(item[0][0]))
    return tuple(Form(name, tuple(sms), guard, program) for (name, guard, program), sms in ordered)


Built = dict[str, tuple[Expr, LaunchProgram]]


def _static(spec_letter: str, sizes: Mapping[str, int]) -> int:
    if spec_letter not in sizes:
        raise UserError(f"the size {spec_letter} has to be known when the program is built, but is dynamic")
    return sizes[spec_letter]


def _indexer(types: Sequence[str], sizes: Mapping[str, int], attributes: Attributes, sm: int) -> Built:
    dtype, _, weights, begin, end = types
    if begin != end:
        raise UserError(f"LightningIndexer: key_begin is {begin} and key_end {end}, expected the same type")
    heads, width, topk = _static("HI", sizes), _static("dI", sizes), int(attributes["topk"])
    return {
        form: (guard, IndexerCase(dtype, heads, width, topk, sm, form, False, weights, begin).program())
        for form, guard in indexer_guards(heads).items()
    }


def _attention(types: Sequence[str], sizes: Mapping[str, int], attributes: Attributes, sm: int) -> Built:
    heads, width, rank = _static("H", sizes), _static("D", sizes), int(attributes["kv_lora_rank"])
    facts = (types[0], heads, rank, width - rank, float(attributes["scale"]), sm)
    return {form: (guard, AttentionCase(*facts, form).program()) for form, guard in attention_guards(heads).items()}


def _cache(types: Sequence[str], sizes: Mapping[str, int], attributes: Attributes, sm: int) -> Built:
    dtype, new, slots = types
    return {"all": (integer(1), CacheWriteCase(dtype, new, _static("d", sizes), sm, slots).program())}


_BUILDERS: dict[str, Callable[[Sequence[str], Mapping[str, int], Attributes, int], Built]] = {
    "lightning_indexer": _indexer,
    "sparse_mla": _attention,
    "cache_write": _cache,
}
_FLOATS = ("bf16", "fp16", "fp32")
_TYPES = {"T": _FLOATS, "V": _FLOATS, "I": ("i32", "i64"), "J": ("i32",)}
