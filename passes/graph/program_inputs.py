"""The inputs of an exported program, to which those of more layers can be added."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node

from ...compat import torch_private

STORED = (InputKind.PARAMETER, InputKind.BUFFER)


class Inputs:
    """Parameters and buffers of `program`, by their nodes."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        nodes = program.graph.find_nodes(op="placeholder")
        self.specs: dict[Node, InputSpec] = dict(zip(nodes, program.graph_signature.input_specs, strict=True))

    def name(self, node: Node) -> str:
        """Of the parameter or buffer; "" of anything else."""
        spec = self.specs.get(node)
        return (spec.target or "") if spec is not None and spec.kind in STORED else ""

    def of(self, prefix: str) -> list[Node]:
        return [node for node in self.specs if self.name(node).startswith(prefix)]

    def renamed(self, node: Node, source: str, target: str) -> Node:
        """A new input like `node`, whose name begins with `target` instead of `source`."""
        spec = self.specs[node]
        name = target + self.name(node).removeprefix(source)
        kind = "p" if spec.kind is InputKind.PARAMETER else "b"
        with self.program.graph.inserting_after(next(reversed(self.specs))):
            made: Node = self.program.graph.placeholder(f"{kind}_{name.replace('.', '_')}")
        made.meta = dict(node.meta)
        self.specs[made] = replace(spec, arg=TensorArgument(made.name), target=name)
        return made

    def program_of(self, model: torch.nn.Module) -> ExportedProgram:
        """The program with its inputs in the order that they have in `model`, and what `model` holds for them."""
        program = self.program
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        order = {name: at for at, name in enumerate(tensors)}
        stored = sorted((n for n in self.specs if self.name(n)), key=lambda n: order[self.name(n)])
        nodes = [*stored, *(n for n in self.specs if not self.name(n))]
        for before, node in itertools.pairwise(nodes):
            before.append(node)
        specs = [self.specs[node] for node in nodes]
        for node in stored:
            held = program.constants if self.specs[node].persistent is False else program.state_dict
            held.setdefault(self.name(node), tensors[self.name(node)])
        return torch_private.program(
            root=torch.nn.Module(),
            graph=program.graph,
            graph_signature=ExportGraphSignature(specs, program.graph_signature.output_specs),
            state_dict={name: program.state_dict[name] for name in tensors if name in program.state_dict},
            range_constraints=program.range_constraints,
            module_call_graph=[
                program.module_call_graph[0],
                *(ModuleCallEntry(name) for name, _ in model.named_modules(remove_duplicate=False) if name),
            ],
            constants=program.constants,
            verifiers=program.verifiers,
        )
