"""ProgramEditor: whatever is added or dropped, the result is a program: it verifies, runs, saves, loads and exports again."""

from __future__ import annotations

import functools
import io
import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import inputs_of, node_of, nodes_of, outputs_of, program_of
from torch import Tensor, nn
from torch._export.verifier import SpecViolationError
from torch.export import ExportedProgram
from torch.fx import Node

from mla2dsa.passes.graph.editor import ProgramEditor
from mla2dsa.passes.graph.graph_eval import value

aten = torch.ops.aten


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        self.offset: Tensor
        self.register_buffer("offset", torch.tensor([10.0, 20.0]))

    def forward(self, x: Tensor, unread: Tensor) -> Tensor:
        return x @ self.weight + self.offset


X = torch.tensor([[1.0, 1.0], [0.0, 2.0], [5.0, 0.0]])


@functools.cache
def affine() -> ExportedProgram:
    return program_of(Affine(), X, X.clone(), dynamic=(0,))


def rewired(editor: ProgramEditor, *made: Node) -> None:
    """The program's output becomes its old one plus everything in `made`."""
    (output,) = editor.graph.find_nodes(op="output")
    (old,) = output.args[0]
    build = editor.builder(before=output)
    total = old
    for node in made:
        total = build(aten.add.Tensor, total, node)
    output.replace_input_with(old, total)


def survives(program: ExportedProgram, *args: Any, **kwargs: Any) -> Any:
    """What the program gives, the same after saving, decomposing and exporting again."""
    with torch.no_grad():
        expected = program.module()(*args, **kwargs)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        for other in (torch.export.load(file), program.run_decompositions({})):
            torch.testing.assert_close(other.module()(*args, **kwargs), expected, rtol=0, atol=0)
    return expected


# The copy


def test_an_untouched_copy_is_the_program() -> None:
    program = affine()
    editor = ProgramEditor(program)
    copy = editor.finish()
    assert [str(n.format_node()) for n in copy.graph.nodes] == [str(n.format_node()) for n in program.graph.nodes]
    assert str(copy.graph_signature) == str(program.graph_signature)
    assert {editor.nodes[n].name for n in program.graph.nodes} == {n.name for n in program.graph.nodes}
    assert not set(copy.graph.nodes) & set(program.graph.nodes)
    torch.testing.assert_close(survives(copy, X, X), Affine()(X, X))


def test_the_original_is_left_alone() -> None:
    program = affine()
    before = (str(program.graph), str(program.graph_signature), dict(program.state_dict), dict(program.constants))
    editor = ProgramEditor(program)
    rewired(editor, editor.add_parameter("a.b", torch.ones(2)), editor.add_constant("c", torch.ones(2)))
    editor.drop_input("unread")
    editor.finish()
    assert (str(program.graph), str(program.graph_signature), program.state_dict, program.constants) == before


# Tensors


def test_a_parameter_is_part_of_the_checkpoint() -> None:
    editor = ProgramEditor(affine())
    rewired(editor, editor.add_parameter("self_attn.indexer.wk", torch.tensor([100.0, 200.0])))
    program = editor.finish()
    assert program.graph_signature.inputs_to_parameters["p_self_attn_indexer_wk"] == "self_attn.indexer.wk"
    held = program.state_dict["self_attn.indexer.wk"]
    assert (type(held), held.requires_grad) == (nn.Parameter, False)
    assert survives(program, X, X)[0].tolist() == [114.0, 226.0]
    assert "self_attn.indexer.wk" in dict(program.module().named_parameters())


def test_a_constant_is_not() -> None:
    editor = ProgramEditor(affine())
    rewired(editor, editor.add_constant("rows", torch.tensor([100.0, 200.0])))
    program = editor.finish()
    assert set(program.state_dict) == {"weight", "offset"}
    assert torch.equal(program.constants["rows"], torch.tensor([100.0, 200.0]))
    assert survives(program, X, X)[0].tolist() == [114.0, 226.0]


@pytest.mark.parametrize("add", ["add_parameter", "add_constant"])
def test_a_name_is_added_once(add: str) -> None:
    editor = ProgramEditor(affine())
    first = getattr(editor, add)("twice", torch.ones(2))
    assert getattr(editor, add)("twice", torch.zeros(2)) is first
    rewired(editor, first)
    program = editor.finish()
    assert len([n for n in program.graph.nodes if n.op == "placeholder"]) == 5
    assert survives(program, X, X)[0].tolist() == [15.0, 27.0]


def test_a_meta_parameter_stands_for_one_that_comes_later() -> None:
    editor = ProgramEditor(affine())
    node = editor.add_parameter("later", torch.empty(2, device="meta"))
    assert value(node).device.type == "cpu"  # the graph's
    rewired(editor, node)
    program = editor.finish()
    assert program.state_dict["later"].is_meta
    program.state_dict["later"] = nn.Parameter(torch.tensor([1.0, 2.0]), requires_grad=False)
    assert program.module()(X, X)[0].tolist() == [15.0, 28.0]


