"""What a node writes and what it may share memory with: against ATen's schemas as text, and against what ops really do."""

from __future__ import annotations

import json
import operator
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from mla2dsa.compat.aliasing import Memory, Write, shared, written

aten = torch.ops.aten
PROBE = Path(__file__).parents[1] / "helpers" / "alias_probe.py"

# Schemas as text

ANNOTATED = re.compile(r"Tensor\(([a-z|]+)(!?)[^)]*\)\S* (\w+)")  # letters, whether it is written, the argument's name
RETURNED = re.compile(r"Tensor\(([a-z|]+)!?\)")


def aten_ops() -> Iterator[Any]:
    """Every overload of ATen that a graph can hold."""
    for schema in torch._C._jit_get_all_schemas():
        space, name = schema.name.split("::")
        if space == "aten":
            op = getattr(getattr(torch.ops.aten, name, None), schema.overload_name or "default", None)
            if op is not None and torch._C._dispatch_has_kernel(op.name()):
                yield op


def call_of(op: Any, by_keyword: bool = False) -> tuple[Node, dict[str, list[Node]]]:
    """A node that calls `op`, with a placeholder for each tensor it takes and two for each list, and these by argument."""
    graph, given, args, kwargs = Graph(), {}, [], {}
    for argument in op._schema.arguments:
        count = 0 if "Tensor" not in str(argument.type) else 2 if "List" in str(argument.type) else 1
        given[argument.name] = [graph.placeholder(f"in_{argument.name}_{i}") for i in range(count)]
        value = None if count == 0 else given[argument.name][0] if count == 1 else given[argument.name]
        if by_keyword or argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return graph.call_function(op, tuple(args), kwargs), given


@pytest.mark.parametrize("by_keyword", [False, True], ids=["by-place", "by-keyword"])
def test_every_write_that_aten_announces_is_seen(by_keyword: bool) -> None:
    checked = 0
    for op in aten_ops():
        arguments = str(op._schema).rpartition(" -> ")[0]
        names = {name for _, write, name in ANNOTATED.findall(arguments) if write}
        if not names or op._schema.name in ("aten::detach_", "aten::requires_grad_"):
            continue
        node, given = call_of(op, by_keyword)
        expected = {source: True for name in names for source in given[name]}
        assert {source: told for source, told in written(node).items() if told} == expected, op
        checked += 1
    assert checked > 1000


@pytest.mark.parametrize("by_keyword", [False, True], ids=["by-place", "by-keyword"])
def test_every_view_that_aten_announces_is_seen(by_keyword: bool) -> None:
    """Results that are arguments, too: mul_ and mul.out return what they write."""
    checked = 0
    for op in aten_ops():
        arguments, _, results = str(op._schema).rpartition(" -> ")
        letters = {letter for found in RETURNED.findall(results) for letter in found.split("|")}
        names = {name for found, _, name in ANNOTATED.findall(arguments) if letters & set(found.split("|"))}
        if not names:
            continue
        node, given = call_of(op, by_keyword)
        expected = {source for name in names for source in given[name]}
        assert {source for source, told in shared(node).items() if told} == expected, op
        checked += 1
    assert checked > 1000


def test_an_op_that_only_reads_is_told_apart() -> None:
    for op in (aten.add.Tensor, aten.linear.default, aten.cat.default, aten.clone.default, aten.split_copy.Tensor):
        node, _ = call_of(op)
        assert not written(node)
        assert not shared(node)


@pytest.mark.parametrize("op", [aten.detach_.default, aten.requires_grad_.default], ids=str)
def test_what_leaves_the_values_alone_is_no_write(op: Any) -> None:
    assert not written(call_of(op)[0])


def test_each_of_several_results_shares_its_own_memory() -> None:
    node, given = call_of(aten.max.dim_max)
    graph = node.graph
    first, second, again = (graph.call_function(operator.getitem, (node, i)) for i in (0, 1, 0))
    assert shared(first) == {again: True, given["max"][0]: True}
    assert shared(second) == {given["max_values"][0]: True}


def test_the_items_of_a_list_share_what_the_list_does() -> None:
    node, given = call_of(aten.split.Tensor)
    item = node.graph.call_function(operator.getitem, (node, 1))
    assert (shared(node), shared(item)) == ({given["self"][0]: True}, {node: True})


