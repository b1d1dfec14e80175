"""find_mla: every dense causal MLA attention of a program, found by data flow and proved by execution.

        hidden --linear kv_a--> [latent | k_pe] --norm--> latent --linear kv_b--> K_nope, V      K = [K_nope | rope(k_pe)]
        hidden --linear q_a--> norm --> q_resid --linear q_b--> q --> core(q, K, V, causal mask)

Start at each attention core. 1. Behind K and V, through ops that only move data, there must be exactly one linear layer
(kv_b) and one more tensor shared by all heads (k_pe). 2. That movement is run with integer tags at two shapes: the result
*is* the index map (heads, nope/v split, order of rows, place of the rope part); nothing is spelled. 3. latent, k_pe and q
must come from one hidden state. 4. The mask must evaluate to causal & key padding. Names are reported, never trusted.
Whatever fails comes back as a `Miss` with the reason and the node to blame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, Node

from .graph.arguments import UnexpectedArgument, node_arg
from .graph.graph_eval import (
    CASTS,
    is_move,
    linear_input,
    nearest_linears,
    shape,
)
from .manager import BrokenPass, Pass, Report, Work
from .matching.cores import find_cores, iter_nodes_of
from .matching.layout import LayoutProver, behind_keys_and_values
from .matching.mask import MaskProver
from .matching.rope import read_k_pe
from .matching.sites import Core, Found, Miss, MlaDims, MlaSite, NoMatch
from .matching.strides import StrideGuard
from .matching.writes import WriteGuard


def find_mla(program: ExportedProgram) -> Found:
    """All attention cores of `program`: matched ones as `MlaSite`, the others as `Miss`. The program is not changed."""
    return find_mla_in(program.graph, program.graph_signature, program.constants)


@dataclass(frozen=True)
class FindMla(Pass):
    """The same as a step of a pipeline: the graph stays as it is, `Found` is its fact."""

    name: ClassVar[str] = "find_mla"

    def requires(self, work: Work) -> None:
        """Any exported program."""

    def run(self, work: Work) -> Report:
        editor = work.editor
        found = find_mla_in(editor.graph, editor.signature, editor.constants)
        names = [site.name for site in found.sites]
        return Report(
            did=(f"{len(names)} MLA attentions found" + (f", {names[0]} to {names[-1]}" if names else ""),),
            could_not=tuple(f"match {miss}" for miss in found.misses),
            details=tuple(
                f"{site.name}: {site.core.kind} core {site.core.out.name}, {site.dims}" for site in found.sites
            ),
            fact=found,
        )

    def ensures(self, work: Work) -> None:
        """Every attention core is a site or a miss, once."""
        found = work.fact(Found)
        judged = sorted([*(site.index for site in found.sites), *(miss.index for miss in found.misses)])
        for index, core in enumerate(iter_nodes_of(find_cores(work.editor.graph))):
            if index >= len(judged) or judged[index] != index:
                raise BrokenPass(self.name, "an attention is neither matched nor missed", core.name)


def find_mla_in(graph: Graph, signature: ExportGraphSignature, constants: Mapping[str, object]) -> Found:
    names = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
    given, constant_names = set(signature.user_inputs), signature.inputs_to_lifted_tensor_constants
    placeholders = graph.find_nodes(op="placeholder")
    user_inputs = [n for n in placeholders if n.name in given]
    lifted = {
        n: value.cpu()
        for n in placeholders
        if isinstance(value := constants.get(constant_names.get(n.name, "")), Tensor) and value.device.type != "meta"
    }
    writes = WriteGuard(graph)
    matcher = _Matcher(MaskProver(user_inputs, lifted), writes, StrideGuard(graph), names)
    sites: list[MlaSite] = []
    misses: list[Miss] = []
    for index, core in enumerate(find_cores(graph)):
        node = core.out if isinstance(core, Core) else core[0]
        try:
            if not isinstance(core, Core):
                writes.check_functional(core[0])
                raise NoMatch(core[1], core[0])
            sites.append(matcher.match(core, index))
        except (NoMatch, UnexpectedArgument) as miss:
            misses.append(Miss(_module_path(node, index), index, str(miss), (miss.node or node).name))
    return Found(tuple(sites), tuple(misses))


def _module_path(node: Node, index: int) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(stack.values())), "")
    return path or f"attention {index}"


class _Matcher:
    def __init__(self, masks: MaskProver, writes: WriteGuard, strides: StrideGuard, names: Mapping[str, str]) -> None:
        self._masks, self._writes, self._strides, self._names = masks, writes, strides, names
        self._prove_layout = LayoutProver()

    def match(self, core: Core, index: int) -> MlaSite:
        for operand in (core.q, core.k, core.v):
            if len(shape(operand)) != 4:
                raise NoMatch("queries, keys and values are not [batch, heads, tokens, channels]", operand)
        self._writes.check(core)
        self._strides.check(core)
        behind = behind_keys_and_values(core)
        latent, weight = behind.latent, behind.weight
        layout = self._prove_layout(core, behind)
        kv_a, hidden = _shared_projection(latent, behind.k_pe)
        rope, k_pe_rows = read_k_pe(behind.k_pe, kv_a)
        q_b, q_resid = _query_path(core.q, hidden)
        latents = [latent, *([q_resid] if q_resid else [])]
        self._writes.check_origin(latents)
        padding = self._masks.padding_input(core)
        read = [core.q, hidden, *latents, behind.k_pe, weight, *([padding] if padding else [])]
        self._writes.check_readable([*read, *([rope.cos, rope.sin] if rope else [])], at=core.out)
        path = (
            self._names[weight.name].rsplit(".", 2)[0] if weight.name in self._names else _module_path(core.out, index)
        )
        dims = MlaDims(
            hidden_size=int(shape(hidden)[-1]),
            num_heads=layout.uk_rows.shape[0],
            q_lora_rank=int(shape(q_resid)[-1]) if q_resid is not None else None,
            kv_lora_rank=int(shape(latent)[-1]),
            qk_nope_head_dim=layout.uk_rows.shape[1],
            qk_rope_head_dim=layout.rope_dim,
            v_head_dim=layout.uv_rows.shape[1],
        )
        return MlaSite(
            name=path, index=index, dims=dims, core=core, hidden=hidden, q_resid=q_resid, q_b=q_b,
            kv_a=kv_a, kv_b_weight=weight, latent=latent, k_pe=behind.k_pe, rope=rope, uk_rows=layout.uk_rows,
            uv_rows=layout.uv_rows, k_pe_rows=k_pe_rows, rope_first=layout.rope_first, padding=padding,
        )  # fmt: skip


def _shared_projection(latent: Node, k_pe: Node) -> tuple[Node, Node]:
    """(kv_a, hidden): the projection both the latent and k_pe come from, and what it reads."""
    for part, node in (("the latent", latent), ("k_pe", k_pe)):
        if len(nearest_linears(node)) != 1:
            raise NoMatch(f"{part} comes from {len(nearest_linears(node))} projections, expected one", node)
    kv_a, rope_a = nearest_linears(latent)[0], nearest_linears(k_pe)[0]
    if kv_a is not rope_a:
        raise NoMatch("the latent and k_pe come from different projections: not MLA", k_pe)
    hidden = linear_input(kv_a)
    if len(shape(hidden)) != 3:
        raise NoMatch("the hidden state is not [batch, tokens, hidden_size]", hidden)
    return kv_a, hidden


def _query_path(query: Node, hidden: Node) -> tuple[Node | None, Node | None]:
    """(q_b, q_resid): the last query projection, and the normed latent it reads (None when it reads the hidden state)."""
    projections = nearest_linears(query)
    if len(projections) != 1:
        raise NoMatch(f"queries come from {len(projections)} projections, expected one", query)
    source = linear_input(projections[0])
    if _uncast(source) is _uncast(hidden):
        return projections[0], None
    below = nearest_linears(source)
    if len(below) == 1 and _uncast(linear_input(below[0])) is _uncast(hidden):
        return projections[0], source
    raise NoMatch("queries and latent do not start at the same hidden state", query)


def _uncast(node: Node) -> Node:
    while node.op == "call_function" and node.target in CASTS and is_move(node):
        node = node_arg(node, 0, "self")
    return node