# Inputs and outputs


def test_an_input_is_given_by_its_name() -> None:
    editor = ProgramEditor(affine())
    rows = value(inputs_of(affine())[0]).shape[0]
    assert isinstance(rows, torch.SymInt)
    node = editor.add_input("extra", (value(editor.first_user_input).shape[0], 2), torch.float32)
    assert [n.name for n in editor.user_inputs] == ["x", "unread", "extra"]
    rewired(editor, node)
    program = editor.finish()
    assert survives(program, X, X, extra=X * 100)[0].tolist() == [114.0, 126.0]
    with pytest.raises(ValueError, match="keyword mismatch"):
        program.module()(X, X)


def test_an_unread_input_is_dropped() -> None:
    """A keyword argument: a positional one would move those behind it."""

    class Keywords(nn.Module):
        def forward(self, *, x: Tensor, unread: Tensor) -> Tensor:
            return x * 2

    rows = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        Keywords(), (), {"x": X, "unread": X.clone()}, dynamic_shapes={"x": rows, "unread": rows}, strict=False
    )
    editor = ProgramEditor(program)
    editor.drop_input("unread")
    after = editor.finish()
    assert list(after.graph_signature.user_inputs) == ["x"]
    assert torch.equal(survives(after, x=X), X * 2)
    with pytest.raises(ValueError, match="keyword mismatch"):
        after.module()(x=X, unread=X)


def test_an_input_that_is_read_is_not_dropped() -> None:
    editor = ProgramEditor(affine())
    with pytest.raises(RuntimeError, match=r"^input x is still read by matmul$"):
        editor.drop_input("x")
    with pytest.raises(StopIteration):
        editor.drop_input("nobody")


def test_an_output_is_added_by_its_name() -> None:
    editor = ProgramEditor(affine())
    editor.add_output("product", next(n for n in editor.graph.nodes if n.target is aten.matmul.default))
    editor.add_output("input", editor.first_user_input)
    out, more = survives(editor.finish(), X, X)
    assert torch.equal(out, X @ Affine().weight + Affine().offset)
    assert list(more) == ["product", "input"]
    assert torch.equal(more["product"], X @ Affine().weight)
    assert torch.equal(more["input"], X)


def test_an_output_that_is_replaced_is_named_in_the_signature() -> None:
    editor = ProgramEditor(affine())
    (output,) = editor.graph.find_nodes(op="output")
    (old,) = output.args[0]
    new = editor.builder(before=output)(aten.neg.default, old)
    output.replace_input_with(old, new)
    program = editor.finish()
    assert list(program.graph_signature.user_outputs) == [new.name]
    assert torch.equal(survives(program, X, X), -Affine()(X, X))


@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_new_size_is_free(length: int) -> None:
    editor = ProgramEditor(affine())
    first, second = editor.new_size("cache"), editor.new_size("other")
    assert first.node.expr != second.node.expr
    node = editor.add_input("past", (first, 2), torch.float32)
    (output,) = editor.graph.find_nodes(op="output")
    build = editor.builder(before=output)
    rewired(editor, build(aten.sum.dim_IntList, node, [0]))
    program = editor.finish()
    assert survives(program, X, X, past=torch.ones(length, 2))[0].tolist() == [14.0 + length, 26.0 + length]


# Building


def test_a_size_is_a_number_where_it_is_fixed() -> None:
    editor = ProgramEditor(affine())
    (output,) = editor.graph.find_nodes(op="output")
    build = editor.builder(before=output)
    x = editor.first_user_input
    assert build.size(x, 1) == 2
    rows = build.size(x, 0)
    assert isinstance(rows, Node)
    assert (rows.target, rows.args, value(rows)) == (aten.sym_size.int, (x, 0), value(x).shape[0])


