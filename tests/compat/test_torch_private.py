"""Each private name of torch: it is there, it does what we use it for, and one line says so when it is gone."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from forgetting import complaint, forget
from torch import Tensor, nn
from torch.export import Dim, export

from mla2dsa.compat import aliasing
from mla2dsa.compat import torch_private as private
from mla2dsa.compat.private_names import MovedError
from mla2dsa.compat.torch_private import TORCH


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float64).softmax(-1) * 2


def program() -> Any:
    return export(Doubled(), (torch.ones(3, 4),), dynamic_shapes={"x": {0: Dim.DYNAMIC}})


def values() -> list[Any]:
    return [node.meta["val"] for node in program().graph.nodes if node.op == "placeholder"]


def new_size() -> torch.SymInt:
    return private.new_size(private.fake_mode_of(values()), "length", hint=5)


def put_graph() -> Any:
    module = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    graph = torch.fx.Graph()
    private.put_graph(module, graph)
    assert module.graph is graph
    assert graph.owning_module is module
    return module


def made_again() -> Any:
    """A program of another's parts, whose code nobody has asked for yet."""
    whole = program()
    parts = {
        name: getattr(whole, name)
        for name in (
            "graph",
            "graph_signature",
            "state_dict",
            "range_constraints",
            "module_call_graph",
            "constants",
            "verifiers",
        )
    }
    made = private.program(root=whole.graph_module, **parts)
    assert "_code" not in vars(made.graph_module)
    assert torch.equal(made.module()(torch.ones(3, 4)), whole.module()(torch.ones(3, 4)))
    assert "softmax" in made.graph_module.code
    assert type(program().graph_module) is not type(made.graph_module), "others are made as ever"
    return made


def topk() -> Any:
    with private.topk_rule(lambda tensor, count: None):
        return torch.ones(3).topk(2)


def is_metadata_assert() -> bool:
    found = program().graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default)
    return all(private.is_metadata_assert(node.target) for node in found) and len(found) > 0


def round_trip() -> Any:
    spec = private.structure(((3, 4), {"mask": 5}))
    assert private.positions(spec) == ((0, 1), {"mask": 2})
    return spec


def fake() -> Any:
    with private.fake_tensors():
        return torch.ones(2)


def uncached() -> bool:
    with private.uncached_shapes():
        return not torch._dynamo.config.fake_tensor_cache_enabled


def op_is_read() -> bool:
    facts = aliasing._facts.__wrapped__(torch.ops.aten.mul_.Tensor)  # not what an earlier call has kept
    return facts is not None and facts.writes == ("self",)


def saved_program() -> Any:
    """What torch.export.save writes, read back."""
    made = export(Doubled(), (torch.ones(3, 4),))
    made._example_inputs = None
    stream = io.BytesIO()
    torch.export.save(made, stream)
    with zipfile.ZipFile(stream) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("models/model.json"))
        document = json.loads(archive.read(name))
    found = private.saved_program(document, {}, {})
    assert torch.equal(found.module()(torch.ones(3, 4)), made.module()(torch.ones(3, 4)))
    return found


