"""PieceRunner: streaming a program in pieces gives what running it whole gives, with one piece's weights in memory."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from typing import Any

import families
import pytest
import torch
from comparing import close
from handwritten import Mla, build, export, inputs
from saved import captured, config_dict, opened, own_weights, run, saved, tensors, whole
from torch import Tensor
from torch.export import Dim, ExportedProgram
from writing_variants import CountsCalls, MaskInputWritten

from mla2dsa.errors import UserError
from mla2dsa.optimizer.proof import baselines
from mla2dsa.passes.mla_to_dsa import mla_to_dsa, prepare
from mla2dsa.passes.tap import SITE_TAPS, tap
from mla2dsa.runtime.execute import PieceRunner

LAYERS = 4
SHAPES = [(1, 1, 0), (2, 9, 3), (1, 40, 0)]  # batch, length, left padding of the first row


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    """deepseek_v3 with one dense and three MoE layers, weights in the program, plain SDPA."""
    return families.export(families.build("deepseek_v3", num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def cores(program: ExportedProgram) -> list[str]:
    return [site.core.out.name for site in prepare(program)[1].sites]


def batches(*shapes: tuple[int, int, int]) -> list[dict[str, Tensor]]:
    return [tensors(families.inputs(*shape, seed=seed)) for seed, shape in enumerate(shapes)]


# The same numbers


@pytest.mark.parametrize(("batch", "length", "padding"), SHAPES, ids=str)
def test_streamed_is_the_module_bit_for_bit(
    program: ExportedProgram, cores: list[str], batch: int, length: int, padding: int
) -> None:
    sequence = batches((batch, length, padding))[0]
    [logits] = next(PieceRunner(program, cores=cores).outputs_of([sequence]))
    assert torch.equal(logits, whole(program, sequence))


def test_one_piece_without_cores(program: ExportedProgram, cores: list[str]) -> None:
    runner = PieceRunner(program)
    sequence = batches(SHAPES[1])[0]
    assert len(runner.pieces) == 1
    assert torch.equal(next(runner.outputs_of([sequence]))[0], whole(program, sequence))


def test_sequences_of_different_sizes_in_one_stream(program: ExportedProgram, cores: list[str]) -> None:
    sequences = batches(*SHAPES)
    streamed = list(PieceRunner(program, cores=cores).outputs_of(sequences))
    assert len(streamed) == len(sequences)
    for sequence, [logits] in zip(sequences, streamed, strict=True):
        assert torch.equal(logits, whole(program, sequence))


def test_no_sequences(program: ExportedProgram, cores: list[str]) -> None:
    assert list(PieceRunner(program, cores=cores).outputs_of([])) == []


def test_converted_program_in_pieces(program: ExportedProgram) -> None:
    """A rewritten in-memory program: 16 of 40 keys."""
    config = families.IndexerConfig(16, 4, 16)
    weights = {s.name: families.indexer_weights(config, 64, 48) for s in prepare(program)[1].sites}
    converted = mla_to_dsa(program, config, weights)
    sequence = batches(SHAPES[2])[0]
    streamed = PieceRunner(converted.program, cores=[change.after for change in converted.changes])
    assert len(streamed.pieces) == LAYERS + 1
    assert torch.equal(
        next(streamed.outputs_of([sequence]))[0], next(PieceRunner(converted.program).outputs_of([sequence]))[0]
    )


@pytest.mark.parametrize("attention", ["anchor", "eager"])
def test_checkpoint_in_pieces(attention: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = opened(saved("deepseek_v3", tmp_path_factory), attention)
    dense = source.capture.program
    names = [site.core.out.name for site in prepare(dense)[1].sites]
    sequence = batches(SHAPES[1])[0]
    runner = PieceRunner(dense, source.loader(dense), names)
    assert torch.equal(next(runner.outputs_of([sequence]))[0], run(source, sequence))


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "minicpm3"])
def test_runs_on_the_device_of_its_inputs(name: str) -> None:
    """Captured on the CPU, run on another device (meta, which any machine has): nothing is left behind on the CPU."""
    dense = captured(config_dict(name)).program
    config = families.IndexerConfig(8, 4, 16)
    converted = mla_to_dsa(dense, config)
    for program in (dense, converted.program):
        held: dict[str, Any] = {**program.state_dict, **program.constants}
        runner = PieceRunner(program, lambda name, held=held: held[name].to("meta"))  # type: ignore[misc]
        [batch] = batches(SHAPES[1])
        seen = list(runner.run([{key: value.to("meta") for key, value in batch.items()}], _tensor_nodes(program)))
        assert {value.device.type for s in seen for value in s.values.values()} == {"meta"}


def _tensor_nodes(program: ExportedProgram) -> list[str]:
    return [n.name for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor)]


# What is in memory


def test_every_weight_is_loaded_once_and_in_order(program: ExportedProgram, cores: list[str]) -> None:
    load, loaded = own_weights(program), []

    def recorded(name: str) -> Tensor:
        loaded.append(name)
        return load(name)

    list(PieceRunner(program, recorded, cores).run(batches(*SHAPES)))
    layers = [int(name.split(".")[2]) for name in loaded if ".layers." in name]
    assert Counter(loaded) == dict.fromkeys(loaded, 1)
    assert set(program.state_dict) <= set(loaded)
    assert layers == sorted(layers)
    assert loaded.index("model.embed_tokens.weight") < loaded.index("model.layers.0.self_attn.q_a_proj.weight")
    assert loaded[-1] == "lm_head.weight"


def test_one_piece_of_weights_at_a_time(program: ExportedProgram, cores: list[str]) -> None:
    load, alive, most = own_weights(program), [], [0]

    def watched(name: str) -> Tensor:
        tensor = load(name)
        alive.append((weakref.ref(tensor), tensor.numel()))
        most[0] = max(most[0], sum(size for ref, size in alive if ref() is not None))
        return tensor

    runner = PieceRunner(program, watched, cores)
    for seen in runner.run(batches(*SHAPES)):
        del seen
    gc.collect()
    sizes = [sum(node.meta["val"].numel() for node in piece.weights) for piece in runner.pieces]
    assert len(sizes) == LAYERS + 1
    assert max(sizes) < sum(sizes) / 2
    assert most[0] <= max(sizes)
    assert not any(ref() is not None for ref, _ in alive)


def test_a_tied_weight_is_loaded_for_the_embedding_and_for_the_head(tmp_path_factory: pytest.TempPathFactory) -> None:
    source = opened(saved("minicpm3", tmp_path_factory))
    dense = source.capture.program
    load, loaded = source.loader(dense), Counter[str]()

    def counted(name: str) -> Tensor:
        loaded[source.capture.tied.get(name, name)] += 1
        return load(name)

    list(PieceRunner(dense, counted, [s.core.out.name for s in prepare(dense)[1].sites]).run(batches(SHAPES[0])))
    assert {name: count for name, count in loaded.items() if count > 1} == {"model.embed_tokens.weight": 2}


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "glm4_moe_lite", "minicpm3", "mistral4"])
def test_only_the_residual_and_shared_tables_are_carried(name: str) -> None:
    dense = captured(config_dict(name, num_hidden_layers=LAYERS, mlp_layer_types=None)).program
    runner = PieceRunner(dense, cores=[site.core.out.name for site in prepare(dense)[1].sites])
    alive = [{node for node in piece.alive if isinstance(node.meta["val"], Tensor)} for piece in runner.pieces]
    assert len(alive) == LAYERS + 1
    for cut in alive[: LAYERS - 1]:
        widths = sorted(node.meta["val"].shape[-1] for node in cut if isinstance(node.meta["val"].shape[-1], int))
        masks = [node for node in cut if not isinstance(node.meta["val"].shape[-1], int)]
        assert widths in ([4, 64], [8, 8, 64])  # rotary table: complex, or cos and sin; residual: hidden_size
        assert masks == []  # computed in every piece: of long sequences they are larger than all the rest
    assert len(alive[LAYERS - 1]) == 1  # before the final projection: what it projects


def test_what_a_tap_shows_is_not_carried() -> None:
    """Calibration would otherwise hold every layer's samples until the end."""
    tapped = tap(captured(config_dict("deepseek_v3", num_hidden_layers=LAYERS)).program, rows=4)
    sites = tapped.found.sites
    shown = {tapped.taps[f"{site.name}.{name}"] for site in sites for name in SITE_TAPS}
    runner = PieceRunner(tapped.program, cores=[site.core.out.name for site in sites])
    assert len(shown) == LAYERS * len(SITE_TAPS)
    for piece in runner.pieces:
        assert not shown & {node.name for node in piece.alive}


