"""Run a program piece by piece, with the weights of one layer in memory at a time.

The graph is cut between attention cores where the least data is alive (the residual stream and what all layers share).
For each piece, its weights are loaded once, then every sequence is run through it; what the next piece needs is carried.
Nothing here knows layers by name, so any program that `find_mla` reads can be streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from ..compat.aliasing import Memory
from ..errors import UserError
from ..kernels import products
from ..passes.graph.graph_eval import linear_parts, value
from ..passes.graph.pieces import Piece, cut
from . import one_expert
from .logits import Logits
from .one_expert import OneByOne, Waiting
from .shelf import Kept, Shelf
from .tiled import Part, cached_parts_of, last_uses, parts_of

Loader = Callable[[str], Tensor]
Override = Callable[..., Any]


@dataclass(frozen=True)
class Seen:
    """One piece run on one sequence: the watched values computed in it, by node name."""

    piece: int
    sequence: int
    values: dict[str, Any]


class PieceRunner:
    """Streams sequences through `program`, on the device of the sequences, whichever it was captured on.

    load: gives a parameter or buffer by name, on the right device; default: the program's own state (in-memory programs).
    cores: names of the nodes that mark layers; one piece holds one of them. None runs the graph in one piece.
    overrides: op -> function(*args) used in its place (baselines, checks).
    one_by_one: experts that are loaded when it is their turn (`one_expert.large`), by a loader that has `expert`. projection: the linear
    layer that gives the first output, if one does; head: those of its weights that nothing else reads.
    shelf: where what a sequence carries from piece to piece waits; None: in memory. Inputs and weights stay as they are, written to or not.
    """

    def __init__(
        self, program: ExportedProgram, load: Loader | None = None, cores: Sequence[str] | None = None,
        overrides: Mapping[Any, Override] | None = None, shelf: Shelf | None = None,
    ) -> None:  # fmt: skip
        self._shelf = shelf
        self._module, self._overrides = program.graph_module, {**products.SERVED, **(overrides or {})}
        self._load = load or _own_state(program)
        specs = program.graph_signature.input_specs
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        self._names = {n: s.target for n, s in zip(placeholders, specs, strict=True) if s.kind != InputKind.USER_INPUT}
        self._inputs = [n for n, s in zip(placeholders, specs, strict=True) if s.kind == InputKind.USER_INPUT]
        self.outputs = [n.name for n in _flat_outputs(program)]
        self._memory = memory = Memory(program.graph)
        self.pieces = cut(program, set(cores or ()), set(self._names), memory)
        self._written = {n for n in program.graph.nodes if memory.is_written(n)}
        self.projection = _projection(program, memory)
        head = (linear_parts(self.projection) or ())[1:] if self.projection is not None else ()
        self.head = {n for n in head if n is not None and n in self._names and len(n.users) == 1}
        self.one_by_one = one_expert.large(self._names)
        self._tiled = cores is not None
        self._ends: dict[frozenset[str], int] = {}
        self._orders: dict[tuple[int, frozenset[str]], Any] = {}
        for node in self._written & set(self._names):
            if sum(node in piece.weights for piece in self.pieces) > 1:
                raise UserError(
                    f"the program writes to {self._names[node]} in place and reads it in several layers: give a functional one"
                )

    def run(
        self, sequences: Sequence[Mapping[str, Tensor]], watch: Sequence[str] | None = None, late: bool = False
    ) -> Iterator[Seen]:
        """Every piece on every sequence, pieces outermost, as far as there is something to see. `watch`: node names, default the
        program's outputs; late: the value of `projection` is Logits, and its weights are loaded for them."""
        watched = set(self.outputs if watch is None else watch)
        carried: list[dict[Node, Any]] = [self._start(sequence) for sequence in sequences]
        for index, piece in enumerate(self.pieces[: self.until(watched)]):
            weights = {node: self._weight(node) for node in piece.weights if not (late and node in self.head)}
            for group in self._groups(piece, sequences):
                done = self._run_group(piece, weights, [carried[number] for number in group], watched, late)
                for number in group:
                    seen, carried[number] = done.pop(0)
                    found = [Seen(index, number, seen)]
                    del seen  # what is yielded is the caller's alone: to put away before the next sequence runs
                    yield found.pop()
            del weights  # before the next piece's are loaded: two layers would be in memory

    def _groups(self, piece: Piece, sequences: Sequence[Mapping[str, Tensor]]) -> Iterator[list[int]]:
        """Sequences that are run at the same time: one, but where experts are loaded one by one."""
        many = getattr(self._load, "expert", None) is not None and not self.one_by_one.keys().isdisjoint(piece.weights)
        group: list[int] = []
        for number, sequence in enumerate(sequences):
            tokens = max((tensor.numel() for tensor in sequence.values() if tensor.dim() == 2), default=1)
            if group and len(group) >= (one_expert.together(tokens) if many else 1):
                yield group
                group = []
            group.append(number)
        if group:
            yield group

    def _run_group(
        self,
        piece: Piece,
        weights: Mapping[Node, Any],
        carried: Sequence[Mapping[Node, Any]],
        watched: set[str],
        late: bool,
    ) -> list[tuple[dict[str, Any], dict[Node, Any]]]:
        """`_run_piece` of several sequences, which wait for each other where one waits for experts."""
        runs = [self._run_piece(piece, weights, one, watched, late) for one in carried]
        answers: list[Any] = [None] * len(runs)
        while True:
            waiting, done = list[Waiting](), list[tuple[dict[str, Any], dict[Node, Any]]]()
            for run in runs:
                try:
                    waiting.append(run.send(answers.pop(0)))
                except StopIteration as end:
                    done.append(end.value)
            if not waiting:
                return done
            answers = list(one_expert.served(waiting))

    def until(self, watch: Collection[str]) -> int:
        """How many pieces are run to see these nodes."""
        key = frozenset(watch)
        if key not in self._ends:  # a session asks for each token
            wanted = {node for piece in self.pieces for node in piece.nodes if node.name in key}
            pieces = enumerate(self.pieces, 1)
            ends = [number for number, piece in pieces if not wanted.isdisjoint({*piece.nodes} - piece.again)]
            self._ends[key] = max(ends, default=0)
        return self._ends[key]

    def weights(self, piece: int) -> list[str]:
        """Names of what a piece reads, as the loader knows them."""
        return [str(self._names[node]) for node in self.pieces[piece].weights]

    def logits_of(self, sequences: Sequence[Mapping[str, Tensor]]) -> Iterator[Logits]:
        """The program's first output, sequence by sequence; its rows are computed when they are asked for, where it is a linear
        layer's."""
        for outputs in self.outputs_of(sequences, late=True):
            yield outputs[0] if isinstance(outputs[0], Logits) else Logits(outputs[0])

    def outputs_of(self, sequences: Sequence[Mapping[str, Tensor]], late: bool = False) -> Iterator[list[Any]]:
        """The program's outputs, sequence by sequence (one sequence's outputs in memory at a time). late: as for `run`."""
        final: dict[int, dict[str, Any]] = {}
        last = self.until(self.outputs) - 1
        for seen in self.run(sequences, late=late):
            number, done = seen.sequence, seen.piece == last
            final.setdefault(number, {}).update(seen.values)
            del seen  # the outputs are the caller's alone
            if done:
                yield list(map(final.pop(number).__getitem__, self.outputs))

    def _weight(self, node: Node) -> Any:
        name, expert = str(self._names[node]), getattr(self._load, "expert", None)
        if expert is None or node not in self.one_by_one:
            return self._load(name)
        return OneByOne(tuple(value(node).shape), partial(expert, name))

    def _start(self, sequence: Mapping[str, Tensor]) -> dict[Node, Any]:
        unknown = set(sequence) - {node.name for node in self._inputs}
        if unknown:
            raise ValueError(f"the program has no input {sorted(unknown)[0]}")
        missing = [node.name for node in self._inputs if node.users and node.name not in sequence]
        if missing:
            raise ValueError(f"the program needs the input {missing[0]}")
        return {node: self._own(node, sequence[node.name]) for node in self._inputs if node.name in sequence}

    def _own(self, node: Node, tensor: Tensor) -> Tensor:
        """An input or a weight as a run may have it: what the program writes to is the caller's, or the next sequence's."""
        return tensor.clone() if node in self._written else tensor

    @torch.no_grad()
    def _run_piece(
        self, piece: Piece, weights: Mapping[Node, Any], carried: Mapping[Node, Any], watched: set[str], late: bool
    ) -> Generator[Waiting, Tensor, tuple[dict[str, Any], dict[Node, Any]]]:
        """(what is watched, what is carried on); yields where experts are to be loaded, and is sent what they give."""
        env: dict[Node, Any] = {node: self._own(node, weight) for node, weight in weights.items()}
        env |= {node: kept.get() if isinstance(kept, Kept) else kept for node, kept in carried.items()}
        device = next((carried[node].device for node in self._inputs if node in carried), None)
        seen: dict[str, Any] = {}
        parts, out_of, last_use = self._order(piece, watched)
        for node in piece.nodes:
            made: Sequence[Node] = [node]
            if node in out_of:
                if out_of[node] in parts:  # not yet
                    continue
            elif node in parts:
                part = parts.pop(node)
                env |= part.run(env, partial(self._apply, device))
                made = part.exits
            elif late and node is self.projection:
                env[node] = self._late(node, env)
            else:
                found = self._call(node, env, device)
                env[node] = (yield found) if isinstance(found, Waiting) else found
                del found
            seen |= {n.name: env[n] for n in made if n in env and n.name in watched and n not in piece.again}
            for done in last_use[node]:
                env.pop(done, None)
        inputs = {node: carried[node] for node in self._inputs if node in carried}
        put = {node: carried[node] if node in carried else self._put_away(node, env[node]) for node in piece.alive}
        return seen, {**inputs, **put}

    def parts(self, piece: Piece, watched: Collection[str]) -> list[Part]:
        """What is run a part at a time, in a program that is streamed, or in another form."""
        if self._tiled:
            return parts_of(piece.nodes, self._memory, watched)
        return cached_parts_of(piece.nodes, self._memory, watched, self._overrides)

    def _order(
        self, piece: Piece, watched: Collection[str]
    ) -> tuple[dict[Node, Part], Mapping[Node, Node], Mapping[Node, Sequence[Node]]]:
        """(`parts` by the node at whose place they are run, that node of what is inside, `last_uses`)."""
        key = id(piece), frozenset(watched)
        if key not in self._orders:  # every token of a session asks
            parts = {part.out: part for part in self.parts(piece, watched)}
            out_of = {node: part.out for part in parts.values() for node in part.inside}
            self._orders[key] = parts, out_of, last_uses(piece.nodes, piece.last_use, parts.values())
        parts, *others = self._orders[key]
        return dict(parts), *others

    def _late(self, linear: Node, env: Mapping[Node, Any]) -> Logits:
        """What a linear layer would give, whose weights are loaded when rows are asked for, if they are nobody else's."""
        x, weight, bias = linear_parts(linear) or (linear, linear, None)
        held = {node: env[node] for node in (weight, bias) if node is not None and node not in self.head}

        def loaded(node: Node) -> Tensor:
            return held[node] if node in held else self._load(str(self._names[node]))

        return Logits(env[x], lambda: (loaded(weight), None if bias is None else loaded(bias)))

    def _put_away(self, node: Node, found: Any) -> Any:
        if self._shelf is None or not isinstance(found, Tensor) or node in self._written:
            return found
        return self._shelf.put(found)

    def _call(self, node: Node, env: Mapping[Node, Any], device: torch.device | None) -> Any:
        """The node's value. `device`, that of the inputs, stands in for the one the graph was captured on."""
        if node.op == "get_attr":
            return getattr(self._module, str(node.target))

        def given(arg: Any) -> Any:
            return env[arg] if isinstance(arg, Node) else arg

        args, kwargs = torch.fx.node.map_aggregate((node.args, dict(node.kwargs)), given)
        if self.one_by_one and any(isinstance(arg, OneByOne) for arg in args):
            return one_expert.call(node.target, args)
        return self._apply(device, node, args, kwargs)

    def _apply(self, device: torch.device | None, node: Node, args: Any, kwargs: Any) -> Any:
        def here(arg: Any) -> Any:
            return device or arg if isinstance(arg, torch.device) else arg

        target = self._overrides.get(node.target, node.target)
        args, kwargs = torch.fx.node.map_aggregate((args, kwargs), here)
        return target(*args, **kwargs)


def _projection(program: ExportedProgram, memory: Memory) -> Node | None:
    """The linear layer whose result the program's first output is, if nobody else reads that, and what it reads stays as it is."""
    first = next(iter(_flat_outputs(program)), None)
    if first is None or not linear_parts(first) or len(first.users) != 1:
        return None
    return None if any(map(memory.is_written, first.all_input_nodes)) else first


def _own_state(program: ExportedProgram) -> Loader:
    def load(name: str) -> Tensor:
        tensor = program.state_dict.get(name, program.constants.get(name))
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise ValueError(f"{name} has no values in this program: give a loader")
        return tensor

    return load


def _flat_outputs(program: ExportedProgram) -> list[Node]:
    output = next(iter(reversed(program.graph.nodes)))
    return [n for n in output.args[0] if isinstance(n, Node)]
