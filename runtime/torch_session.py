"""Run a converted graph in torch, with caches: what `generate --runtime torch` uses, for a checkpoint or a `.pt2` export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import UserError
from ..files.dtypes import torch_dtype
from ..files.export_manifest import check_limits, check_weight_files, read_export
from .caches import Caches, widths_of
from .execute import PieceRunner

CACHE_WRITE = torch.ops.mla2dsa.cache_write.default


class TorchSession:
    """A session over `batch` sequences of up to `capacity` tokens; weights stay resident, caches are written in place.

    load: a weight by name, on `device`; each is asked for once. widths, dtype: of the caches, by input name.
    """

    def __init__(
        self, program: ExportedProgram, load: Callable[[str], Tensor], widths: Mapping[str, int], batch: int,
        capacity: int, dtype: torch.dtype, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.batch, self.capacity, self._device = batch, capacity, device
        resident: dict[str, Tensor] = {}
        self._runner = PieceRunner(
            program,
            lambda name: resident[name] if name in resident else resident.setdefault(name, load(name)),
            overrides={CACHE_WRITE: _write_in_place},
        )
        self._caches = Caches(widths, batch, capacity, dtype, device)

    def step(self, ids: Tensor, positions: Tensor, slots: Tensor, key_begin: Tensor, last: Tensor) -> Tensor:
        """See `generation.Session`."""
        self._caches.reserve(int(slots.max()) + 1)
        inputs = {"input_ids": ids, "position_ids": positions, "slots": slots, "key_begin": key_begin, "last": last}
        moved = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        outputs: list[Any] = next(self._runner.outputs_of([{**moved, **self._caches.tensors}]))
        logits: Tensor = outputs[0][:, 0].float()
        return logits.cpu()


def _write_in_place(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """The session owns its caches, so a step costs what it writes, not what the cache holds."""
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None].expand_as(slots)
    cache[batch, slots] = new.to(cache.dtype)
    return cache


def open_pt2_session(folder: Path, batch: int, capacity: int | None = None, device: str = "cpu") -> TorchSession:
    """A session on a `.pt2` export: nothing but the file and its manifest is read. Raises UserError."""
    from ..kernels import ops  # noqa: F401  the file names our ops

    manifest = read_export(folder, "pt2")
    capacity = check_limits(folder, manifest, batch, capacity)
    check_weight_files(folder, manifest)
    file = folder / manifest["file"]
    try:
        program = torch.export.load(file)
    except Exception as error:  # zip, pickle, version and schema errors, each of its own kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:240]
        raise UserError(f"{file}: torch {torch.__version__} cannot load it ({reason}); export again") from error
    values = {**program.state_dict, **program.constants}
    return TorchSession(
        program,
        lambda name: values[name].to(device),
        widths_of(manifest),
        batch,
        capacity,
        torch_dtype(manifest["dtype"]),
        device,
    )
