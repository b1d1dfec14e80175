"""What a conversion depends on, as one number: of the whole, and of each layer's indexer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any

from ... import __version__
from ..model.checkpoint import Checkpoint
from ..recipe import WRITTEN, Recipe
from ..recipes.layers import sharing, trainings
from .cuts import Sequences

_NOT_READ = {"verify", *WRITTEN}  # by what makes indexers
_BY_LAYER = {"indexer", "budget", "distil", "layers"}  # what each layer's training says


def fingerprint(checkpoint: Checkpoint, recipe: Recipe, cut: Sequences, also: Collection[str] = ()) -> str:
    """Of everything that all indexers depend on. also: settings of the recipe beside."""
    fields = recipe.fields()
    fields["layers"] = list(fields["layers"].items())  # in their order: the last that matches holds
    whole: str = _digest(checkpoint, fields, _NOT_READ - set(also), cut).hexdigest()
    return whole


def layer_fingerprints(checkpoint: Checkpoint, recipe: Recipe, cut: Sequences, names: Sequence[str]) -> dict[str, str]:
    """Of everything that one layer's indexer depends on, by layer: what is told of others makes no difference."""
    shared, trained, found = (
        _digest(checkpoint, recipe.fields(), _NOT_READ | _BY_LAYER, cut),
        trainings(recipe, names),
        {},
    )
    for name in trained:
        digest = shared.copy()
        digest.update(repr(sharing(trained, name)).encode())
        if trained[name].budget is not None:  # what layers take of it depends on which others they serve
            digest.update(repr(recipe.shared).encode())
        found[name] = digest.hexdigest()
    return found


def _digest(checkpoint: Checkpoint, fields: dict[str, Any], without: Collection[str], cut: Sequences) -> Any:
    digest = hashlib.sha256(f"{__version__} {checkpoint.fingerprint()}".encode())
    told = {name: value for name, value in fields.items() if name not in without}
    digest.update(json.dumps(told, sort_keys=True).encode())
    for sequence in cut.calibration + cut.beside + cut.selection + cut.vocabulary:
        digest.update(sequence.numpy().tobytes())
    return digest