# What runs


def storages(value: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_leaves(value) if isinstance(t, Tensor) and t.numel()}


def f(*sizes: int) -> Tensor:
    return torch.rand(sizes)


ALIASING: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.as_strided.default, (f(4), [2], [2])), (aten.unfold.default, (f(2, 6), 1, 2, 2)),
    (aten.diagonal.default, (f(3, 3),)), (aten.view_as_complex.default, (f(3, 2),)),
    (aten.view_as_real.default, (torch.rand(3, dtype=torch.complex64),)),
    (aten.real.default, (torch.rand(3, dtype=torch.complex64),)),
    (aten.imag.default, (torch.rand(3, dtype=torch.complex64),)), (aten.numpy_T.default, (f(2, 3),)),
    (aten.mT.default, (f(2, 3),)), (aten.mH.default, (f(2, 3),)), (aten.t.default, (f(2, 3),)),
    (aten.adjoint.default, (f(2, 3),)), (aten.narrow.default, (f(4), 0, 1, 2)), (aten.select.int, (f(2, 3), 0, 1)),
    (aten.unbind.int, (f(2, 3),)), (aten.chunk.default, (f(4), 2)), (aten.split.Tensor, (f(4), 2)),
    (aten.split_with_sizes.default, (f(4), [1, 3])), (aten.tensor_split.sections, (f(4), 2)),
    (aten.hsplit.int, (f(2, 4), 2)), (aten.reshape.default, (f(4), [2, 2])), (aten.view.dtype, (f(4), torch.int32)),
    (aten.contiguous.default, (f(4),)), (aten.to.dtype, (f(4), torch.float32)), (aten.flatten.using_ints, (f(2, 2),)),
    (aten.unflatten.int, (f(4), 0, [2, 2])), (aten.expand_as.default, (f(1), f(3))), (aten.view_as.default, (f(4), f(2, 2))),
    (aten.reshape_as.default, (f(4), f(2, 2))), (aten.squeeze.dims, (f(1, 2), [0])), (aten.unsqueeze.default, (f(2), 0)),
    (aten.expand.default, (f(1, 2), [3, 2])), (aten.broadcast_to.default, (f(1, 2), [3, 2])),
    (aten.movedim.int, (f(2, 3), 0, 1)), (aten.swapaxes.default, (f(2, 3), 0, 1)), (aten.permute.default, (f(2, 3), [1, 0])),
    (aten.transpose.int, (f(2, 3), 0, 1)), (aten.slice.Tensor, (f(4), 0, 1)), (aten.alias.default, (f(4),)),
    (aten.detach.default, (f(4),)), (aten.positive.default, (f(4),)), (aten.resolve_conj.default, (f(4),)),
    (aten.ravel.default, (f(2, 2),)), (aten.mul_.Tensor, (f(4), f(4))), (aten.copy_.default, (f(4), f(4))),
    (torch.ops.prims.transpose.default, (f(2, 3), [1, 0])),
    # Their schemas say nothing of it:
    (aten.einsum.default, ("ij->ji", [f(2, 3)])), (aten.meshgrid.default, ([f(2), f(3)],)),
    (aten.broadcast_tensors.default, ([f(1), f(3)],)),
    (aten.dropout.default, (f(4), 0.5, False)), (aten.feature_dropout.default, (f(2, 3), 0.5, False)),
    (aten.alpha_dropout.default, (f(4), 0.5, False)), (aten.type_as.default, (f(4), f(1))),
    (aten.sum_to_size.default, (f(2, 3), [2, 3])), (aten.atleast_1d.default, (f(2),)),
    (aten.atleast_2d.Sequence, ([f(2)],)), (aten.atleast_3d.default, (f(2),)), (aten.cartesian_prod.default, ([f(2)],)),
    (aten.conj_physical.default, (f(2),)), (aten.unsafe_chunk.default, (f(4), 2)), (aten.unsafe_split.Tensor, (f(4), 2)),
    (aten.unsafe_split_with_sizes.default, (f(4), [1, 3])), (aten._unsafe_view.default, (f(4), [2, 2])),
    (aten.lift.default, (f(4),)), (aten.data.default, (f(4),)), (aten._cast_Float.default, (f(4),)),
    (aten.dequantize.self, (f(4),)), (aten.to_dense.default, (f(4),)), (aten.flatten_dense_tensors.default, ([f(4)],)),
    (aten.unflatten_dense_tensors.default, (f(4), [f(4)])), (aten._to_cpu.default, ([f(4)],)),
    (aten._reshape_from_tensor.default, (f(4), torch.tensor([2, 2]))), (aten.set.source_Tensor, (f(4), f(3))),
    (aten.set_.source_Tensor, (f(4), f(3))),
]  # fmt: skip
FRESH: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.clone.default, (f(4),)), (aten._to_copy.default, (f(4),)), (aten.add.Tensor, (f(4), f(4))),
    (aten.cat.default, ([f(4)],)), (aten.stack.default, ([f(4)],)), (aten.linear.default, (f(2, 3), f(4, 3))),
    (aten.matmul.default, (f(1, 1), f(1, 1))), (aten.repeat.default, (f(4), [1])), (aten.softmax.int, (f(2, 3), 1)),
    (aten.layer_norm.default, (f(2, 3), [3])), (aten.pad.default, (f(4), [0, 0])), (aten.where.self, (f(2) > 0, f(2), f(2))),
    (aten.slice_scatter.default, (f(4), f(4))), (aten.split_copy.Tensor, (f(4), 2)), (aten.permute_copy.default, (f(2, 3), [1, 0])),
    (aten.repeat_interleave.self_int, (f(4), 1)), (aten.square.default, (f(4),)), (aten.index.Tensor, (f(4), [torch.arange(4)])),
    (aten.scaled_dot_product_attention.default, (f(1, 1, 2, 4), f(1, 1, 2, 4), f(1, 1, 2, 4))),
]  # fmt: skip


