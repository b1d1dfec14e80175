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
from ..files.manifests.export_manifest import EXPORT_MANIFEST, check_limits, check_weight_files, read_export
from ..files.sizes import TORCH_CHUNK
from ..kernels import ops  # noqa: F401  registers what is named below
from .caches import Caches, widths_of
from .execute import Override, PieceRunner
from .pt2_archive import load_pt2

CACHE_WRITE = torch.ops.mla2dsa.cache_write.default


class TorchSession:
    """A session over `batch` sequences of up to `capacity` tokens; weights stay resident, caches are written in place.

    load: a weight by name, on `device`; each is asked for once. widths, dtype: of the caches, by input name. overrides: other
    ops, as in `PieceRunner`.
    """

    chunk = TORCH_CHUNK

    def __init__(
        self, program: ExportedProgram, load: Callable[[str], Tensor], widths: Mapping[str, int], batch: int,
        capacity: int, dtype: torch.dtype, device: str = "cpu", overrides: Mapping[Any, Override] | None = None,
    ) -> None:  # fmt: skip
        self.batch, self.capacity, self._device = batch, capacity, device
        resident: dict[str, Tensor] = {}
        self._runner = PieceRunner(
            program,
            lambda name: resident[name] if name in resident else resident.setdefault(name, load(name)),
            overrides={CACHE_WRITE: _write_in_place, **(overrides or {})},
        )
        self._caches = Caches(widths, batch, capacity, dtype, device)

    def step(self, ids: Tensor, positions: Tensor, slots: Tensor, key_begin: Tensor, last: Tensor) -> Tensor:
        """See `generation.Session`."""
        inputs = {"input_ids": ids, "position_ids": positions, "slots": slots, "key_begin": key_begin, "last": last}
        return self._logits(inputs)[:, 0].float().cpu()

    def _logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The program's first output; what it writes is in the caches."""
        self._caches.reserve(int(inputs["slots"].max()) + 1)
        moved = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        outputs: list[Any] = next(self._runner.outputs_of([{**moved, **self._caches.tensors}]))
        logits: Tensor = outputs[0]
        return logits


class EveryLogit(TorchSession):
    """A session on a program that gives the logits of every token (`AddCache.last_only` is false)."""

    def step(self, ids: Tensor, positions: Tensor, slots: Tensor, key_begin: Tensor, last: Tensor) -> Tensor:
        """See `generation.Session`."""
        logits = self.every(ids, positions, slots, key_begin)
        return logits[torch.arange(len(last)), last.to(logits.device)].float().cpu()

    def every(self, ids: Tensor, positions: Tensor, slots: Tensor, key_begin: Tensor) -> Tensor:
        """Logits [B, T, vocab] after each of the tokens, on the session's device."""
        return self._logits({"input_ids": ids, "position_ids": positions, "slots": slots, "key_begin": key_begin})


def _write_in_place(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """The session owns its caches, so a step costs what it writes, not what the cache holds."""
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None].expand_as(slots)
    cache[batch, slots] = new.to(cache.dtype)
    return cache


def open_pt2_session(folder: Path, batch: int, capacity: int | None = None, device: str = "cpu") -> TorchSession:
    """A session on a `.pt2` export: nothing but the file and its manifest is read. Raises UserError."""
    manifest = read_export(folder, "pt2")
    capacity = check_limits(folder, manifest, batch, capacity)
    check_weight_files(folder, manifest)
    file = folder / manifest["file"]
    program = load_pt2(file, manifest)
    _check_interface(file, program, manifest)
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


def _check_interface(file: Path, program: ExportedProgram, manifest: Mapping[str, Any]) -> None:
    """The manifest has to be of this very program: inputs are made as it says. Raises UserError."""
    kinds = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    values = {name: kinds.get(name) for name in program.graph_signature.user_inputs if isinstance(name, str)}
    found = {name: _described(value) for name, value in values.items() if isinstance(value, Tensor)}
    told = {
        entry["name"]: (
            torch_dtype(entry["dtype"]),
            [size if isinstance(size, int) else None for size in entry["shape"]],
        )
        for entry in manifest["inputs"]
    }
    if found != told or len(program.graph_signature.user_outputs) != len(manifest["outputs"]):
        raise UserError(f"{file}: its inputs and outputs are not those that {EXPORT_MANIFEST} lists; export again")


def _described(value: Tensor) -> tuple[torch.dtype, list[int | None]]:
    return value.dtype, [size if isinstance(size, int) else None for size in value.shape]
