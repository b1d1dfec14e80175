"""Shelf: what is put on it comes back, from memory or from a file, and takes neither once nobody wants it."""

from __future__ import annotations

from mmap import PAGESIZE
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mla2dsa.runtime.execute import PieceRunner
from mla2dsa.runtime.shelf import Shelf

VALUES = {
    "float32": torch.arange(12.0).view(3, 4),
    "bfloat16": torch.arange(12.0, dtype=torch.bfloat16).view(3, 4),
    "int64": torch.arange(5),
    "complex": torch.complex(torch.arange(4.0), torch.ones(4)),
    "bool": torch.tensor([True, False]),
    "transposed": torch.arange(12.0).view(3, 4).T,
    "part": torch.arange(100.0)[3:7],
    "expanded": torch.arange(3.0)[:, None].expand(3, 4),
    "scalar": torch.tensor(2.0),
    "nothing": torch.empty(0, 4),
}


@pytest.mark.parametrize("budget", [0, 2**20], ids=["file", "memory"])
@pytest.mark.parametrize("tensor", VALUES.values(), ids=VALUES.keys())
def test_what_is_put_comes_back(tensor: Tensor, budget: int, tmp_path: Path) -> None:
    kept = Shelf(tmp_path, budget).put(tensor)
    for _ in range(2):
        found = kept.get()
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)


def test_the_file_begins_beyond_the_budget_and_has_room_again_for_what_is_gone(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget=100)
    first, second, third = (shelf.put(torch.full((20,), float(i))) for i in range(3))  # 80 bytes each
    assert shelf.in_file == 2 * PAGESIZE
    del first
    fourth = shelf.put(torch.ones(20))  # in the room of the first
    mapped = second.get()
    del second
    fifth = shelf.put(torch.full((20,), 5.0))  # not yet in that of the second: somebody has it still
    assert shelf.in_file == 3 * PAGESIZE
    assert mapped.tolist() == [1.0] * 20
    del mapped
    sixth = shelf.put(torch.full((20,), 6.0))
    assert shelf.in_file == 3 * PAGESIZE
    for kept, value in ((third, 2.0), (fourth, 1.0), (fifth, 5.0), (sixth, 6.0)):
        assert kept.get().tolist() == [value] * 20


def test_a_part_does_not_keep_the_whole(tmp_path: Path) -> None:
    whole = torch.zeros(1000)
    assert Shelf(tmp_path, 2**20).put(whole[:10]).get().untyped_storage().nbytes() == 40


def test_writing_to_what_comes_from_a_file_changes_no_file(tmp_path: Path) -> None:
    kept = Shelf(tmp_path, 0).put(torch.zeros(4))
    kept.get().add_(1.0)
    assert kept.get().tolist() == [0.0] * 4


def test_the_file_has_no_name(tmp_path: Path) -> None:
    kept = Shelf(tmp_path, 0).put(torch.ones(4))
    assert list(tmp_path.iterdir()) == []
    assert kept.get().tolist() == [1.0] * 4


class Lines(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.cos()
        z = y.sin().mul_(2.0)
        return z.exp() + y


def test_a_program_streams_the_same_through_files(tmp_path: Path) -> None:
    """Also where it writes to what it carries: that stays where it is."""
    program = torch.export.export(Lines(), (torch.ones(3),), strict=False)
    cores = [node.name for node in program.graph.nodes if node.name in ("cos", "sin")]
    sequences = [{"x": torch.full((3,), value)} for value in (0.5, 2.0)]
    plain = [out[0] for out in PieceRunner(program).outputs_of(sequences)]
    through = PieceRunner(program, cores=cores, shelf=Shelf(tmp_path, 0)).outputs_of(sequences)
    assert all(torch.equal(a, out[0]) for a, out in zip(plain, through, strict=True))
    assert list(tmp_path.iterdir()) == []
