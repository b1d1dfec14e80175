"""Layers that are alike are captured once and repeated in the graph: torch.export takes a third of a second for each of a model's 61.

Of every run of layers that are built alike, two are exported, and what the second one's part of the graph does must be what the
first one's does, with the first one's results in the place of what that had been given. The others are then copies of the second.
Where anything is not as simple as that, `NotRepeatable` is raised, and the model has to be exported whole. What no layer and no
config shows, a loop over layers that does something else from the tenth on, is seen by the verification, which holds the graph
against transformers' own model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from .program_inputs import Inputs

KEPT = 2  # layers of a run that are exported: one to follow another
NUMBER = "layer_idx"  # what layers may differ in, as long as nobody reads it


class NotRepeatable(Exception):
    """The layers are not simply repeated."""


@dataclass(frozen=True)
class Run:
    """Layers that are built alike. path: of their list in the model; first: number of the first one."""

    path: str
    first: int
    count: int

    @property
    def exported(self) -> tuple[int, int]:
        return self.first, self.first + 1

    @property
    def left_out(self) -> range:
        return range(self.first + KEPT, self.first + self.count)


def alike(model: torch.nn.Module, hf_config: Any) -> list[Run]:
    """Runs of at least three layers that differ in nothing but their number, in the model's longest list of modules."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    if not lists:
        return []
    path, layers = max(lists.items(), key=lambda item: len(item[1]))
    if _shared(layers) or _longer(hf_config, len(layers)):
        return []
    given = [values for _, values in _per_layer(hf_config, len(layers))]
    kinds = [(_kind(layer), [values[number] for values in given]) for number, layer in enumerate(layers)]
    runs, first = [], 0
    for number in range(1, len(kinds) + 1):
        if number == len(kinds) or kinds[number] != kinds[first]:
            if number - first > KEPT:
                runs.append(Run(path, first, number - first))
            first = number
    return runs


def _shared(layers: torch.nn.ModuleList) -> bool:
    """Whether two layers are one, or hold the same weight or buffer."""
    held = [{id(it) for it in (*layer.parameters(), *layer.buffers())} | {id(layer)} for layer in layers]
    return len(set().union(*held)) < sum(map(len, held))


def _per_layer(hf_config: Any, count: int) -> list[tuple[str, list[Any] | tuple[Any, ...]]]:
    """Fields of a config that have a value for each layer."""
    return [
        (name, value)
        for name, value in vars(hf_config).items()
        if isinstance(value, list | tuple) and len(value) == count
    ]


def _longer(hf_config: Any, count: int) -> bool:
    """Whether a field has more values than layers, and not all the same: some may be those of the layers, others of more."""
    lists = (value for value in vars(hf_config).values() if isinstance(value, list | tuple))
    return any(len(value) > count and any(one != value[0] for one in value[:count]) for value in lists)


def _kind(layer: torch.nn.Module) -> list[Any]:
    """All that tells a layer from others, apart from its number and the values of its weights: whatever it and its modules hold,
    hooks among it."""
    stored = {id(tensor): at for at, tensor in enumerate((*layer.parameters(), *layer.buffers()))}  # a tied one once
    held = [(name, type(module), vars(module)) for name, module in layer.named_modules()]
    return [(n, t, _comparable({k: v for k, v in own.items() if k != NUMBER}, stored)) for n, t, own in held]


def _comparable(value: Any, stored: Mapping[int, int]) -> Any:
    """Something that is equal for equal values: weights and buffers (`stored`: ids, and which of the layer's it is) by their kind and
    by which are one, other objects as themselves alone;
    a tensor that is neither is a constant of the graph, and has to be the same one."""
    if isinstance(value, torch.Tensor) and id(value) in stored:
        return (stored[id(value)], value.shape, value.dtype)
    if isinstance(value, torch.nn.Module):
        return type(value)  # what it holds is compared where its turn comes
    if isinstance(value, int | float | str | bool | type(None) | torch.dtype):
        return (type(value), value)
    if isinstance(value, dict):
        return [(_comparable(key, stored), _comparable(held, stored)) for key, held in value.items()]
    if isinstance(value, list | tuple):
        return [_comparable(item, stored) for item in value]
    return sorted(map(repr, value)) if isinstance(value, set | frozenset) else id(value)


class _Unread:
    """The number of a layer that must not matter: whoever looks at it is told so. was_read: whether somebody has, and went on."""

    was_read = False

    def _read(self, *_: Any) -> Any:
        self.was_read = True
        raise NotRepeatable("the layers' numbers are read")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __index__ = __int__ = __float__ = _read
    __hash__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = __str__ = _read
    __repr__ = __format__ = _read


class _UncountedLayers(torch.nn.ModuleList):
    """Has fewer layers than the model: how many must not matter."""

    def __len__(self) -> int:
        raise NotRepeatable("the layers are counted")

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return torch.nn.ModuleList(list(iter(self))[at])
        raise NotRepeatable("a layer is taken by its number")


class _UncountedList(list[Any]):
    """A value for each layer that is left: how many must not matter."""

    def __len__(self) -> int:
        raise NotRepeatable("a list of the config is counted")


class _UncountedTuple(tuple[Any, ...]):
    """The same."""

    def __len__(self) -> int:
        raise NotRepeatable("a list of the config is counted")