CALLS: dict[str, Callable[[], Any]] = {
    "torch:_check_value": lambda: private.check_value(True, lambda: "") is None,
    "torch:ops.aten._assert_tensor_metadata.default": is_metadata_assert,
    "torch:ops.aten._safe_softmax.default": private.softmax_ops,
    "torch:ops.aten._softmax.default": private.softmax_ops,
    "torch:ops.aten._to_copy.default": private.cast_op,
    "torch:ops.aten._unsafe_view.default": private.view_op,
    "torch:ops.mkldnn._is_mkldnn_bf16_supported": lambda: private.cpu_multiplies_bfloat16() in (True, False),
    "torch:ops.mkldnn._is_mkldnn_fp16_supported": lambda: private.cpu_multiplies_float16() in (True, False),
    "torch._dynamo.config:fake_tensor_cache_enabled": uncached,
    "torch._dynamo.config:patch": uncached,
    "torch._dynamo.source:ConstantSource": new_size,
    "torch._ops:OpOverload": op_is_read,
    "torch._export.serde.schema:ExportedProgram": saved_program,
    "torch._export.serde.serialize:ExportedProgramDeserializer": saved_program,
    "torch._export.serde.serialize:_dict_to_dataclass": saved_program,
    "torch._export.serde.serialize:deserialize_scalar_type": lambda: private.saved_element_type(7) is torch.float32,
    "torch._subclasses:FakeTensor": lambda: private.fake_mode_of(values()),
    "torch._subclasses:FakeTensorMode": lambda: fake() is not None,
    "torch.export.exported_program:_create_graph_module_for_export": made_again,
    "torch.fx._lazy_graph_module:_LazyGraphModule": made_again,
    "torch.fx.experimental.symbolic_shapes:DimDynamic": new_size,
    "torch.fx.experimental.symbolic_shapes:ShapeEnv": lambda: fake() is not None,
    "torch.fx.experimental.symbolic_shapes:ShapeEnv.create_symbol": new_size,
    "torch.fx.experimental.symbolic_shapes:ShapeEnv.create_symintnode": new_size,
    "torch.onnx._internal.exporter:": private.onnx_exporter_log,
    "torch.onnx._internal.exporter._registration:ONNXRegistry.from_torchlib": lambda: private.onnx_exporter_knows(
        [torch.ops.aten.mm.default]
    ),
    "torch.onnx._internal.exporter._registration:ONNXRegistry.get_decomps": lambda: private.onnx_exporter_knows(
        [torch.ops.aten.mm.default]
    ),
    "torch.utils._python_dispatch:TorchDispatchMode": topk,
    "torch.utils._pytree:tree_structure": round_trip,
    "torch.utils._pytree:tree_unflatten": round_trip,
    "torch.utils._sympy.value_ranges:ValueRanges": lambda: private.size_range(1, 9),
    "FakeTensor.fake_mode": lambda: private.fake_mode_of(values()),
    "FakeTensorMode.shape_env": new_size,
    "GraphModule._graph": put_graph,
    "OpOverload._schema": op_is_read,
    "SymInt.node.expr": lambda: private.expression(values()[0].shape[0]),
    "TreeSpec.num_leaves": round_trip,
}
LISTED = [*TORCH.names, *TORCH.attributes]


@pytest.mark.parametrize("name", LISTED)
def test_name_is_there(name: str) -> None:
    assert CALLS[name]() is not False


@pytest.mark.parametrize("name", [name for name in LISTED if name != "SymInt.node.expr"])
def test_a_name_that_is_gone_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, name)
    for known in (private.cast_op, private.view_op, private.softmax_ops, private._metadata_assert):
        known.cache_clear()
    with pytest.raises(MovedError, match=complaint(TORCH, name)):
        CALLS[name]()


def test_a_size_without_formula_is_said() -> None:
    with pytest.raises(MovedError, match=complaint(TORCH, "SymInt.node.expr")):
        private.expression(object())  # type: ignore[arg-type]


def test_every_call_is_of_a_listed_name() -> None:
    assert CALLS.keys() == set(LISTED)


def test_check_value_raises_what_it_is_told() -> None:
    with pytest.raises(ValueError, match=r"^three$"):
        private.check_value(False, lambda: "three")


def test_a_new_size_is_dynamic_and_may_be_one() -> None:
    size = new_size()
    with private.fake_mode_of(values()):
        assert (size == 1) is not True
    assert private.expression(size).is_Symbol


def test_without_fake_tensors_there_is_no_mode() -> None:
    with pytest.raises(ValueError, match="no value of this program is a fake tensor"):
        private.fake_mode_of([torch.ones(1), None, 3])


def test_the_onnx_exporter_does_not_know_our_ops() -> None:
    assert not private.onnx_exporter_knows([torch.ops.aten.mm.default, torch.ops.aten._pdist_forward.default])


def test_decomposed_graphs_hold_the_ops_that_are_looked_for() -> None:
    targets = {node.target for node in program().run_decompositions().graph.nodes}
    assert private.cast_op() in targets
    assert private.softmax_ops() & targets
