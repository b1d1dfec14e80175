"""mla_to_dsa on a tiny DeepSeek-V3: equal to dense where it must be, equal to transformers' DeepSeek-V3.2 everywhere."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparing import close
from families import FAMILIES, MAX_LENGTH, build, dynamic_shapes, export, exported, indexer_weights, inputs, logits
from handwritten import Dims, Mla
from handwritten import export as export_handwritten
from handwritten import inputs as handwritten_inputs
from refused_variants import Gqa, Sliding3
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.passes.graph.graph_eval import linear_parts, value
from mla2dsa.passes.mla_to_dsa import Converted, mla_to_dsa

HIDDEN, Q_RANK = 64, 48
SITES = FAMILIES["deepseek_v3"].sites
EVERY_KEY = IndexerConfig(index_topk=MAX_LENGTH, index_n_heads=4, index_head_dim=16)
# batch, length, left padding of the first row
SHAPES = [(2, 7, 0), (3, 33, 5), (1, 1, 0), (2, 64, 60)]
aten = torch.ops.aten


def weights(config: IndexerConfig, q_width: int = Q_RANK) -> dict[str, IndexerWeights]:
    return {site: indexer_weights(config, HIDDEN, q_width, seed=i) for i, site in enumerate(SITES)}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def dense(request: pytest.FixtureRequest) -> tuple[Any, ExportedProgram]:
    return exported("deepseek_v3", request.param)


@pytest.fixture(scope="module")
def converted(dense: tuple[Any, ExportedProgram]) -> Converted:
    return mla_to_dsa(dense[1], EVERY_KEY, weights(EVERY_KEY))


def in_float64(module: GraphModule) -> GraphModule:
    """The same graph without its casts to float32 (norms, router, softmax), which would hide errors below 1e-7."""

    def widened(arg: Any) -> Any:
        return torch.float64 if arg is torch.float32 else arg

    for node in list(module.graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            module.graph.erase_node(node)
        elif node.op == "call_function":
            node.args = torch.fx.node.map_aggregate(node.args, widened)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, widened)
    module.recompile()
    return module


# Equal to dense attention while index_topk covers the sequence


@pytest.mark.parametrize(("batch", "length", "padding"), SHAPES)
def test_dense_equality(
    dense: tuple[Any, ExportedProgram], converted: Converted, batch: int, length: int, padding: int
) -> None:
    kwargs = inputs(batch, length, padding)
    expected = logits(dense[0], kwargs)
    got = logits(converted.program.module(), kwargs)
    close(got, expected, of_max=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dense_equality_in_float64(attention: str) -> None:
    program = export(build("deepseek_v3", attention, torch.float64))
    module = in_float64(program.module())
    rewritten = in_float64(mla_to_dsa(program, EVERY_KEY, weights(EVERY_KEY)).program.module())
    for shape in SHAPES:
        kwargs = inputs(*shape)
        expected = logits(module, kwargs)
        assert expected.dtype == torch.float64
        torch.testing.assert_close(logits(rewritten, kwargs), expected, rtol=0, atol=1e-12)


def test_bfloat16_runs_and_stays_close() -> None:
    model = build("deepseek_v3", "sdpa", torch.bfloat16)
    program = mla_to_dsa(export(model), EVERY_KEY, weights(EVERY_KEY)).program
    dtypes = {name.rsplit("indexer.")[1]: t.dtype for name, t in program.state_dict.items() if ".indexer." in name}
    assert dtypes.pop("weights_proj.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    kwargs = inputs(2, 33, 5)
    expected, got = logits(model, kwargs), logits(program.module(), kwargs)
    assert got.dtype == torch.bfloat16
    close(got, expected, of_max=0.05)


# Equal to transformers' own sparse models beyond index_topk


def indexer_of(sparse: nn.Module) -> dict[str, IndexerWeights]:
    """Random indexer weights, put into `sparse` and returned."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in sparse.named_parameters():
        if ".indexer." in name:
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.2 + name.endswith("k_norm.weight")
    state = sparse.state_dict()
    return {
        site: IndexerWeights.from_tensors(
            {k.removeprefix(f"{site}.indexer."): v for k, v in state.items() if k.startswith(f"{site}.indexer.")}
        )
        for site in SITES
    }


