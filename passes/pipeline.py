"""The passes in their order: the one list that everything runs through.

    normalize -> find_mla -> functionalise -+-> mla_to_dsa -> add_cache     a program that is generated with, or exported
                                            +-> cache_dense                 the dense program to generate with, to compare
                                            '-> tap                         the dense program with what calibration needs

`mla_to_dsa`, `add_cache` and `tap` (in the files of their names) run these on a program; passes of your own go between or
after them: docs/passes.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..kernels.spec import IndexerConfig, IndexerWeights
from .add_cache import AddCache
from .cache_dense import CacheDense
from .find_mla import FindMla
from .functionalise import Functionalise
from .manager import Pass
from .mla_to_dsa import MlaToDsa
from .normalize import Normalize
from .tap import Tap

FIND: tuple[Pass, ...] = (Normalize(), FindMla(), Functionalise())


def dsa_passes(
    config: IndexerConfig, weights: Mapping[str, IndexerWeights] | None = None, allow_partial: bool = False
) -> tuple[Pass, ...]:
    """From a dense program to its DSA program."""
    return (*FIND, MlaToDsa(config, weights or {}, allow_partial))


def cached_passes(config: IndexerConfig, last_only: bool) -> tuple[Pass, ...]:
    """From a dense program to its DSA program with caches, in one edit."""
    return (*dsa_passes(config), AddCache(last_only))


def dense_cached_passes(last_only: bool, layers: int = 0) -> tuple[Pass, ...]:
    """From a dense program to the same with caches. layers: how many have to have an attention."""
    return (*FIND, CacheDense(last_only, layers))


def tap_passes(rows: int, allow_partial: bool = False) -> tuple[Pass, ...]:
    """From a dense program to the same with taps."""
    return (*FIND, Tap(rows, allow_partial))
