"""The divisor channel: where a narrow key's own deviation is not what the latent norm divides by, one channel makes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from command_line import TINY, training_text
from mla_layer import make_layer
from saved import opened
from tokenizers import Tokenizer

from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.indexer import closed_form as module
from mla2dsa.optimizer.indexer import layer_fit
from mla2dsa.optimizer.indexer.calibrate import Calibration, layer_samples
from mla2dsa.optimizer.indexer.closed_form import ClosedForm, closed_form
from mla2dsa.optimizer.indexer.distil import Distilled, DistilSchedule
from mla2dsa.optimizer.indexer.indexer_math import index_keys
from mla2dsa.optimizer.indexer.layer_fit import NOTHING_SPENT, Samples, Training, recall
from mla2dsa.optimizer.indexer.samples import SiteMaps, SiteSample

TOPK, LENGTH, FITTED, HELD_OUT = 32, 256, 12, 4
CONFIG = IndexerConfig(index_topk=TOPK, index_n_heads=8, index_head_dim=24)
Layer = tuple[SiteMaps, list[SiteSample]]


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> list[Layer]:
    """Of tiny-mla, whose keys of 24 hold 7 of 64 latent channels, as DeepSeek-V3's hold 63 of 512."""
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(training_text(tmp_path_factory).read_text()).ids
    sequences = list(torch.tensor(ids[: (FITTED + HELD_OUT) * LENGTH]).view(-1, LENGTH))
    found = layer_samples(opened(TINY), sequences, Calibration(CONFIG, 64))
    return [(maps(samples=samples), list(samples)) for _, samples, maps in found]


def both_ways(layer: Layer, config: IndexerConfig = CONFIG) -> list[ClosedForm]:
    """Without and with a divisor channel, whatever would be chosen."""
    found = list[ClosedForm]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_best", lambda built, *_: found.extend(built) or built[0])
        closed_form(layer[0], layer[1][:FITTED], config)
    assert [one.stats.divisor for one in found] == [False, True]
    return found


def test_the_selection_captures_more_but_in_the_first_layer(layers: list[Layer]) -> None:
    """There hidden states are embeddings: no linear function of them says how long a latent is."""
    for number, layer in enumerate(layers):
        built = both_ways(layer)
        without, within = (recall(one.weights, CONFIG, layer[1][FITTED:]) for one in built)
        chosen = closed_form(layer[0], layer[1][:FITTED], CONFIG)
        assert chosen.stats.divisor == (within > without) == (number > 0)
        assert recall(chosen.weights, CONFIG, layer[1][FITTED:]) == max(without, within)
        assert abs(within - without) > 0.004
        assert (built[1].stats.layernorm_cv < built[0].stats.layernorm_cv / 2) == (number > 0)
        assert (built[1].stats.rope_cv < built[0].stats.rope_cv / 2) == (number > 0)


def test_it_takes_the_place_of_one_latent_channel(layers: list[Layer]) -> None:
    without, within = both_ways(layers[1])
    assert within.stats.energy < without.stats.energy
    rope = len(layers[1][0].k_rope)
    for one, latents in ((without, 7), (within, 6)):
        query = one.weights.wq_b.view(8, 24, -1).abs().amax((0, 2))
        assert (query > 0).sum() == rope + latents
        assert one.weights.wk.sum(0).abs().max() < 1e-4 * one.weights.wk.abs().max()  # balanced: nothing to centre


def test_no_channel_of_a_key_drowns_the_others(layers: list[Layer]) -> None:
    """FP8 has one scale for all channels of a key."""
    for layer in layers[1:]:
        _, within = both_ways(layer)
        keys = torch.cat([index_keys(within.weights, CONFIG, sample) for sample in layer[1][FITTED:]])
        loud = keys.square().mean(0)
        rope, unused = len(layer[0].k_rope), within.weights.wq_b.view(8, 24, -1).abs().amax((0, 2)) == 0
        assert int(unused.sum()) == 2
        assert loud[unused].max() < 2 * loud[rope:][~unused[rope:]].max()


def test_where_there_is_room_for_one_latent_channel_alone_there_is_none() -> None:
    layer = make_layer()
    samples = [layer.sample(seed, length=96) for seed in range(2)]
    assert not closed_form(layer.maps(), samples, IndexerConfig(24, 8, 10)).stats.divisor


def test_tokens_of_no_latent_say_nothing_of_it(layers: list[Layer]) -> None:
    """Their norms would be a hundred times the usual: rows of zeros, as an embedding has for tokens no training showed."""
    maps, samples = layers[1]
    hidden = torch.cat([samples[0].hidden, torch.zeros(16, samples[0].hidden.shape[1])])
    padded = [replace(samples[0], hidden=hidden), *samples[1:FITTED]]
    torch.testing.assert_close(
        module._divisor(maps, padded), module._divisor(maps, samples[:FITTED]), rtol=1e-2, atol=1e-4
    )


def test_training_begins_without_it(layers: list[Layer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on a loud row shake all channels: what the last layer learns from there is worse, though the start is better."""
    maps, samples = layers[-1]
    held_out, begun = samples[FITTED:], list[IndexerWeights]()
    plain, loud = both_ways(layers[-1])
    real = layer_fit.distil

    def seen(start: IndexerWeights, *given: Any) -> Distilled:
        begun.append(start)
        return real(start, *given)

    monkeypatch.setattr(layer_fit, "distil", seen)
    found = layer_fit.fit(
        maps, Samples(samples[:FITTED], held_out, held_out), CONFIG, Training(DistilSchedule(192)), NOTHING_SPENT
    )
    assert torch.equal(begun[0].wk, plain.weights.wk)
    assert found.stats["divisor"]
    assert found.closed_form_recall == recall(loud.weights, CONFIG, held_out)
    assert found.indexer == "distilled"
    from_loud = real(loud.weights, CONFIG, samples[:FITTED], DistilSchedule(192)).weights
    assert found.recall > recall(from_loud, CONFIG, held_out)


def test_where_there_is_room_for_no_divisor_training_begins_at_the_closed_form() -> None:
    layer = make_layer()
    built = closed_form(layer.maps(), [layer.sample(seed) for seed in range(2)], IndexerConfig(24, 8, 10))
    assert built.start is built.weights


def test_where_nothing_tells_the_latent_s_norm_there_is_none() -> None:
    """Every hidden state beside its opposite: no linear function of them is the same of both."""
    layer = make_layer()
    sample = layer.sample(0)
    hidden, q_resid = sample.hidden.clone(), sample.q_resid.clone()
    hidden[1::2], q_resid[1::2] = -hidden[::2], -q_resid[::2]
    opposed = replace(sample, hidden=hidden, q_resid=q_resid)
    assert not closed_form(layer.maps(), [opposed], IndexerConfig(16, 4, 24)).stats.divisor