@pytest.mark.parametrize(
    ("dense_name", "sparse_name"), [("deepseek_v3", "deepseek_v32"), ("glm4_moe_lite", "glm_moe_dsa")]
)
def test_parity_with_transformers_sparse_model(dense_name: str, sparse_name: str) -> None:
    """Same base, same indexer, sequences up to sixteen times as long as index_topk."""
    interleave = sparse_name == "glm_moe_dsa"
    config = IndexerConfig(index_topk=8, index_n_heads=16, index_head_dim=16, rope_interleave=interleave)
    model, program = exported(dense_name, "sdpa")
    scaling = model.config.routed_scaling_factor  # the defaults of the two GLM differ
    sparse = build(sparse_name, index_topk=8, index_n_heads=16, routed_scaling_factor=scaling)
    left = sparse.load_state_dict(model.state_dict(), strict=False)
    assert all(".indexer." in name for name in left.missing_keys)
    assert not left.unexpected_keys
    rewritten = mla_to_dsa(program, config, indexer_of(sparse)).program.module()
    for batch, length, padding in [(2, 7, 0), (3, 33, 5), (2, 64, 20), (1, 128, 0)]:
        kwargs = inputs(batch, length, padding)
        expected = logits(sparse, kwargs)
        torch.testing.assert_close(logits(rewritten, kwargs), expected, rtol=0, atol=1e-4)
        if length > 16:  # the sparse path is really taken
            assert (logits(model, kwargs) - expected).abs().max() > 0.1


def test_names_and_shapes_are_those_of_deepseek_v32(converted: Converted) -> None:
    sparse = build("deepseek_v32", device="meta", index_n_heads=4)
    assert {k: tuple(v.shape) for k, v in converted.program.state_dict.items()} == {
        k: tuple(v.shape) for k, v in sparse.state_dict().items()
    }
    assert set(converted.added) == {name for name in converted.program.state_dict if ".indexer." in name}


# The program stays a program


def test_the_original_program_is_untouched(dense: tuple[Any, ExportedProgram]) -> None:
    program = dense[1]

    def picture() -> list[object]:
        return [
            [(n.name, n.op, str(n.target), str(n.args), str(n.kwargs)) for n in program.graph.nodes],
            str(program.graph_signature),
            {k: id(v) for k, v in program.state_dict.items()},
            sorted(program.constants),
        ]

    before = picture()
    mla_to_dsa(program, EVERY_KEY, weights(EVERY_KEY))
    assert picture() == before


def test_save_and_load(converted: Converted) -> None:
    file = io.BytesIO()
    torch.export.save(converted.program, file)
    file.seek(0)
    kwargs = inputs(2, 33, 5)
    loaded = torch.export.load(file).module()
    assert torch.equal(logits(loaded, kwargs), logits(converted.program.module(), kwargs))


@pytest.mark.parametrize("table", [{}, None], ids=["training ops", "core aten"])
def test_decomposing_and_exporting_again(converted: Converted, table: dict[Any, Any] | None) -> None:
    kwargs = inputs(2, 33, 5)
    expected = logits(converted.program.module(), kwargs)
    decomposed = converted.program.run_decompositions(table).module()
    torch.testing.assert_close(logits(decomposed, kwargs), expected, rtol=0, atol=1e-5)


def test_exporting_the_module_again(converted: Converted) -> None:
    kwargs = inputs(2, 33, 5)
    module = converted.program.module()
    again = torch.export.export(module, (), inputs(2, 7), dynamic_shapes=dynamic_shapes(), strict=False)
    targets = {str(node.target) for node in again.graph.nodes}
    assert {"mla2dsa.lightning_indexer.default", "mla2dsa.sparse_mla.default"} <= targets
    assert torch.equal(logits(again.module(), kwargs), logits(module, kwargs))


def test_a_model_on_the_meta_device_converts_to_the_same_graph(converted: Converted) -> None:
    program = export(build("deepseek_v3", str(converted.found.sites[0].core.kind), device="meta"))
    without = mla_to_dsa(program, EVERY_KEY).program
    assert all(tensor.is_meta for tensor in without.state_dict.values())
    assert set(without.state_dict) == set(converted.program.state_dict)
    assert [str(n.target) for n in without.graph.nodes] == [str(n.target) for n in converted.program.graph.nodes]


def test_nothing_dense_is_left(dense: tuple[Any, ExportedProgram], converted: Converted) -> None:
    graph = converted.program.graph
    kv_b = [linear for node in graph.nodes if (linear := linear_parts(node)) and "kv_b" in linear[1].name]
    fills = [n for n in graph.nodes if n.target in (aten.new_empty.default, aten.slice_scatter.default)]
    assert (kv_b, fills) == ([], [])
    assert not [n for n in graph.nodes if "scaled_dot_product" in str(n.target) or "softmax" in str(n.target)]
    seq = str(value(next(n for n in graph.nodes if n.name == "input_ids")).shape[1])
    square = [
        n.name for n in graph.nodes if isinstance(value(n), Tensor) and [str(s) for s in value(n).shape].count(seq) > 1
    ]
    assert square == []  # scores, masks
    assert len(dense[1].graph.nodes) > 0
    assert converted.nodes_removed > 30
    counted = [str(n.target) for n in graph.nodes]
    assert counted.count("mla2dsa.lightning_indexer.default") == counted.count("mla2dsa.sparse_mla.default") == 2