def test_nodes_stand_before_the_one_they_are_built_for() -> None:
    """And carry its module stack, so that a converted layer is still found by its module."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Affine()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x).exp()

    editor = ProgramEditor(program_of(Outer(), X, dynamic=(0,)))
    (add,) = [n for n in editor.graph.nodes if n.target is aten.add.Tensor]
    made = editor.builder(before=add)(aten.mul.Tensor, add.args[0], 2.0)
    assert add.prev is made
    assert made.meta["nn_module_stack"] == add.meta["nn_module_stack"]


OPS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.mul.Tensor, (2,)), (aten.mul.Tensor, (2.0,)), (aten.mul.Tensor, (True,)), (aten.to.dtype, (torch.int64,)),
    (aten.to.dtype, (torch.float16,)), (aten.transpose.int, (0, 1)), (aten.slice.Tensor, (0, 0, 1)),
    (aten.slice.Tensor, (1, 0, 1)), (aten.sum.dim_IntList, ([0], True)), (aten.sum.dim_IntList, ([1], True)),
    (aten.sum.dim_IntList, ([0, 1], True)), (aten.permute.default, ([1, 0],)), (aten.unsqueeze.default, (0,)),
    (aten.squeeze.dim, (0,)), (aten.gt.Scalar, (0,)), (aten.cat.default, (0,)),
]  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True)
@given(chosen=st.lists(st.sampled_from(OPS), min_size=1, max_size=8), rows=st.integers(2, 5))
def test_fake_values_are_those_of_the_op(chosen: list[tuple[Any, tuple[Any, ...]]], rows: int) -> None:
    """A value that is computed once for alike nodes must never be another op's: dtype and shape of each are its own."""
    editor = ProgramEditor(affine())
    (output,) = editor.graph.find_nodes(op="output")
    build = editor.builder(before=output)
    node, real = editor.first_user_input, torch.arange(2.0 * rows).view(rows, 2)
    symbol = value(node).shape[0].node.expr
    for op, args in chosen * 2:
        if op is aten.cat.default:
            node, real = build(op, [node, node], *args), op([real, real], *args)
        elif real.dim() != 2 and op in (aten.permute.default, aten.transpose.int, aten.sum.dim_IntList):
            continue
        else:
            node, real = build(op, node, *args), op(real, *args)
        sizes = [s.node.expr.subs(symbol, rows) if isinstance(s, torch.SymInt) else s for s in value(node).shape]
        assert (sizes, value(node).dtype) == (list(real.shape), real.dtype)
        if real.dim() == 0 or 0 in real.shape:
            return


def test_alike_nodes_share_their_fake_value() -> None:
    editor = ProgramEditor(affine())
    (output,) = editor.graph.find_nodes(op="output")
    build = editor.builder(before=output)
    first, second = (build(aten.exp.default, editor.first_user_input) for _ in range(2))
    other = build(aten.exp.default, build(aten.to.dtype, first, torch.float64))
    assert value(first) is value(second)
    assert value(other).dtype == torch.float64


# Dead nodes


def lines_with_much_that_is_dead(x: Tensor) -> Tensor:
    unread = torch.dropout(x.exp(), 0.5, True) + 1
    unread = torch.nn.functional.scaled_dot_product_attention(unread[None], unread[None], unread[None], dropout_p=0.1)
    half = x.to(torch.float16)
    return half.float() + 1


def test_what_nobody_reads_is_removed() -> None:
    program = program_of(lines_with_much_that_is_dead, X, dynamic=(0,))
    assert nodes_of(program, "scaled_dot_product_attention")
    assert nodes_of(program, "_assert_tensor_metadata")
    editor = ProgramEditor(program)
    before = len(editor.graph.nodes)
    removed = editor.remove_dead()
    after = editor.finish()
    assert before - len(after.graph.nodes) == removed > 5
    assert [n.target for n in after.graph.nodes if n.op == "call_function"] == [
        aten.to.dtype, aten.to.dtype, aten.add.Tensor,
    ]  # fmt: skip
    assert torch.equal(survives(after, X), X + 1)


def test_what_is_read_or_checked_stays() -> None:
    """Random ops that are read, and guards of sizes."""

    def lines(x: Tensor) -> Tensor:
        torch._check(x.sum().item() > 0)
        return torch.dropout(x, 0.5, True)

    program = program_of(lines, X, dynamic=(0,))
    editor = ProgramEditor(program)
    editor.remove_dead()
    left = editor.finish()
    assert nodes_of(left, "dropout")
    assert [n for n in left.graph.nodes if "_assert" in str(n.target)]


# Verified


def test_a_graph_that_is_not_well_formed_is_not_finished() -> None:
    editor = ProgramEditor(affine())
    (output,) = editor.graph.find_nodes(op="output")
    (old,) = output.args[0]
    with editor.graph.inserting_before(editor.graph.find_nodes(op="placeholder")[0]):
        early = editor.graph.call_function(operator.neg, (old,))
    output.replace_input_with(old, early)
    with pytest.raises((RuntimeError, SpecViolationError)):
        editor.finish()


def test_nested_graphs_come_along() -> None:
    def lines(x: Tensor) -> Tensor:
        result: Tensor = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
        return result

    program = ProgramEditor(program_of(lines, X, dynamic=(0,))).finish()
    assert torch.equal(survives(program, X), X + 1)
    assert torch.equal(program.module()(-X), -X - 1)
    assert outputs_of(program)[0] is node_of_getitem(program)


def node_of_getitem(program: ExportedProgram) -> Node:
    (node,) = [n for n in program.graph.nodes if n.target is operator.getitem]
    return node


def test_the_first_user_input_follows_the_tensors() -> None:
    editor = ProgramEditor(affine())
    assert editor.first_user_input.name == "x"
    editor.add_parameter("new", torch.ones(2))
    assert editor.first_user_input.name == "x"
    assert node_of(editor.finish(), "matmul").args[0].name == "x"  # type: ignore[union-attr]
