"""Layers that are alike: the graph in which they are repeated is the graph that torch.export makes of the whole model."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from saved import captured, config_dict
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from mla2dsa.optimizer.model import capture as module
from mla2dsa.optimizer.model.capture import Capture, capture
from mla2dsa.passes.graph.repeated_layers import Run, alike

NAMES = ("deepseek_v3", "longcat_flash", "glm4_moe_lite", "mistral4")
LAYERS = {"num_hidden_layers": 6}
PER_LAYER = {"longcat_flash": {"num_layers": 6}, "glm4_moe_lite": {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4}}


def described(program: ExportedProgram) -> list[Any]:
    """Every node of a graph, with the numbers of its arguments in the place of their names, and what is known of it."""
    numbers: dict[Node, int] = {}
    symbols: dict[str, int] = {}

    def size(found: Any) -> Any:
        return symbols.setdefault(str(found), len(symbols)) if isinstance(found, torch.SymInt) else found

    found = []
    for number, node in enumerate(program.graph.nodes):
        numbers[node] = number
        value = node.meta.get("val")
        values = value if isinstance(value, tuple | list) else (value,)
        shapes = [(tuple(map(size, v.shape)), v.dtype) if isinstance(v, torch.Tensor) else None for v in values]
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        target = node.target if node.op == "call_function" else node.op
        found.append((target, map_arg((node.args, node.kwargs), lambda n: ("node", numbers[n])), shapes, stack))
    return found


def inputs(program: ExportedProgram) -> list[Any]:
    return [(spec.kind, spec.arg.name, spec.target, spec.persistent) for spec in program.graph_signature.input_specs]


def whole(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Capture:
    with monkeypatch.context() as patch:
        patch.setattr(module, "alike", lambda *_: [])
        return capture(config)


def exported(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Capture, list[int]]:
    """(capture, how many layers the model had each time torch.export was called)."""
    seen: list[int] = []
    export = module._export

    def counting(model: torch.nn.Module, *others: Any) -> ExportedProgram:
        seen.append(max(sum(1 for _ in m) for m in model.modules() if isinstance(m, torch.nn.ModuleList)))
        return export(model, *others)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_export", counting)
        return capture(config), seen


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_that_of_the_whole_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_dict(name, **LAYERS, **PER_LAYER.get(name, {}))
    found, seen = exported(config, monkeypatch)
    expected = whole(config, monkeypatch)
    assert len(seen) == 1
    assert seen[0] < 6
    assert described(found.program) == described(expected.program)
    assert inputs(found.program) == inputs(expected.program)
    assert found.shapes == expected.shapes
    assert list(found.program.state_dict) == list(expected.program.state_dict)
    assert found.program.constants.keys() == expected.program.constants.keys()
    assert all(torch.equal(value, expected.program.constants[n]) for n, value in found.program.constants.items())
    entries = [[entry.fqn for entry in made.program.module_call_graph] for made in (found, expected)]
    assert entries[0] == entries[1]


def test_layers_of_two_kinds_are_two_runs() -> None:
    model = families.build("deepseek_v3", num_hidden_layers=8, first_k_dense_replace=3, device="meta")
    assert alike(model, model.config) == [Run("model.layers", 0, 3), Run("model.layers", 3, 5)]


def test_two_layers_are_not_worth_it() -> None:
    model = families.build("deepseek_v3", num_hidden_layers=2, device="meta")
    assert alike(model, model.config) == []


@pytest.mark.parametrize("field", ["layer_types", "anything"])
def test_what_config_says_of_each_layer_tells_them_apart(field: str) -> None:
    model = families.build("deepseek_v3", num_hidden_layers=6, first_k_dense_replace=0, device="meta")
    setattr(model.config, field, [0, 0, 0, 0, 1, 1])
    assert alike(model, model.config) == [Run("model.layers", 0, 4)]


def test_a_list_for_more_than_the_layers_forbids_it() -> None:
    """Of layers and what comes after them: cut to the layers that are exported, it would say something else of them."""
    model = families.build("deepseek_v3", num_hidden_layers=6, first_k_dense_replace=0, device="meta")
    model.config.layer_types = [0, 0, 1, 0, 0, 0, 1]
    assert alike(model, model.config) == []
    model.config.layer_types = [0] * 7
    assert alike(model, model.config) == [Run("model.layers", 0, 6)]


def mark(module: torch.nn.Module) -> None:
    module._factor = 2.0  # type: ignore[assignment]


CHANGES: dict[str, Any] = {
    "private attribute": mark,
    "hook": lambda module: module.register_forward_hook(lambda *_: None),
    "buffer": lambda module: module.register_buffer("more", torch.ones(1, device="meta"), persistent=False),
    "module": lambda module: module.add_module("more", torch.nn.Identity()),
    "tied weights": lambda module: setattr(module.kv_a_layernorm, "weight", module.q_a_layernorm.weight),
    "training": lambda module: module.train(),
    "constant": lambda module: setattr(module, "factor", torch.ones(1)),
    "constants in a list": lambda module: setattr(module, "factors", [torch.ones(1)]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_a_layer_holds_tells_it_apart(change: Any) -> None:
    options = {"num_hidden_layers": 6, "first_k_dense_replace": 0, "q_lora_rank": 32}  # both latents as wide
    model = families.build("deepseek_v3", device="meta", **options).eval()
    change(model.model.layers[4].self_attn)
    assert alike(model, model.config) == [Run("model.layers", 0, 4)]


def test_one_layer_in_two_places_forbids_it() -> None:
    model = families.build("deepseek_v3", num_hidden_layers=6, first_k_dense_replace=0, device="meta")
    model.model.layers[4] = model.model.layers[3]
    assert alike(model, model.config) == []


def test_a_weight_of_two_layers_forbids_it() -> None:
    model = families.build("deepseek_v3", num_hidden_layers=6, first_k_dense_replace=0, device="meta")
    model.model.layers[4].self_attn.o_proj.weight = model.model.layers[3].self_attn.o_proj.weight
    assert alike(model, model.config) == []


@pytest.mark.parametrize("wrapped", [lambda it: it, lambda it: {"factor": [it]}], ids=["plain", "nested"])
def test_constants_that_two_layers_share_and_others_do_not(wrapped: Any) -> None:
    """The first two layers alone would look as if all had the same one."""
    model = families.build("deepseek_v3", num_hidden_layers=6, first_k_dense_replace=0, device="meta")
    shared, other = torch.ones(1), torch.full((1,), 2.0)
    for number, layer in enumerate(model.model.layers):
        layer.factor = wrapped(shared if number < 2 else other)
    assert alike(model, model.config) == [Run("model.layers", 2, 4)]


def changed_forward(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    forward = DeepseekV3Attention.forward

    def changed(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        out, rest = forward(self, hidden_states, *args, **kwargs)
        return change(self, out), rest

    monkeypatch.setattr(DeepseekV3Attention, "forward", changed)


def swallowed(layer: Any) -> float:
    try:
        return float(layer.layer_idx)
    except Exception:
        return 1.0


@pytest.mark.parametrize(
    "change",
    [
        lambda self, out: out * (1.0 + self.layer_idx),
        lambda self, out: out * {3: 0.5}.get(self.layer_idx, 1.0),
        lambda self, out: out * (2.0 if repr(self.layer_idx) == "3" else 1.0),
        lambda self, out: out * (2.0 if f"{self.layer_idx}" == "3" else 1.0),
        lambda self, out: out * swallowed(self),
        lambda self, out: out * len(self.config.anything),
    ],
    ids=["factor", "key", "repr", "format", "swallowed", "counted"],
)
def test_layers_that_read_their_number_are_all_exported(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_forward(monkeypatch, change)
    config = config_dict("deepseek_v3", **LAYERS) | {"anything": [0] * 6}
    _, seen = exported(config, monkeypatch)
    assert seen[1:] == [6]


@pytest.mark.parametrize(
    "read", [lambda layers: len(layers), lambda layers: layers[-1].self_attn.layer_idx], ids=["counted", "by number"]
)
def test_layers_that_are_counted_outside_are_all_exported(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Model

    forward = DeepseekV3Model.forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        found["last_hidden_state"] = found["last_hidden_state"] * read(self.layers)
        return found

    monkeypatch.setattr(DeepseekV3Model, "forward", changed)
    config = config_dict("deepseek_v3", **LAYERS)
    found, seen = exported(config, monkeypatch)
    assert seen[1:] == [6]
    assert described(found.program) == described(whole(config, monkeypatch).program)


def test_layers_that_remember_an_earlier_one_are_all_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first of them makes goes into all others: the third gets it from another place than the second."""
    kept: dict[Any, torch.Tensor] = {}

    def mixed(self: Any, out: torch.Tensor) -> torch.Tensor:
        if self in kept:  # the next export
            kept.clear()
        kept[self] = out
        return out + next(iter(kept.values()))

    changed_forward(monkeypatch, mixed)
    _, seen = exported(config_dict("deepseek_v3", **LAYERS, first_k_dense_replace=0), monkeypatch)
    assert seen == [2, 6]


def test_a_model_that_cannot_be_exported_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, out: torch.Tensor) -> torch.Tensor:
        return out * float(out.sum())

    changed_forward(monkeypatch, broken)
    with pytest.raises(module.UserError, match=r"torch\.export cannot capture DeepseekV3ForCausalLM"):
        captured(config_dict("deepseek_v3", **LAYERS))