def test_changes_name_both_nodes(dense: tuple[Any, ExportedProgram], converted: Converted) -> None:
    before = {node.name: node for node in dense[1].graph.nodes}
    after = {node.name: node for node in converted.program.graph.nodes}
    assert [change.name for change in converted.changes] == list(SITES)
    for change in converted.changes:
        assert change.before not in after
        old, new = value(before[change.before]), value(after[change.after])
        assert (list(map(str, old.shape)), old.dtype) == (list(map(str, new.shape)), new.dtype)


# What is refused


class TwoLayers(nn.Module):
    """An MLA layer, then another attention."""

    def __init__(self, second: type[Mla]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Mla(Dims()), second(Dims())

    @property
    def self_attn(self) -> Mla:
        return self.first

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        x = x + self.first(x, mask, pos)
        out: Tensor = x + self.second(x, mask, pos)
        return out


@pytest.mark.parametrize("second", [Gqa, Sliding3], ids=lambda c: c.__name__)
def test_a_hybrid_needs_allow_partial(second: type[Mla]) -> None:
    model: Any = TwoLayers(second).eval().double().requires_grad_(False)
    program = export_handwritten(model)
    config = IndexerConfig(64, 2, 8)
    given = {"first": indexer_weights(config, 32, 24)}
    with pytest.raises(
        UserError, match=r"^second: .*: not dense MLA; pass --allow-partial to convert the other layers only$"
    ):
        mla_to_dsa(program, config, given)
    partial = mla_to_dsa(program, config, given, allow_partial=True)
    assert [change.name for change in partial.changes] == ["first"]
    assert [miss.name for miss in partial.found.misses] == ["second"]
    args = handwritten_inputs(model, 3, 33, left=5)
    real = args[1].bool()
    torch.testing.assert_close(partial.program.module()(*args)[real], model(*args)[real], rtol=0, atol=1e-10)


def test_a_program_without_attention_is_refused() -> None:
    axes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 7, 4),), dynamic_shapes=(axes,))
    with pytest.raises(UserError, match="no dense MLA attention in this model and no attention at all"):
        mla_to_dsa(program, EVERY_KEY)


def wrong(change: str) -> Mapping[str, IndexerWeights]:
    good = weights(EVERY_KEY)
    if change == "shape":
        return {**good, SITES[1]: indexer_weights(EVERY_KEY, HIDDEN, Q_RANK + 1)}
    if change == "unknown":
        return {**good, "model.layers.7.self_attn": good[SITES[0]]}
    return {SITES[0]: good[SITES[0]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"model\.layers\.1\.self_attn\.indexer\.wq_b\.weight is \[64, 49\], expected \[64, 48\]"),
        ("unknown", r"indexer weights are given for model\.layers\.7\.self_attn, which is not an MLA layer"),
        ("missing", r"model\.layers\.1\.self_attn has no indexer weights: give weights for every converted layer"),
    ],
)
def test_wrong_weights_are_refused(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mla_to_dsa(exported("deepseek_v3", "sdpa")[1], EVERY_KEY, wrong(change))


@pytest.mark.parametrize(
    ("shared", "given", "message"),
    [
        ((0,), False, "share: 0 cannot share a selection: expected numbers from 1 to 1"),
        ((2,), False, "share: 2 cannot share a selection: expected numbers from 1 to 1"),
        ((1,), True, r"indexer weights are given for model\.layers\.1\.self_attn, which shares the selection"),
    ],
    ids=["first", "beyond the last", "weights"],
)
def test_a_layer_that_cannot_share_is_refused(shared: tuple[int, ...], given: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mla_to_dsa(
            exported("deepseek_v3", "sdpa")[1], replace(EVERY_KEY, shared=shared), weights(EVERY_KEY) if given else None
        )


def test_an_indexer_too_narrow_for_the_rotary_channels_is_refused() -> None:
    with pytest.raises(UserError, match="index_head_dim is 6, expected at least the 8 rotary channels"):
        mla_to_dsa(exported("deepseek_v3", "sdpa")[1], IndexerConfig(8, 4, 6))
