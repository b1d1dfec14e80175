"""What a DSA checkpoint calls its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...files.manifests.checkpoint_manifest import CHECKPOINT_MANIFEST
from ...files.model.model_files import checkpoint_files
from ...files.ownership import refuse_names
from ...files.safetensors_index import INDEX_FILE, SINGLE_FILE, TensorLocation

MANIFEST = CHECKPOINT_MANIFEST
REPORT, PAGE = "report.json", "report.html"
RECIPE = "mla2dsa-recipe.yaml"  # not recipe.yaml: llm-compressor calls its own so, in checkpoints that we read
INDEXER_SHARD = "model-indexer.safetensors"
DERIVED_SHARD = "model-derived.safetensors"  # tensors that a family's rule makes of the source's
ORIGINALS = "mla2dsa.source-tensors"  # safetensors inside, under a name that no runtime looks for; its beginning has whole shards
UNPROVEN_CONFIG = "config.unproven.json"  # what config.json is called until the folder is proven
CARD, DENSE_CARD = "README.md", "mla2dsa.source-README.md"
# of the source's files
RENAMED = {SINGLE_FILE: "model-dense.safetensors", INDEX_FILE: "mla2dsa.source-index.json", CARD: DENSE_CARD}
_OURS = {MANIFEST, REPORT, PAGE, RECIPE, INDEXER_SHARD, DERIVED_SHARD, ORIGINALS, UNPROVEN_CONFIG, *RENAMED.values()}


def file_names(source: Path, tensors: Mapping[str, TensorLocation]) -> dict[str, str]:
    """Every file of the checkpoint in `source` but its config, and its card, with its name in the DSA checkpoint.

    Raises UserError for anything in `source` that has a name which a file of our own needs, be it part of the model or not.
    """
    refuse_names(source, sorted(path.name for path in source.iterdir()), _OURS)
    card = [CARD] if (source / CARD).is_file() else []
    return {name: RENAMED.get(name, name) for name in [*checkpoint_files(source, tensors), *card]}
