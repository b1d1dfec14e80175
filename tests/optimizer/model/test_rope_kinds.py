"""Rotary frequencies that depend on the length: longrope is captured where one set of factors applies, the rest is refused by name."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from comparing import close
from saved import captured, config_dict, opened, run, saved, tensors, transformers_model

from mla2dsa.errors import UserError
from mla2dsa.optimizer.model.capture import capture

PAIRS = 4  # half of qk_rope_head_dim


def longrope(original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * i for i in range(PAIRS)],
        "long_factor": [1.0 + 0.3 * i for i in range(PAIRS)], "original_max_position_embeddings": original,
    }  # fmt: skip


@pytest.mark.parametrize("original", [families.MAX_LENGTH, 2 * families.MAX_LENGTH], ids=["equal", "longer"])
def test_longrope_within_its_trained_length(original: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The short factors, whatever the positions; transformers says the same."""
    folder = saved("minicpm3", tmp_path_factory, rope_parameters=longrope(original))
    source, inputs = opened(folder), families.inputs(1, 19)
    program = source.capture.program
    [name] = [it for it in program.constants if it.endswith("rotary_emb.inv_freq")]
    factors = torch.tensor(longrope(original)["short_factor"])
    expected = 1.0 / (factors * 10000.0 ** (torch.arange(0, 2 * PAIRS, 2).float() / (2 * PAIRS)))
    assert torch.allclose(program.constants[name], expected)
    close(run(source, tensors(inputs))[0], families.logits(transformers_model(folder), inputs), of_max=1e-6)


@pytest.mark.parametrize(
    ("rope", "parts"),
    [
        (
            longrope(64),
            ("rope_type longrope", "original_max_position_embeddings (64)", "set max_position_embeddings (512) to 64"),
        ),
        (
            {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            ("rope_type dynamic (NTK)", "remove rope_scaling"),
        ),
    ],
    ids=["longrope-beyond", "dynamic-ntk"],
)
def test_frequencies_that_change_with_the_length_are_refused(rope: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        capture(config_dict("minicpm3", rope_parameters=rope))
    assert len(str(error.value).splitlines()) == 1
    assert all(part in str(error.value) for part in parts)


def test_what_was_captured_leaves_longrope_as_it_was() -> None:
    config = config_dict("minicpm3", rope_parameters=longrope(families.MAX_LENGTH))
    assert captured(config).program is not None
    assert config["rope_parameters"]["rope_type"] == "longrope"
