"""What a conversion keeps of a dense checkpoint, held against it byte by byte: a graph run on a few texts cannot see one changed weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ...files.safetensors_index import TensorLocation
from ..model.checkpoint import Checkpoint
from ..model.stored_formats import mtp_tensors
from .limits import Check
from .pair import NOT_A_PAIR, Pair

_BLOCK = 1 << 24  # bytes compared at a time, fixed by nothing: large enough for a disk, small beside a layer


def same_tensors(pair: Pair) -> Check:
    """Every tensor that is not made anew for the layout is, in the DSA checkpoint, what it is in the dense one."""
    dense, made = pair.dense.checkpoint, pair.sparse.checkpoint
    kept = sorted(_kept(pair) & made.whole_tensors.keys())
    differing = [name for name in kept if not _same(dense.whole_tensors[name], made.whole_tensors[name])]
    found = (
        f"{differing[0]} ({made.whole_tensors[differing[0]].file})"
        if differing
        else f"{len(kept)} of {len(dense.whole_tensors)} tensors"
    )
    return Check("tensors kept = dense's (bytes)", not differing, len(differing), 0, found, NOT_A_PAIR)


def _kept(pair: Pair) -> set[str]:
    """Names in the dense checkpoint of what no rule of the layout makes anew."""
    dense: Checkpoint = pair.dense.checkpoint
    anew = pair.layout.folding(dense.config, dense.tensors, mtp_tensors(dense.config, dense.tensors)).derived
    return dense.whole_tensors.keys() - {
        dense.stored_name(name) for it in anew.values() for name in (it.name, it.source)
    }


def _same(one: TensorLocation, two: TensorLocation) -> bool:
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    if one.file.samefile(two.file) and one.offset == two.offset:
        return True
    with one.file.open("rb") as first, two.file.open("rb") as second:
        return all(a == b for a, b in zip(_blocks(first, one), _blocks(second, two), strict=True))


def _blocks(stream: BinaryIO, place: TensorLocation) -> Iterator[bytes]:
    stream.seek(place.offset)
    for start in range(0, place.nbytes, _BLOCK):
        yield stream.read(min(_BLOCK, place.nbytes - start))