@contextlib.contextmanager
def shortened(model: torch.nn.Module, hf_config: Any, runs: list[Run]) -> Iterator[None]:
    """While it lasts, `model` has two layers of every run, with the names they have in the whole."""
    layers = model.get_submodule(runs[0].path)
    whole = dict(layers.named_children())
    dropped = {number for run in runs for number in run.left_out}
    numbered = [
        (module, getattr(module, NUMBER))
        for run in runs
        for number in run.exported
        for module in whole[str(number)].modules()
        if hasattr(module, NUMBER)
    ]
    fields = _per_layer(hf_config, len(whole))
    kind, unread = type(layers), _Unread()
    try:
        for number in dropped:
            delattr(layers, str(number))
        layers.__class__ = _UncountedLayers
        for module, _ in numbered:
            setattr(module, NUMBER, unread)
        for name, values in fields:
            left = (v for number, v in enumerate(values) if number not in dropped)
            vars(hf_config)[name] = _UncountedList(left) if isinstance(values, list) else _UncountedTuple(left)
        yield
        if unread.was_read:
            raise NotRepeatable("the layers' numbers are read")
    finally:
        layers.__class__ = kind
        for name, _ in list(layers.named_children()):
            delattr(layers, name)
        for name, layer in whole.items():  # again in their order
            layers.add_module(name, layer)
        for module, number in numbered:
            setattr(module, NUMBER, number)
        vars(hf_config).update(fields)


def repeated(program: ExportedProgram, model: torch.nn.Module, runs: list[Run]) -> ExportedProgram:
    """The program of the whole `model`, of what `shortened` left of it. Changes `program`. Raises NotRepeatable."""
    inputs = Inputs(program)
    for run in runs:
        _repeat(program, inputs, run)
    return inputs.program_of(model)


def _repeat(program: ExportedProgram, inputs: Inputs, run: Run) -> None:
    before, last = (_part(program, f"{run.path}.{number}.") for number in run.exported)
    names = [f"{run.path}.{number}." for number in run.exported]
    _check_alike(before, last, names, inputs)
    outside = [(node, [user for user in node.users if user not in set(last)]) for node in last]
    template, source = last, names[1]
    for number in run.left_out:
        target = f"{run.path}.{number}."
        own = {node: inputs.renamed(node, source, target) for node in inputs.of(source)}
        new = dict(zip(before, last, strict=True)) | own  # what one layer had of the one before, the next has of it
        copies: list[Node] = []
        with program.graph.inserting_before(last[-1].next):
            for node in template:
                copy = program.graph.node_copy(node, lambda arg, new=new: new.get(arg, arg))
                copy.meta = _moved(node.meta, source, target)
                new[node] = copy
                copies.append(copy)
        last = copies
    for (_, users), node in zip(outside, last, strict=True):
        for user in users:
            user.replace_input_with(template[last.index(node)], node)


def _part(program: ExportedProgram, prefix: str) -> list[Node]:
    """The nodes of one layer. Raises NotRepeatable where they are not one stretch of the graph."""
    part: list[Node] = []
    ended = False
    for node in program.graph.nodes:
        inside = any(f"{path}.".startswith(prefix) for path, _ in node.meta.get("nn_module_stack", {}).values())
        if inside and ended:
            raise NotRepeatable(f"{prefix} is in more than one place")
        if inside:
            part.append(node)
        ended = bool(part) and not inside
    if not part or any("unbacked_bindings" in node.meta for node in part):
        raise NotRepeatable(f"{prefix} has nothing to repeat, or sizes that follow from data")
    return part


def _check_alike(first: list[Node], second: list[Node], names: list[str], inputs: Inputs) -> None:
    """Raises NotRepeatable unless `second` does what `first` does, with results of `first` where that has others."""
    ours, theirs = ({node: at for at, node in enumerate(part)} for part in (first, second))
    given: dict[Node, Node] = {}

    def same(a: Node, b: Node) -> bool:
        if a in ours or b in theirs:
            return ours.get(a, -1) == theirs.get(b, -2)
        if b in ours:
            return given.setdefault(b, a) is a
        return a is b or inputs.name(a).removeprefix(names[0]) == inputs.name(b).removeprefix(names[1]) != ""

    if [(n.op, n.target) for n in first] != [(n.op, n.target) for n in second]:
        raise NotRepeatable("layers that are built alike do not run alike")
    for a, b in zip(first, second, strict=True):
        if _bare(a) != _bare(b) or not all(map(same, _nodes(a), _nodes(b))):
            raise NotRepeatable(f"{a.name} and {b.name} differ")
    if any(user not in ours and user not in theirs for node in first for user in node.users):
        raise NotRepeatable("what a layer makes is read by more than the next one")


def _nodes(node: Node) -> list[Node]:
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _bare(node: Node) -> Any:
    """The arguments of a node, nodes among them all the same."""
    return map_arg((node.args, node.kwargs), lambda _: "node")


def _moved(meta: Mapping[str, Any], source: str, target: str) -> dict[str, Any]:
    """What is known of a node, said of another layer."""

    def name(text: str) -> str:
        return f"{text}.".replace(source, target, 1)[:-1]

    stack = {name(key): (name(path), kind) for key, (path, kind) in meta["nn_module_stack"].items()}
    return {**meta, "nn_module_stack": stack}
