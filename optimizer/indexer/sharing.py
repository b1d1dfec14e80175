"""Layers in turn, one a process: each gets the samples of all sequences from the processes that streamed them.

    process 0 streams sequences 0, 2, 4 ...            fits layer 0, then 2, then 4 ...
    process 1 streams sequences 1, 3, 5 ...            fits layer 1, then 3, then 5 ...

So a layer is fitted as one process alone would fit it, on the same numbers in the same order, and the result is the same bit for
bit. Sums over sequences, taken where the sequences are, would differ by rounding, and distillation, which takes one sequence a
step, has nothing to share out there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ...passes.matching.sites import MlaSite
from ...runtime.processes import processes
from ...runtime.shelf import Kept, Shelf
from .samples import ShelvedSamples, SiteMaps, SiteSample

T = TypeVar("T")
Layer = tuple[MlaSite, ShelvedSamples, Callable[..., SiteMaps]]
Work = Callable[[MlaSite, Sequence[SiteSample], Callable[..., SiteMaps]], T]
_Form = tuple[tuple[int, ...], torch.dtype, str]  # shape, dtype, kind of device


def by_layer(
    layers: Iterable[Layer], work: Work[T], shelf: Shelf, without: Collection[str] = (), in_turn: bool = False
) -> Iterator[T]:
    """Yield what `work` makes of every layer, in order and in every process; each is worked on in one of them.

    layers: as `layer_samples` gives them for this process's own sequences. without: names of the layers that need no samples.
    in_turn: one after the other, each when what was made of the one before has been taken, for where it depends on that.
    """
    group: list[Layer] = []
    for layer in layers:
        group.append(layer)
        del layer
        if len(group) == processes().count:
            yield from _worked(group, work, shelf, without, in_turn)
    if group:
        yield from _worked(group, work, shelf, without, in_turn)


def _worked(group: list[Layer], work: Work[T], shelf: Shelf, without: Collection[str], in_turn: bool) -> Iterator[T]:
    """Of one layer a process, or fewer. Empties the group: its samples are in nobody's way afterwards."""
    shared = processes()
    sites = [site for site, _, _ in group]
    parts = [[] if site.name in without else samples.shelved for site, samples, _ in group]
    maps = [of for _, _, of in group]
    group.clear()
    mine = parts[0] if shared.count == 1 else _swapped(parts, shelf)
    parts.clear()
    turns = [[rank] for rank in range(len(sites))] if in_turn else [range(len(sites))]
    for turn in turns:
        results = list[T]()
        if shared.rank in turn:
            results.append(work(sites[shared.rank], ShelvedSamples(mine), maps[shared.rank]))
            mine.clear()
        yield from (result for one in shared.gathered(results) for result in one)


def _swapped(parts: list[list[Mapping[str, Kept]]], shelf: Shelf) -> list[Mapping[str, Kept]]:
    """parts: of every layer of a group, the samples of this process's own sequences, which are gone afterwards. The samples of all
    sequences of the layer that is this process's, none if it has no layer."""
    shared = processes()
    forms = shared.gathered([[_forms(sample) for sample in part] for part in parts])
    taken: dict[int, Mapping[str, Kept]] = {}
    for turn in range(max(len(part) for of in forms for part in of)):
        for step in range(shared.count):  # everybody gives to one and takes from one at a time
            to, source = (shared.rank + step) % shared.count, (shared.rank - step) % shared.count
            given: Mapping[str, Kept] = {}
            if to < len(parts) and turn < len(parts[to]):
                given, parts[to][turn] = parts[to][turn], {}
            wanted = forms[source][shared.rank][turn : turn + 1] if shared.rank < len(parts) else []
            found = given if to == shared.rank else _taken(given, to, wanted, source, shelf)
            if wanted:
                taken[turn * shared.count + source] = found
            del given, found
    return [taken[number] for number in sorted(taken)]


def _taken(
    given: Mapping[str, Kept], to: int, wanted: Sequence[Mapping[str, _Form]], source: int, shelf: Shelf
) -> Mapping[str, Kept]:
    """Fields one by one: the tensors of one are in memory, not those of all."""
    found: dict[str, Kept] = {}
    for name in SiteSample.__dataclass_fields__:
        sent = given[name].get() if given else None
        room: Tensor | None = None
        if wanted:
            shape, dtype, device = wanted[0][name]
            room = torch.empty(shape, dtype=dtype, device=device)
        processes().swapped(sent, to, room, source)
        if room is not None:
            found[name] = shelf.put(room)
        del sent, room
    return found


def _forms(sample: Mapping[str, Kept]) -> Mapping[str, _Form]:
    return {name: (kept.shape, kept.dtype, kept.device.type) for name, kept in sample.items()}
