"""The passes in their order: the one list that everything runs through.

    normalize -> find_mla -> functionalise -+-> mla_to_dsa -> add_cache     a program that is generated with, or exported
                                            '-> tap                         the dense program with what calibration needs

`mla_to_dsa`, `add_cache` and `tap` (in the files of their names) run these on a program; passes of your own go between or
after them: docs/passes.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..kernels.spec import IndexerConfig, IndexerWeights
from .add_cache import AddCache
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


def tap_passes(rows: int, allow_partial: bool = False) -> tuple[Pass, ...]:
    """From a dense program to the same with taps."""
    return (*FIND, Tap(rows, allow_partial))
