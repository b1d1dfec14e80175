"""DSA checkpoints whose selection bites, that tests of exports share: the example, and a random mixture of experts."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import dense_checkpoint, random_indexers
from command_line import small_conversion

from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.kernels.spec import IndexerConfig

NAMES = ("tiny-mla", "moe")
INDEXER = IndexerConfig(index_topk=8, index_n_heads=16, index_head_dim=32)


def dsa_checkpoint(name: str, factory: pytest.TempPathFactory) -> Path:
    """One of NAMES; the random one has 16 index heads, so that exact ties are rare."""
    if name == "tiny-mla":
        return small_conversion(factory)
    source = dense_checkpoint("moe", factory)
    out = factory.mktemp("moe") / "dsa"
    return write_dsa_checkpoint(source, out, random_indexers(source, INDEXER), INDEXER, manifest={})