def run_alone(op: Any, args: tuple[Any, ...]) -> tuple[Node, set[Node], dict[Node, Tensor], Any]:
    """A node that calls `op` on fresh copies of its tensors: (node, the inputs whose memory the result is, inputs, result)."""
    graph, tensors = Graph(), {}

    def place(value: Any) -> Any:
        if isinstance(value, list):
            return [place(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"in_{len(tensors)}")
        tensors[node] = value.clone()
        return node

    node = graph.call_function(op, tuple(place(value) for value in args))
    result = op(*torch.fx.map_arg(node.args, lambda source: tensors[source]))
    return node, {source for source, tensor in tensors.items() if storages(tensor) & storages(result)}, tensors, result


@pytest.mark.parametrize(("op", "args"), ALIASING, ids=lambda x: str(x) if not isinstance(x, tuple) else "")
def test_memory_that_an_op_returns_is_announced(op: Any, args: tuple[Any, ...]) -> None:
    node, same, _, _ = run_alone(op, args)
    assert same, "this call was to return what it was given"
    assert same <= set(shared(node))


@pytest.mark.parametrize(("op", "args"), FRESH, ids=lambda x: str(x) if not isinstance(x, tuple) else "")
def test_memory_of_its_own_is_not_announced(op: Any, args: tuple[Any, ...]) -> None:
    node, same, _, _ = run_alone(op, args)
    assert not same
    assert not shared(node)


@pytest.mark.parametrize("op", [op for op, _ in ALIASING], ids=str)
def test_what_a_schema_tells_is_marked_so(op: Any) -> None:
    """`told` is what torch itself goes by when it functionalises."""
    node, _ = call_of(op)
    results = str(op._schema).rpartition(" -> ")[2]
    told = bool(RETURNED.search(results)) and torch.Tag.maybe_aliasing_or_mutating not in op.tags
    assert any(shared(node).values()) == told


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "call",
    [lambda x, m, v, on: aten.batch_norm.default(x, None, None, m, v, on, 0.1, 1e-5, False),
     lambda x, m, v, on: aten.native_batch_norm.default(x, None, None, m, v, on, 0.1, 1e-5),
     lambda x, m, v, on: aten.instance_norm.default(x, None, None, m, v, on, 0.1, 1e-5, False)],
    ids=["batch_norm", "native_batch_norm", "instance_norm"],
)  # fmt: skip
def test_running_statistics_are_written(call: Callable[..., Any], training: bool) -> None:
    x, mean, var = torch.rand(2, 3, 5), torch.zeros(3), torch.ones(3)
    module = torch.fx.symbolic_trace(lambda x, m, v: call(x, m, v, training))
    inputs = module.graph.find_nodes(op="placeholder")
    node = next(n for n in module.graph.nodes if n.op == "call_function")
    module(x, mean, var)
    assert bool(mean.count_nonzero()) == training
    assert written(node) == (dict.fromkeys(inputs[1:], False) if training else {})


