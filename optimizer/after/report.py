"""report.json: what a conversion did and found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...exporters.dsa.layout import Layout
from ...exporters.dsa.names import file_names
from ...files.finite import finite
from ...files.json_files import read_json
from ...files.model.model_files import CONFIG, left_out
from ..before.cuts import Sequences
from ..indexer.calibrate import LayerResult
from ..model.checkpoint import Checkpoint
from ..plan import Prepared
from ..recipe import Recipe
from ..share.choose import Sharing
from ..verify import Verification


def conversion_report(
    prepared: Prepared, recipe: Recipe, text: Sequences, layout: Layout, remote_code: Sequence[str], *,
    layers: Sequence[LayerResult], sharing: Sharing | None, proof: Verification | None, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """proof: None where it was skipped, sharing: where no layers were chosen; remote_code: what the tokenizer is made of."""
    checkpoint, fitted = prepared.checkpoint, text.calibration if prepared.donor is None else []
    report: dict[str, Any] = {
        "plan": prepared.plan.to_json(),
        "recipe": recipe.fields(),
        "layout": {"name": layout.name, "why": layout.why, "query_form": layout.forms[0] if layout.forms else None},
        "remote_code": list(remote_code),
        "dropped_fields": list(dropped_fields(checkpoint)),
        "calibration": {
            "text": text.origin,
            "sequences": len(fitted),
            "sequence_length": len(text.proof[0]),
            "tokens": sum(len(sequence) for sequence in fitted),
            "random_sequences": len(text.beside),
        },
        "layers": [layer.summary() for layer in layers],
        "sharing": {**sharing.to_json(), "names": prepared.plan.shared} if sharing else None,
        "verification": proof.to_json() if proof else None,
        "left_out": left_out(checkpoint.path, file_names(checkpoint.path, checkpoint.whole_tensors)),
        "seconds": round(seconds, 1),
    }
    return {name: finite(entry) for name, entry in report.items()}


def dropped_fields(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Of config.json, those that `prepare` dropped."""
    return tuple(name for name in read_json(checkpoint.path / CONFIG) if name not in checkpoint.whole_config)
