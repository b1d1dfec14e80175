"""Edit an exported program and keep it valid: graph, signature, state dict and fake values stay in step; no re-trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ...compat import torch_private
from ...compat.aliasing import written
from .arguments import items_arg
from .graph_eval import value

aten = torch.ops.aten


class ProgramEditor:
    """Works on a copy of `program`'s graph. `nodes` maps the original nodes to the copies; `finish` gives the result."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self.graph = Graph()
        self.nodes: dict[Node, Node] = {}
        output = self.graph.graph_copy(program.graph, self.nodes)
        self._output: Node = self.graph.output(output)
        original_output = next(iter(reversed(program.graph.nodes)))
        self._output.meta.update(original_output.meta)
        self.nodes[original_output] = self._output
        self.module = _uncompiled(program.graph_module, self.graph)
        self.module.meta.update(program.graph_module.meta)
        signature = program.graph_signature
        self._input_specs = list(signature.input_specs)
        self._output_specs = list(signature.output_specs)
        self._state = dict(program.state_dict)
        self._constants = dict(program.constants)
        self._placeholders: list[Node] = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.fake_mode = torch_private.fake_mode_of(value(n) for n in self._placeholders)
        self._first_user_input = next(i for i, s in enumerate(self._input_specs) if s.kind == InputKind.USER_INPUT)
        self._added: dict[str, Node] = {}  # a module that is called twice adds its tensors once
        self._new_inputs: list[Node] = []
        self._new_outputs: dict[str, Node] = {}
        self._values: dict[Any, Any] = {}
        self._dropped: set[str] = set()
        self._ranges = dict(program.range_constraints)

    @property
    def signature(self) -> ExportGraphSignature:
        """Of the program as it is now."""
        return ExportGraphSignature(input_specs=list(self._input_specs), output_specs=list(self._output_specs))

    @property
    def output(self) -> Node:
        return self._output

    @property
    def constants(self) -> dict[str, Any]:
        return self._constants

    @property
    def first_user_input(self) -> Node:
        return self._placeholders[self._first_user_input]

    def add_parameter(self, name: str, tensor: Tensor) -> Node:
        """A new frozen parameter called `name`; a meta tensor stands for one whose values come later."""
        if name in self._added:
            return self._added[name]
        node = self._lift("p_", name, tensor, InputSpec(InputKind.PARAMETER, TensorArgument(""), name, None))
        self._state[name] = torch.nn.Parameter(tensor, requires_grad=False)
        return node

    def add_constant(self, name: str, tensor: Tensor) -> Node:
        """A new constant of the program (not part of the checkpoint)."""
        if name in self._added:
            return self._added[name]
        node = self._lift("b_", name, tensor, InputSpec(InputKind.BUFFER, TensorArgument(""), name, False))
        self._constants[name] = tensor
        return node

    def _lift(self, prefix: str, name: str, tensor: Tensor, spec: InputSpec) -> Node:
        with self.graph.inserting_before(self.first_user_input):
            node = self.graph.placeholder(prefix + name.replace(".", "_"))
        with self.fake_mode:  # on the graph's device, also when the values come later
            node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=value(self.first_user_input).device)
        spec.arg = TensorArgument(node.name)
        self._added[name] = node
        self._input_specs.insert(self._first_user_input, spec)
        self._placeholders.insert(self._first_user_input, node)
        self._first_user_input += 1
        return node

    def add_input(self, name: str, shape: tuple[int | torch.SymInt, ...], dtype: torch.dtype) -> Node:
        """A new keyword input."""
        with self.graph.inserting_after(self._placeholders[-1]):
            node = self.graph.placeholder(name)
        device = value(self.first_user_input).device
        with self.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=device)
        self._input_specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
        self._placeholders.append(node)
        self._new_inputs.append(node)
        return node

    @property
    def user_inputs(self) -> list[Node]:
        """Tensor inputs of the program, the added ones included."""
        return [n for n in self._placeholders[self._first_user_input :] if isinstance(value(n), Tensor)]

    def drop_input(self, name: str) -> None:
        """Remove an input nobody reads any more. Raises RuntimeError if somebody does."""
        node = next(n for n in self._placeholders if n.name == name)
        if node.users:
            raise RuntimeError(f"input {name} is still read by {next(iter(node.users)).name}")
        at = self._placeholders.index(node)
        del self._placeholders[at], self._input_specs[at]
        self.graph.erase_node(node)
        self._dropped.add(name)

    def new_size(self, name: str, hint: int = 64) -> torch.SymInt:
        """A new dynamic size, at least 1."""
        size = torch_private.new_size(self.fake_mode, f"__{name}", hint)
        self._ranges[torch_private.expression(size)] = torch_private.size_range(1, 2**31 - 1)
        return size

    def add_output(self, name: str, node: Node) -> None:
        """The finished program then returns (what it returned before, {name: value, ...})."""
        self._new_outputs[name] = node
        self._output.args = ((*items_arg(self._output, 0, "results"), node),)

    def builder(self, before: Node) -> GraphBuilder:
        return GraphBuilder(self, before)

    def remove_dead(self) -> int:
        """Drop metadata asserts and everything nobody reads any more; returns the number of nodes removed."""
        count = len(self.graph.nodes)
        for node in list(self.graph.nodes):
            if torch_private.is_metadata_assert(node.target):
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code(is_impure_node=_is_impure)
        return count - len(self.graph.nodes)

    def finish(self) -> ExportedProgram:
        """The edited program, verified. Raises if the graph is not well formed."""
        calls, example = self._program.module_call_graph, self._program.example_inputs
        if self._new_inputs or self._new_outputs or self._dropped:
            calls, example = [self._extended_call()], None
        return torch_private.program(  # lints the graph
            root=self.module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(input_specs=self._input_specs, output_specs=self._outputs_as_named()),
            state_dict=self._state,
            range_constraints=self._ranges,
            module_call_graph=calls,
            example_inputs=example,
            constants=self._constants,
            verifiers=self._program.verifiers,
        )

    def _outputs_as_named(self) -> list[OutputSpec]:
        """A pass may have put another node in the place of one that is given out."""
        results = items_arg(self._output, 0, "results")
        return [
            OutputSpec(spec.kind, TensorArgument(result.name), spec.target)
            if isinstance(spec.arg, TensorArgument) and isinstance(result, Node)
            else spec
            for spec, result in zip(self._output_specs, results, strict=True)
        ]

    def _extended_call(self) -> ModuleCallEntry:
        """The calling convention with the added inputs and outputs."""
        signature = self._program.module_call_graph[0].signature
        assert signature is not None
        args, kwargs = torch_private.positions(signature.in_spec)
        kept = {name: leaf for name, leaf in kwargs.items() if name not in self._dropped}
        kwargs = {**kept, **{node.name: 0 for node in self._new_inputs}}
        result = torch_private.positions(signature.out_spec)
        if self._new_outputs:
            result = (result, dict.fromkeys(self._new_outputs, 0))
            self._output_specs += [
                OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None)
                for node in self._new_outputs.values()
            ]
        names = [
            *(n for n in signature.forward_arg_names or [] if n not in self._dropped),
            *(node.name for node in self._new_inputs),
        ]
        in_spec, out_spec = torch_private.structure((args, kwargs)), torch_private.structure(result)
        return ModuleCallEntry(fqn="", signature=ModuleCallSignature([], [], in_spec, out_spec, names))