def test_what_is_carried_is_what_a_sequence_needs(program: ExportedProgram, cores: list[str]) -> None:
    """Nothing that a piece computed stays alive beyond the values the next pieces read."""
    runner = PieceRunner(program, cores=cores)
    for piece in runner.pieces:
        released = {node for nodes in piece.last_use.values() for node in nodes}
        assert not released & set(piece.alive)
        assert set(piece.nodes) <= released | set(piece.alive)


# Watching and replacing


def test_watched_values_come_from_their_layers_piece(program: ExportedProgram, cores: list[str]) -> None:
    sequences = batches(SHAPES[1], SHAPES[2])
    seen = list(PieceRunner(program, cores=cores).run(sequences, watch=cores))
    assert [(s.piece, s.sequence) for s in seen] == [(p, n) for p in range(LAYERS) for n in range(2)]
    assert [list(s.values) for s in seen[::2]] == [[core] for core in cores]
    assert seen[2].values[cores[1]].shape == (2, 4, 9, 12)  # batch, heads, tokens, v_head_dim
    assert seen[3].values[cores[1]].shape == (1, 4, 40, 12)


def test_nothing_is_run_after_what_is_watched(program: ExportedProgram, cores: list[str]) -> None:
    loaded: list[str] = []
    load = own_weights(program)
    runner = PieceRunner(program, lambda name: loaded.append(name) or load(name), cores)  # type: ignore[func-returns-value]
    assert [seen.piece for seen in runner.run(batches(SHAPES[1]), watch=cores[:2])] == [0, 1]
    assert not any(name.startswith(("model.layers.3.", "lm_head.")) for name in loaded)
    assert runner.until(runner.outputs) == len(runner.pieces)


