"""How a model's own files want it sampled: generation_config.json, as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UserError, short
from ...files.model.model_files import GENERATION_CONFIG
from ...runtime.generation import Sampling
from ..model.text import generation_config

# What else changes the text that transformers generates, and the value that changes nothing.
_NOT_APPLIED: dict[str, Any] = {
    "min_p": 0.0, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "penalty_alpha": None, "min_length": 0,
    "min_new_tokens": 0, "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None,
    "guidance_scale": 1.0, "forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None,
    "stop_strings": None, "dola_layers": None, "watermarking_config": None,
}  # fmt: skip


def default_sampling(folder: Path, seed: int = 0) -> Sampling:
    """Greedy without the file, or where it does not say do_sample. A field that is not there is neutral.

    Raises UserError for a file that transformers does not take, and for a setting that this program does not apply.
    """
    file, found = folder / GENERATION_CONFIG, generation_config(folder, "pass --temperature to do without it")
    if found is None:
        return Sampling(seed=seed)
    for field, neutral in _NOT_APPLIED.items():
        if (value := getattr(found, field, None)) not in (None, neutral):
            raise UserError(
                f"{file}: {field} is {short(value)}, which is not applied here; pass --temperature to do without the file"
            )
    if not found.do_sample:
        return Sampling(seed=seed)
    given = {"temperature": found.temperature, "top_p": found.top_p, "top_k": found.top_k}
    return Sampling(**{"temperature": 1.0, **{name: it for name, it in given.items() if it is not None}}, seed=seed)