def _uncompiled(original: GraphModule, graph: Graph) -> GraphModule:
    """A module around `graph` whose Python code is not generated: that takes longer than most passes, and nobody runs it."""
    module = GraphModule(torch.nn.Module(), Graph())
    for node in graph.find_nodes(op="get_attr"):
        setattr(module, node.target, getattr(original, node.target))
    torch_private.put_graph(module, graph)
    return module


def _is_impure(node: Node) -> bool:
    """Whether a node does more than give its value. torch looks at schemas only: a nested graph that writes has none.

    Random ops count as pure, against torch's custom: SDPA is one, and would keep the dense attention alive and computed.
    """
    return node.is_impure(impure_random=False) or bool(written(node))


class GraphBuilder:
    """Adds ops before one node and records their fake values.

    Layers are alike: a fake value is computed once per (op, argument shapes) and used again, which is what makes the
    rewrite of 61 layers take about as long as that of one.
    """

    def __init__(self, editor: ProgramEditor, before: Node) -> None:
        self.editor, self._before = editor, before
        provenance = ("nn_module_stack", "source_fn_stack")
        self._provenance: dict[str, Any] = {k: before.meta[k] for k in provenance if k in before.meta}

    def __call__(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        with self.editor.graph.inserting_before(self._before):
            node = self.editor.graph.call_function(op, args, kwargs)
        key = (op, _fingerprint(args), _fingerprint(kwargs))
        known = self.editor._values
        if key not in known:
            with self.editor.fake_mode:
                known[key] = op(*map_arg(args, value), **map_arg(kwargs, value))
        node.meta["val"] = known[key]
        node.meta.update(self._provenance)
        return node

    def size(self, node: Node, axis: int) -> Node | int:
        """The size of one axis, as a number when it is fixed."""
        size = value(node).shape[axis]
        return size if isinstance(size, int) else self(aten.sym_size.int, node, axis)


def _fingerprint(arg: Any) -> Any:
    """What a fake value depends on: shapes, dtypes, plain arguments."""
    if isinstance(arg, Node):
        return _fingerprint(value(arg))
    if isinstance(arg, Tensor):
        return ("tensor", _fingerprint(tuple(arg.shape)), _fingerprint(arg.stride()), arg.dtype, arg.device)
    if isinstance(arg, torch.SymInt):
        return ("size", torch_private.expression(arg))
    if isinstance(arg, tuple | list):
        return tuple(_fingerprint(item) for item in arg)
    if isinstance(arg, dict):
        return tuple((k, _fingerprint(v)) for k, v in arg.items())
    return (type(arg), arg)
