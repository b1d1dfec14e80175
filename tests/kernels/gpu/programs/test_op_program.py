"""An op of a model as a plugin gets it: rules for its inputs, a form for each case, enough workspace; as text and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from plugin_readers import read_op

from mla2dsa.errors import UserError
from mla2dsa.kernels.gpu.binaries.manifest import kernel_name
from mla2dsa.kernels.gpu.programs.op_program import Form, OpProgram, op_program, spec_of
from mla2dsa.kernels.gpu.programs.plugin_text import write_op
from mla2dsa.kernels.gpu.programs.program import Variant, integer
from mla2dsa.kernels.op_spec import CACHE_WRITE, LIGHTNING_INDEXER, OP_SPECS, SPARSE_MLA, OpSpec

SMS = (80, 86, 89, 90, 100, 120)
OPEN = (None, None)
Shapes = Sequence[Sequence[int | None]]


def indexer(
    heads: int = 64, width: int = 128, topk: int = 2048, sms: Sequence[int] = SMS, kind: str = "bf16"
) -> OpProgram:
    shapes: Shapes = ((*OPEN, heads, width), (*OPEN, width), (*OPEN, heads), OPEN, OPEN)
    return op_program(LIGHTNING_INDEXER, (kind, kind, "fp32", "i64", "i64"), shapes, {"topk": topk}, sms)


def attention(heads: int = 128, rank: int = 512, rope: int = 64, sms: Sequence[int] = SMS) -> OpProgram:
    shapes: Shapes = ((*OPEN, heads, rank + rope), (*OPEN, rank + rope), (*OPEN, None))
    return op_program(SPARSE_MLA, ("bf16", "bf16", "i32"), shapes, {"scale": 0.1, "kv_lora_rank": rank}, sms)


def cache(width: int = 576, sms: Sequence[int] = SMS) -> OpProgram:
    return op_program(CACHE_WRITE, ("bf16", "bf16", "i64"), ((*OPEN, width), (*OPEN, width), OPEN), {}, sms)


OPS = {
    "indexer-h64": indexer(),
    "indexer-h8-k512": indexer(heads=8, topk=512),
    "indexer-fp32": indexer(heads=16, kind="fp32"),
    "attention-h128": attention(),
    "attention-h16-r256": attention(heads=16, rank=256),
    "cache-d576": cache(),
}


def chosen(op: OpProgram, shapes: Sequence[Sequence[int]], sm: int, units: int) -> Form:
    return next(form for form in op.forms if sm in form.sms and form.guard.value(shapes, {"units": units}) > 0)


def with_outputs(op: OpProgram, inputs: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    shapes = [*inputs]
    shapes += [[size.value(inputs) for size in dims] for _, dims in op.outputs]
    return shapes


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "expected"),
    [
        (1, 1, 64, "decode"), (1, 8, 64, "decode"), (1, 9, 64, "prefill"), (131, 1, 64, "decode"), (132, 1, 64, "batch"),
        (1, 512, 1, "batch"), (1, 513, 1, "prefill"), (4, 4096, 64, "prefill"),
    ],
)  # fmt: skip
def test_the_form_of_an_indexer(batch: int, tokens: int, heads: int, expected: str) -> None:
    shapes = [(batch, tokens, heads, 128), (batch, 9000, 128), (batch, tokens, heads), (batch, tokens), (batch, tokens)]
    for sm in SMS:
        assert chosen(indexer(heads), shapes, sm, units=132).name == expected


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "units", "expected"),
    [
        (1, 1, 128, 132, "decode"), (65, 1, 128, 132, "decode"), (66, 1, 128, 132, "prefill"), (131, 1, 16, 132, "decode"),
        (132, 1, 16, 132, "prefill"), (1, 4096, 16, 132, "prefill"), (1100, 1, 16, 5000, "prefill"),
    ],
)  # fmt: skip
def test_the_form_of_an_attention(batch: int, tokens: int, heads: int, units: int, expected: str) -> None:
    shapes = [(batch, tokens, heads, 576), (batch, 9000, 576), (batch, tokens, 2048)]
    assert chosen(attention(heads), shapes, 90, units).name == expected


def test_rules_of_inputs_and_outputs() -> None:
    lines = write_op(indexer(sms=(90,)), kernel_name).splitlines()
    assert lines[:8] == [
        "mla2dsa-plugin 1",
        "op LightningIndexer",
        "in bf16 * * 64 128",
        "in bf16 d0.0 * 128",
        "in fp32 d0.0 d0.1 64",
        "in i64 d0.0 d0.1",
        "in i64 d0.0 d0.1",
        "out i32 d0.0 d0.1 2048,d1.1,<",
    ]
    assert write_op(cache(sms=(90,)), kernel_name).splitlines()[2:7] == [
        "in bf16 * * 576",
        "in bf16 d0.0 * 576",
        "in i64 d0.0 d1.1",
        "out bf16 d0.0 d0.1 576",
        "alias 0 0",
    ]


def test_a_size_that_one_input_knows_holds_for_all() -> None:
    shapes: Shapes = ((1, None, 4, 32), (None, 64, 32), (None, None, None), OPEN, (1, None))
    op = op_program(LIGHTNING_INDEXER, ("bf16", "bf16", "bf16", "i32", "i32"), shapes, {"topk": 8}, (80,))
    assert [rules for _, rules in op.inputs] == [
        (integer(1), None, integer(4), integer(32)),
        (integer(1), integer(64), integer(32)),
        (integer(1), indexer().inputs[2][1][1], integer(4)),
        (integer(1), indexer().inputs[2][1][1]),
        (integer(1), indexer().inputs[2][1][1]),
    ]
    assert op.outputs[0][1][2] == integer(8)


def test_architectures_with_the_same_program_share_a_form() -> None:
    assert [(form.name, form.sms) for form in cache().forms] == [("all", SMS)]
    names = [form.name for form in indexer().forms]
    assert names == sorted(names, key=["decode", "batch", "prefill"].index)
    for name in ("decode", "batch", "prefill"):
        assert sorted(sm for form in indexer().forms if form.name == name for sm in form.sms) == list(SMS)


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 5000), st.integers(1, 200_000))


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=150, deadline=None)
@given(most=SIZES, parts=st.tuples(*[st.floats(0, 1)] * 3), units=st.integers(1, 300))
def test_what_is_reserved_is_enough(
    name: str, most: tuple[int, int, int], parts: tuple[float, float, float], units: int
) -> None:
    """For every shape up to the largest one, in the form that it would run in."""
    op = OPS[name]
    less = tuple(max(1, round(size * part)) for size, part in zip(most, parts, strict=True))
    largest, smaller = _shapes(op, *most), _shapes(op, *less)
    for sm in SMS:
        reserved = max(
            (form.program.reserve or form.program.workspace).value(with_outputs(op, largest))
            for form in op.forms
            if sm in form.sms
        )
        assert chosen(op, smaller, sm, units).program.workspace.value(with_outputs(op, smaller)) <= reserved


def _shapes(op: OpProgram, batch: int, tokens: int, slots: int) -> list[list[int]]:
    """Inputs of this op: each rule that is no number is the batch, the queries or the slots."""
    sizes: dict[str, Any] = {"B": batch, "T": tokens, "S": slots, "C": slots, "K": min(2048, slots)}

    def size(rule: Any, letter: str) -> int:
        return int(rule.args[0]) if rule is not None and rule.op == "int" else int(sizes[letter])

    return [
        [size(*pair) for pair in zip(rules, operand.dims, strict=True)]
        for (_, rules), operand in zip(op.inputs, spec_of(op.op).inputs, strict=True)
    ]


def test_a_decode_step_reserves_little() -> None:
    """DeepSeek-V3 with 8 sequences of 128K, one token each: megabytes, not the budget of a prefill."""
    shapes = [[8, 1, 64, 128], [8, 131072, 128], [8, 1, 64], [8, 1], [8, 1]]
    for form in OPS["indexer-h64"].forms:
        assert form.program.reserve is not None
        assert form.program.reserve.value(with_outputs(OPS["indexer-h64"], shapes)) < 64 * 2**20


@pytest.mark.parametrize("name", OPS)
def test_what_is_written_is_read_back(name: str) -> None:
    op = OPS[name]
    variants: dict[str, Variant] = {}

    def named(variant: Variant) -> str:
        variants[kernel_name(variant)] = variant
        return kernel_name(variant)

    text = write_op(op, named)
    again = read_op(text, variants)
    assert write_op(again, kernel_name) == text
    assert (again.inputs, again.outputs, again.aliases) == (op.inputs, op.outputs, op.aliases)
    assert [form.sms for form in again.forms] == [form.sms for form in op.forms]
    assert all(line == " ".join(line.split()) for line in text.splitlines())


GOOD = write_op(cache(sms=(90,)), lambda variant: "copy")
COPY = {"copy": cache(sms=(90,)).forms[0].program.variants()[0]}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mla2dsa-plugin 1", "mla2dsa-plugin 2", "line 1: expected 'mla2dsa-plugin 1'"),
        ("alias 0 0", "alias 0 x", "line 7: 'alias 0 x' is not known here"),
        ("op CacheWrite\n", "op CacheWrite\nop CacheWrite\n", "line 3: 'op CacheWrite' is not known here"),
        ("out bf16", "out bf16 4\nin bf16", "line 7: 'in bf16"),
        ("form all 90 1", "form all ninety 1", "line 8: 'form all ninety 1'"),
        ("form all 90 1", "form all 90 1,+", "line 8: expression '1,[+]'"),
        ("workspace 0", "in bf16", "line 9: 'in bf16' is not known inside of a form"),
        ("workspace 0", "workspace", "line 9: 'workspace' is not known here"),
        ("launch copy", "launch move", "line 10: kernel move is not in the pack"),
        ("\nend\n", "\n", "form without end"),
        ("end\n", "end\nend\n", "line 12: 'end' is not known here"),
    ],
)  # fmt: skip
def test_other_texts_are_refused(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(UserError, match=message):
        read_op(GOOD.replace(old, new, 1), COPY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "#" * 2**20, "the program has .* bytes, the most is 1048576"),
        (GOOD.replace("alias", "in i64\n" * 14 + "alias"), "more than 16 inputs and outputs"),
        (GOOD + "form f 90 1\nworkspace 0\nend\n" * 64, "more than 64 forms"),
        (GOOD.replace("workspace 0", "workspace 1" + ",1,+" * 128), "line 9: over a limit of the format"),
        (GOOD.replace("workspace 0\n", "workspace 0\n" + "launch copy 1 1 1\n" * 65), "line 74: over a limit"),
        (GOOD.replace(" n n", " n" * 65), "line 10: over a limit"),
    ],
    ids=["bytes", "tensors", "forms", "parts", "launches", "parameters"],
)
def test_limits_are_those_of_the_plugin(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_op(text, COPY)


def test_a_text_without_a_form_is_refused() -> None:
    with pytest.raises(UserError, match="the program has no form"):
        read_op(GOOD.split("form")[0], COPY)


def test_the_documented_program_is_one() -> None:
    text = (ROOT / "docs" / "tensorrt.md").read_text()
    program = text.split("## The field `program`\n```\n")[1].split("\n```")[0] + "\n"
    op = attention(heads=4, rank=32, rope=16, sms=(80, 90))
    names = {variant.kernel: variant for form in op.forms for variant in form.program.variants()}
    assert read_op(program, names).op == "SparseMLA"
    assert read_op(program, names).forms[0].program.aliases == ()


def _spec(**changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "spec": SPARSE_MLA, "types": ("bf16", "bf16", "i32"), "shapes": ((*OPEN, 8, 80), (*OPEN, 80), (*OPEN, None)),
        "attributes": {"scale": 1.0, "kv_lora_rank": 64}, "sms": (80,),
    }  # fmt: skip
    return {**facts, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"types": ("bf16", "bf16")}, "SparseMLA takes 3 inputs, got 2"),
        ({"types": ("fp64", "fp64", "i32")}, "input q is fp64, there are kernels for bf16, fp16, fp32 only"),
        ({"types": ("bf16", "bf16", "i64")}, "input indices is i64, there are kernels for i32 only"),
        ({"shapes": ((None, 8, 80), (*OPEN, 80), (*OPEN, None))}, "input q has 3 dims, expected 4"),
        ({"shapes": ((*OPEN, 8, 80), (*OPEN, 81), (*OPEN, None))}, "dim 2 of input kv is 81, expected 80"),
        ({"shapes": ((*OPEN, None, 80), (*OPEN, 80), (*OPEN, None))}, "the size H has to be known"),
    ],
)  # fmt: skip
def test_what_has_no_kernel_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        op_program(**_spec(**changes))


def test_an_architecture_too_small_for_it_is_named() -> None:
    with pytest.raises(
        UserError, match=r"no block sizes for .* on sm_86 with fp32, 128 heads .*leave sm_86 out of --sm"
    ):
        indexer(heads=128, width=256, kind="fp32", sms=(86,))


def test_bounds_of_two_types_are_refused() -> None:
    shapes: Shapes = ((*OPEN, 8, 128), (*OPEN, 128), (*OPEN, 8), OPEN, OPEN)
    with pytest.raises(UserError, match="key_begin is i32 and key_end i64"):
        op_program(LIGHTNING_INDEXER, ("bf16", "bf16", "bf16", "i32", "i64"), shapes, {"topk": 8}, (80,))


@pytest.mark.parametrize("spec", OP_SPECS, ids=lambda spec: spec.name)
def test_every_op_has_a_program(spec: OpSpec) -> None:
    assert spec_of(spec.node) is spec
    assert any(op.op == spec.node for op in OPS.values())


def test_other_nodes_have_none() -> None:
    with pytest.raises(UserError, match="MoEExperts is no op with GPU kernels, expected one of LightningIndexer"):
        spec_of("MoEExperts")