def test_an_override_replaces_the_op(program: ExportedProgram, cores: list[str]) -> None:
    def nothing(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(v)

    sequence, sdpa = batches(SHAPES[1])[0], torch.ops.aten.scaled_dot_product_attention.default
    runner = PieceRunner(program, cores=cores, overrides={sdpa: nothing})
    seen = [value for s in runner.run([sequence], watch=cores) for value in s.values.values()]
    assert len(seen) == LAYERS
    assert not any(bool(value.any()) for value in seen)
    assert not torch.equal(next(runner.outputs_of([sequence]))[0], whole(program, sequence))


def test_overriding_the_selection_changes_a_converted_program(program: ExportedProgram) -> None:
    config = families.IndexerConfig(8, 4, 16)
    weights = {s.name: families.indexer_weights(config, 64, 48) for s in prepare(program)[1].sites}
    converted = mla_to_dsa(program, config, weights).program
    sequence = batches(SHAPES[2])[0]
    op = torch.ops.mla2dsa.sparse_mla.default
    own, window = (
        next(PieceRunner(converted, overrides=overrides).outputs_of([sequence]))[0]
        for overrides in ({}, {op: baselines.window})
    )
    close(own[:, :8], window[:, :8], of_max=1e-6)  # up to 8 keys: both take all of them
    assert not torch.allclose(own[:, 9:], window[:, 9:], atol=0.1)


# Errors


def test_a_program_without_values_needs_a_loader() -> None:
    dense = captured(config_dict("minicpm3")).program
    with pytest.raises(ValueError, match=r"[a-z_.]+\.weight has no values in this program: give a loader"):
        list(PieceRunner(dense).run(batches(SHAPES[0])))


def test_an_unknown_input_is_named(program: ExportedProgram) -> None:
    sequence = batches(SHAPES[0])[0]
    with pytest.raises(ValueError, match="no input inputs_embeds"):
        list(PieceRunner(program).run([{**sequence, "inputs_embeds": sequence["input_ids"]}]))


def test_a_missing_input_is_named(program: ExportedProgram) -> None:
    sequence = batches(SHAPES[0])[0]
    del sequence["position_ids"]
    with pytest.raises(ValueError, match="needs the input position_ids"):
        list(PieceRunner(program).run([sequence]))


# Any program


class Chain(torch.nn.Module):
    """Not a language model: a value from the very start is needed at the very end, and two outputs are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = x.sin()
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x * first, first


def test_values_and_outputs_that_cross_pieces() -> None:
    model = Chain().requires_grad_(False)
    x = torch.randn(5, 6)
    dynamic = {"x": {0: Dim("n", min=1, max=64)}}
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    cores = [node.name for node in program.graph.nodes if "tanh" in node.name]
    runner = PieceRunner(program, cores=cores)
    assert len(runner.pieces) == 3
    for batch in (x, x[:1]):
        out = next(runner.outputs_of([{"x": batch}]))
        assert all(torch.equal(a, b) for a, b in zip(out, model(batch), strict=True))


# Programs that write


@pytest.mark.parametrize("attention", [CountsCalls, MaskInputWritten], ids=lambda a: a.__name__)
def test_what_a_program_writes_to_is_its_own(attention: type[Mla]) -> None:
    """Neither the caller's tensors change, nor the weights: a sequence does not see what the one before it wrote."""
    model = build(attention)
    written = export(model)
    state = {name: tensor.clone() for name, tensor in written.state_dict.items()}
    sequences = [dict(zip(("x", "mask", "pos"), inputs(model, 2, length), strict=True)) for length in (5, 7)]
    before = copy.deepcopy(sequences)
    streamed = list(PieceRunner(written).outputs_of(sequences))
    for sequence, outputs in zip(before, streamed, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(outputs[-1], copy.deepcopy(model)(**copy.deepcopy(sequence)))
    torch.testing.assert_close(sequences, before, rtol=0, atol=0)
    torch.testing.assert_close(dict(written.state_dict), state, rtol=0, atol=0)


def test_a_written_weight_that_several_pieces_read_is_refused() -> None:
    class Lines(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.calls[1:].add_(1.0)  # type: ignore[operator, index]
            return (x + self.calls).cos().sin().exp() * self.calls

    program = torch.export.export(Lines(), (torch.ones(2),), strict=False)
    cores = [node.name for node in program.graph.nodes if node.name in ("cos", "sin")]
    assert len(PieceRunner(program).pieces) == 1
    with pytest.raises(UserError, match="the program writes to calls in place and reads it in several layers"):
        PieceRunner(program, cores=cores)
