"""What a node of a graph writes, and what its value may share memory with.

An op's schema says so: in `aten::mul_.Tensor(Tensor(a!) self, Tensor other) -> Tensor(a!)`, self is written and returned. For
some ops it says too little; which, was found by running all of ATen and comparing storages (tests/compat/test_aliasing.py
does it anew). What else promises nothing, such as a nested graph, is taken to share memory with everything it reads.

torch functionalises a program by the schemas alone: what they do not tell comes out wrong, without a word.
"""

from __future__ import annotations

import operator
from bisect import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, map_arg

from .torch_private import TORCH, op_name

# Names of ATen ops that may return memory they were given, though their schemas do not say it: beside those that torch tags.
_UNTOLD_VIEWS = frozenset({
    "_add_batch_dim", "_cast_Byte", "_cast_Char", "_cast_Double", "_cast_Float", "_cast_Half", "_cast_Int", "_cast_Long",
    "_cast_Short", "_remove_batch_dim", "_reshape_from_tensor", "_saturate_weight_to_fp16", "_to_cpu", "_unsafe_view",
    "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "chalf", "cumprod_backward", "data", "dequantize",
    "einsum", "flatten_dense_tensors", "histogramdd", "lift", "meshgrid", "set", "set_", "set_data", "sum_to_size",
    "to_dense", "to_dense_backward", "to_mkldnn_backward", "to_sparse", "type_as", "unflatten_dense_tensors",
    "unsafe_split", "unsafe_split_with_sizes",
})  # fmt: skip
# ATen's normalisations write their running statistics when the named flag is set, and their schemas do not say that either.
_STATISTICS = ("running_mean", "running_var")
_UNTOLD_WRITES = {
    "_batch_norm_impl_index": "training", "batch_norm": "training", "cudnn_batch_norm": "training",
    "instance_norm": "use_input_stats", "miopen_batch_norm": "training", "native_batch_norm": "training",
}  # fmt: skip
_WRITE_NO_VALUE = frozenset({"detach_", "requires_grad_"})
_TOLD_BY_SCHEMA = frozenset(
    {"aten", "prim", "prims"}
)  # torch's own; of others, the tag `pt2_compliant_tag` promises it
_FUNCTIONAL_CALLS = frozenset({"auto_functionalized", "auto_functionalized_v2", "triton_kernel_wrapper_functional"})


def written(node: Node) -> dict[Node, bool]:
    """The inputs of `node` whose memory it may write, and whether its schema tells."""
    if _is_silent(node) or node.target is operator.getitem:
        return {}
    facts = _facts(node.target)
    if facts is None:
        return dict.fromkeys(_tensors(node), False) if _runs_a_write(node) else {}
    flag = _UNTOLD_WRITES.get(facts.name)
    if not facts.writes and flag is None:
        return {}
    given = _arguments(node, facts)
    untold = _STATISTICS if flag and given.get(flag) is not False else ()
    return {
        **{source: False for name in untold for source in _nodes(given.get(name))},
        **{source: True for name in facts.writes for source in _nodes(given.get(name))},
    }


def shared(node: Node) -> dict[Node, bool]:
    """The nodes whose memory the value of `node` may be, or be part of, and whether its schema tells."""
    if _is_silent(node):
        return {}
    if node.target is operator.getitem:
        return _shared_item(node)
    facts = _facts(node.target)
    if facts is None:
        return dict.fromkeys(_tensors(node), False)
    if not any(facts.results):
        return {}
    return {
        source: told for result in range(len(facts.results)) for source, told in _shared_result(node, facts, result)
    }


@dataclass(frozen=True)
class Write:
    """A node that writes. `through`: None, or the op that passes the memory on, or writes it, without saying so."""

    node: Node
    through: Node | None = None

    def __str__(self) -> str:
        said = f"the in-place write {self.node.name} ({self.node.target})"
        if self.through is None:
            return said
        if self.through is self.node:
            return f"{said}, which does not say what it does to memory,"
        return f"{said}, through {self.through.name} ({self.through.target}), which does not say what memory it shares,"