def test_no_op_of_this_torch_shares_memory_unseen() -> None:
    """Every op without a word on it in its schema is called with guessed arguments, in a process of its own (some crash)."""
    done = subprocess.run([sys.executable, str(PROBE)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found["ran"]) > 250
    assert {"aten.einsum.default", "aten.dropout.default", "aten.type_as.default"} <= set(found["aliasing"])
    ops = {str(op): op for op in aten_ops()}
    unseen = [name for name in found["aliasing"] if not shared(call_of(ops[name])[0])]
    assert not unseen


# What has no schema


def lone_module(graph: Graph, **bodies: GraphModule) -> GraphModule:
    owner = nn.Module()
    for name, body in bodies.items():
        setattr(owner, name, body)
    return GraphModule(owner, graph)


@pytest.mark.parametrize(
    ("body", "writes"),
    [(lambda x, y: (aten.add.Tensor(x, y),), False), (lambda x, y: (aten.add_.Tensor(x, y),), True)],
    ids=["functional", "writing"],
)
def test_a_nested_graph_shares_and_writes_what_it_reads(body: Callable[..., Any], writes: bool) -> None:
    graph = Graph()
    x, y, inner = graph.placeholder("x"), graph.placeholder("y"), graph.get_attr("body")
    call = graph.call_function(torch.ops.higher_order.wrap, (inner, x, y))
    module = lone_module(graph, body=torch.fx.symbolic_trace(body))
    assert shared(call) == {x: False, y: False}
    assert written(call) == ({x: False, y: False} if writes else {})
    assert module.graph is graph


def test_a_python_function_may_do_anything_to_tensors() -> None:
    graph = Graph()
    x, n = graph.placeholder("x"), graph.placeholder("n")
    n.meta["val"] = 3
    call, number = graph.call_function(torch.add, (x, n)), graph.call_function(operator.add, (n, 1))
    number.meta["val"] = 4
    method = graph.call_method("mul_", (x, 2))
    assert shared(call) == written(call) == shared(method) == written(method) == {x: False}
    assert not shared(number)
    assert not written(number)


def test_a_custom_op_is_believed_when_torch_has_checked_it() -> None:
    with torch.library._scoped_library("mla2dsa_test", "FRAGMENT") as library:
        library.define("unchecked(Tensor x) -> Tensor")
        library.define("checked(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.define("announced(Tensor(a!) x, Tensor y) -> Tensor(a!)", tags=(torch.Tag.pt2_compliant_tag,))
        ops = torch.ops.mla2dsa_test
        node, given = call_of(ops.unchecked.default)
        assert shared(node) == {given["x"][0]: False}
        assert not shared(call_of(ops.checked.default)[0])
        node, given = call_of(ops.announced.default)
        assert shared(node) == written(node) == {given["x"][0]: True}


# Memory: which reads a write changes


def first_two(a: Tensor) -> Tensor:
    view: Tensor = aten.as_strided.default(a, [2], [1])
    return view


STEPS: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
    ("view", lambda a, b: aten.view.default(a, [-1])), ("T", lambda a, b: aten.numpy_T.default(aten.view.default(a, [2, 4]))),
    ("reshape", lambda a, b: aten.reshape.default(aten.t.default(aten.reshape.default(a, [2, 4])), [-1])),
    ("slice", lambda a, b: aten.slice.Tensor(aten.reshape.default(a, [-1]), 0, 0, 8)),
    ("strided", lambda a, b: aten.as_strided.default(a, [8], [1])),
    ("split", lambda a, b: aten.cat.default(aten.split.Tensor(aten.reshape.default(a, [-1]), 4))),
    ("item", lambda a, b: aten.expand.default(aten.split.Tensor(aten.reshape.default(a, [2, 4]), 1)[1], [2, 4])),
    ("dropout", lambda a, b: aten.dropout.default(a, 0.5, False)), ("detach", lambda a, b: aten.detach.default(a)),
    ("einsum", lambda a, b: aten.einsum.default("ij->ji", [aten.reshape.default(a, [2, 4])])),
    ("to", lambda a, b: aten.to.dtype(a, torch.float32)), ("clone", lambda a, b: aten.clone.default(a)),
    ("add", lambda a, b: aten.add.Tensor(aten.reshape.default(a, [-1]), aten.reshape.default(b, [-1]))),
    ("add_", lambda a, b: aten.add_.Tensor(aten.as_strided.default(a, [1], [1]), 1.0)),
    ("foreach", lambda a, b: (aten._foreach_mul_.Scalar([aten.select.int(a, 0, 0)], 2.0), a)[1]),
    ("out", lambda a, b: aten.mul.out(aten.detach.default(a), 3.0, out=a) if a is b else aten.alias.default(a)),
    ("copy_", lambda a, b: aten.copy_.default(first_two(a), aten.clone.default(first_two(b)))),
]  # fmt: skip


class Watcher(Interpreter):
    """Runs a graph and notes each read (value, reader) that found something else than the value was when it was made."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.made: dict[Node, Any] = {}
        self.changed: list[tuple[Node, Node]] = []

    def run_node(self, node: Node) -> Any:
        for source in node.all_input_nodes:
            if isinstance(self.env[source], Tensor) and not torch.equal(self.env[source], self.made[source]):
                self.changed.append((source, node))
        value = super().run_node(node)
        self.made[node] = value.clone() if isinstance(value, Tensor) else None
        return value


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 99), st.integers(0, 99)), min_size=3, max_size=12)
)
def test_no_read_of_changed_memory_is_missed(plan: list[tuple[int, int, int]]) -> None:
    def program(x: Tensor, y: Tensor) -> Tensor:
        values = [x, y]
        for step, first, second in plan:
            values.append(STEPS[step][1](values[first % len(values)], values[second % len(values)]))
        return aten.cat.default([aten.reshape.default(value, [-1]) for value in values])

    module = torch.fx.symbolic_trace(program)
    watcher = Watcher(module)
    with suppress(RuntimeError):  # a step does not fit what it was given: what ran until there counts
        watcher.run(torch.rand(8), torch.rand(2, 4))
    memory = Memory(module.graph)
    missed = [(value, reader) for value, reader in watcher.changed if memory.write_between(value, reader) is None]
    assert not missed, module.graph


def trace(program: Callable[..., Any]) -> tuple[Memory, dict[str, Node]]:
    graph = torch.fx.symbolic_trace(program).graph
    return Memory(graph), {node.name: node for node in graph.nodes}


def test_a_write_counts_between_making_and_reading() -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        view = aten.t.default(x)
        before = aten.exp.default(x)
        aten.mul_.Tensor(view, 2.0)
        return before, aten.sin.default(x)

    memory, nodes = trace(program)
    assert memory
    assert memory.write_between(nodes["x"], nodes["exp_default"]) is None
    assert memory.write_between(nodes["x"], nodes["sin_default"]) == Write(nodes["mul__tensor"])
    assert memory.write_between(nodes["exp_default"], nodes["output"]) is None
    assert memory.is_written(nodes["x"])
    assert not memory.is_written(nodes["exp_default"])
    assert memory.untold_write() is None
    assert str(Write(nodes["mul__tensor"])) == "the in-place write mul__tensor (aten.mul_.Tensor)"


def test_a_write_through_memory_shared_without_a_word_names_the_op() -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        y = aten.einsum.default("ij->ji", [x])
        return aten.mul_.Tensor(y, 2.0), aten.sin.default(x)

    memory, nodes = trace(program)
    write = memory.write_between(nodes["x"], nodes["sin_default"])
    assert write == memory.untold_write() == Write(nodes["mul__tensor"], nodes["einsum_default"])
    assert "through einsum_default (aten.einsum.default), which does not say what memory it shares" in str(write)


def test_nothing_is_written_in_a_functional_graph() -> None:
    memory, nodes = trace(lambda x: aten.dropout.default(aten.t.default(x), 0.5, False))
    assert not memory
    assert memory.write_between(nodes["x"], nodes["output"]) is None
    assert memory.untold_write() is None