class Memory:
    """The values of a graph, grouped by the memory they may share: a write to one of a group may change all of them.

    Nodes count as executed in graph order. Costs one walk over the graph, and another one when something in it writes.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        writes = {node: targets for node in graph.nodes if (targets := written(node))}
        links = {node: sources for node in graph.nodes if (sources := shared(node))} if writes else {}
        self._any = _Groups(self._order, links, writes)
        self._told = _Groups(self._order, _told(links), _told(writes))
        self._members: dict[Node, list[Node]] | None = None
        self._untold = {self._any.root(node): node for node, sources in links.items() if not all(sources.values())}

    def __bool__(self) -> bool:
        """Whether anything is written at all."""
        return bool(self._any.writes)

    def is_written(self, value: Node) -> bool:
        return self._any.root(value) in self._any.writes

    def written_with(self, value: Node) -> list[Node]:
        """What may share memory with it, itself included, where any of that is ever written; else nothing."""
        if self._members is None:
            self._members = {root: [] for root in self._any.writes}
            for node in self._graph.nodes if self._members else ():
                if (root := self._any.root(node)) in self._members:
                    self._members[root].append(node)
        return self._members.get(self._any.root(value), [])

    def write_between(self, value: Node, reader: Node) -> Write | None:
        """The first write to the memory of `value` after it was made and before `reader` runs; first of all an untold one."""
        begin, end = self._order[value], self._order[reader]
        found = self._any.written_between(value, begin, end)
        told = set(self._told.written_between(value, begin, end)) if found else ()
        for write in found:
            if write not in told:
                return Write(write, self._untold.get(self._any.root(value), write))
        return Write(found[0]) if found else None

    def untold_write(self) -> Write | None:
        """A write that changes what a later node reads, of which torch does not know: the program cannot be functionalised."""
        edges = ((source, reader) for reader in self._graph.nodes for source in reader.all_input_nodes)
        found = (self.write_between(*edge) for edge in edges) if self else ()
        return next((write for write in found if write is not None and write.through is not None), None)


_Links = Mapping[Node, Mapping[Node, bool]]


def _told(links: _Links) -> _Links:
    return {node: {source: True for source, told in sources.items() if told} for node, sources in links.items()}


class _Groups:
    """Disjoint sets of nodes that may share memory, with the positions of the writes to each."""

    def __init__(self, order: Mapping[Node, int], links: _Links, writes: _Links) -> None:
        self._parent: dict[Node, Node] = {}
        self.writes: dict[Node, list[tuple[int, Node]]] = {}  # by root, ascending
        for node, sources in links.items():
            for source in sources:
                self._parent[self.root(node)] = self.root(source)
        for writer, targets in writes.items():
            for root in dict.fromkeys(map(self.root, targets)):
                self.writes.setdefault(root, []).append((order[writer], writer))

    def root(self, node: Node) -> Node:
        above = self._parent.setdefault(node, node)
        while above is not node:
            self._parent[node] = self._parent[above]
            node, above = above, self._parent[above]
        return node

    def written_between(self, value: Node, begin: int, end: int) -> list[Node]:
        writes = self.writes.get(self.root(value), [])
        first, last = (bisect(writes, place, key=lambda write: write[0]) for place in (begin, end - 1))
        return [writer for _, writer in writes[first:last]]


@dataclass(frozen=True)
class _Facts:
    """An op's schema. writes: arguments it writes. results: per result, the arguments it may share memory with."""

    name: str
    arguments: tuple[str, ...]
    writes: tuple[str, ...]
    results: tuple[dict[str, bool], ...]


@cache
def _facts(target: Any) -> _Facts | None:
    """None for what has no schema: calls of nested graphs, Python functions, modules."""
    if not isinstance(target, TORCH.find("torch._ops:OpOverload")):
        return None
    schema = TORCH.get(target, "OpOverload._schema")
    space, name = schema.name.split("::")
    tensors = [argument for argument in schema.arguments if "Tensor" in str(argument.type)]
    writes = tuple(a.name for a in tensors if a.alias_info is not None and a.alias_info.is_write)
    untold = torch.Tag.maybe_aliasing_or_mutating in target.tags or (space == "aten" and name in _UNTOLD_VIEWS)
    untold |= space not in _TOLD_BY_SCHEMA and torch.Tag.pt2_compliant_tag not in target.tags
    results = []
    for result in schema.returns or (
        [None] if untold else []
    ):  # set_data returns nothing, yet its arguments are one then
        told = {a.name for a in tensors if result is not None and _may_alias(a.alias_info, result.alias_info)}
        results.append({a.name: a.name in told for a in tensors if untold or a.name in told})
    names = tuple(argument.name for argument in schema.arguments)
    return _Facts(name, names, () if name in _WRITE_NO_VALUE else writes, tuple(results))


def _may_alias(argument: Any, result: Any) -> bool:
    """Whether two annotations share a letter. Lists have no letter of their own, and then share all."""
    if argument is None or result is None:
        return False
    ours, theirs = (info.before_set | info.after_set for info in (argument, result))
    return not ours or not theirs or "*" in theirs or bool(ours & theirs)


def _shared_result(node: Node, facts: _Facts, result: int) -> Iterator[tuple[Node, bool]]:
    given = _arguments(node, facts)
    for name, told in facts.results[result].items():
        yield from ((source, told) for source in _nodes(given.get(name)))


def _shared_item(node: Node) -> dict[Node, bool]:
    """Of an op with several results, one shares only what its own place says; the items of a list are all alike."""
    source, index = node.args
    if not isinstance(source, Node):
        return {}
    facts = None if _is_silent(source) else _facts(source.target)
    if facts is None or len(facts.results) < 2 or not isinstance(index, int):
        return {source: True}
    twins = [user for user in source.users if user is not node and user.target is node.target and user.args[1] == index]
    return {**dict.fromkeys(twins, True), **dict(_shared_result(source, facts, index))}


def _is_silent(node: Node) -> bool:
    """Inputs of the graph, its output, and calls that give numbers."""
    if node.op in ("placeholder", "get_attr", "output") or op_name(node.target) in _FUNCTIONAL_CALLS:
        return True
    return _facts(node.target) is None and not isinstance(node.meta.get("val", ()), Tensor | tuple | list | None)


def _runs_a_write(node: Node) -> bool:
    """For a call without a schema: whether its nested graphs write anything. Without such graphs, what it runs is unknown."""
    graphs = [graph for source in node.all_input_nodes if (graph := _nested_graph(source)) is not None]
    return not graphs or any(written(inner) for graph in graphs for inner in graph.nodes)


def _nested_graph(node: Node) -> Graph | None:
    owner = node.graph.owning_module
    body = getattr(owner, str(node.target), None) if node.op == "get_attr" else None
    return body.graph if isinstance(body, GraphModule) else None


def _arguments(node: Node, facts: _Facts) -> dict[str, Any]:
    """The arguments of a node that calls an op, by their names in the schema."""
    return dict(zip(facts.arguments, node.args, strict=False)) | dict(node.kwargs)


def _nodes(argument: Any) -> list[Node]:
    """The nodes that hold tensors in an argument."""
    found: list[Node] = []
    map_arg(argument, found.append)
    return [node for node in found if isinstance(node.meta.get("val", ()), Tensor | tuple | list)]


def _tensors(node: Node) -> list[Node]:
    return [source for source in _nodes((node.args, dict(node.kwargs))) if _nested_graph(source) is None]
