"""A dense or DSA checkpoint opened for reading: config.json, where the tensors lie, and one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError, short
from ...files.digests import file_digest
from ...files.json_files import read_json
from ...files.model.hub import download
from ...files.model.model_files import is_folder
from ...files.model.text_model import is_wrapper, text_config, text_names
from ...files.safetensors_index import INDEX_FILE, SINGLE_FILE, TensorLocation, read_index, some
from . import dequantise
from .config_limits import check_config
from .packed_formats import NVFP4, PARTS, whole_weights
from .stored_formats import FP8, PLAIN, QUANTISED, SCALES, block_of, format_fault, mtp_tensors


@dataclass(frozen=True)
class Whole:
    """A checkpoint as it is stored: its config.json and all tensors; names: those of the text model, by the names they have in it."""

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorLocation]
    names: Mapping[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face's layout. Nothing but headers and config.json is read until `load`.

    path: the folder; config: config.json (or what `config_file` calls it); tensors: every tensor by name. Of a wrapper both are
    the language model's, told as a text model's of its own, and a weight that is packed into several tensors is told as one;
    `whole` is what is stored, None where it has the same names.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorLocation]
    config_file: str = "config.json"
    whole: Whole | None = None

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        config_file: str = "config.json",
    ) -> Checkpoint:
        """Open a local folder, or else a hub id (downloaded into the hub cache; `local_files_only`: cache only).

        Raises UserError when it is neither, cannot be reached, or its files disagree (see `read_index`).
        """
        path = Path(model)
        if not is_folder(model):
            path = download(str(model), revision, local_files_only)
        config, tensors = read_json(path / config_file), read_index(path)
        check_config(path / config_file, config, len(tensors))
        names = text_names(config, tensors)
        inside = whole_weights({name: tensors[stored] for name, stored in names.items()})
        if not is_wrapper(config) and inside.keys() == tensors.keys():
            return cls(path, config, inside, config_file)
        return cls(path, text_config(config), inside, config_file, Whole(config, tensors, names))

    @property
    def whole_config(self) -> Mapping[str, Any]:
        """config.json as it is stored."""
        return self.config if self.whole is None else self.whole.config

    @property
    def whole_tensors(self) -> Mapping[str, TensorLocation]:
        """Every tensor in the files, by its stored name."""
        return self.tensors if self.whole is None else self.whole.tensors

    def stored_name(self, name: str) -> str:
        """What the files call a tensor."""
        return name if self.whole is None else self.whole.names.get(name, name)

    def mtp_tensors(self) -> set[str]:
        """Stored names of the tensors of multi-token-prediction layers."""
        if self.whole is None:
            return mtp_tensors(self.config, self.tensors)
        return {self.whole.names[name] for name in mtp_tensors(self.config, self.whole.names)}

    def load(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", finite: bool = True,
        row: int | None = None,
    ) -> Tensor:  # fmt: skip
        """One tensor, read from its file now, or tensor[row] of it; `dtype` None keeps the stored one.

        A weight in DeepSeek's FP8 blocks (`<name>_scale_inv` beside it), in compressed-tensors' INT4 or in ModelOpt's NVFP4 is
        dequantised, to bfloat16 by default.
        Raises UserError when it is absent, in another quantised format, or (with `finite`) holds NaN or infinities.
        """
        place = self._locate(name)
        if place.dtype not in PLAIN and (dtype is not None or place.dtype in QUANTISED):
            self._check_format(name)
        if place.dtype in QUANTISED:
            tensor = self._dequantised(name, place).to(dtype or torch.bfloat16)
            tensor = tensor if row is None else tensor[row]
        else:
            tensor = self._read(name, row)
            tensor = tensor if dtype is None else tensor.to(dtype)
        if finite:
            _check_finite(name, place, tensor)
        return tensor.to(device)

    def source_hashes(self) -> dict[str, dict[str, int | str]]:
        """Digest (`file_digest`) of config.json, the index if there is one, and every shard, by file name."""
        files = {place.file for place in self.whole_tensors.values()} | {self.path / self.config_file}
        if (self.path / INDEX_FILE).is_file() and not (self.path / SINGLE_FILE).is_file():
            files.add(self.path / INDEX_FILE)
        return {file.name: file_digest(file) for file in sorted(files)}

    def fingerprint(self) -> str:
        """sha256 over `source_hashes`: the same for the same bytes, wherever they lie and whenever they were written.

        Files over 64 MiB count by size and header only, so a change of their values alone goes unnoticed.
        """
        return hashlib.sha256(json.dumps(self.source_hashes(), sort_keys=True).encode()).hexdigest()

    def is_dsa(self) -> bool:
        """Whether the checkpoint has indexers, by its tensors or by its config."""
        return self.config.get("index_topk") is not None or any(".indexer." in name for name in self.tensors)

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError when tensors are missing or shaped otherwise than config.json says (`expected`)."""
        faults = [fault for name, shape in expected.items() if (fault := self._fault(name, shape))]
        if faults:
            raise UserError(
                f"{self.path}: {len(faults)} of {len(expected)} tensors disagree with config.json: "
                f"{some(faults, 3)}; fetch config.json and the weights from the same revision"
            )

    def _fault(self, name: str, shape: tuple[int, ...]) -> str | None:
        if name not in self.tensors:
            return f"{name} is missing"
        found = self.tensors[name].shape
        return None if found == tuple(shape) else f"{name} is {list(found)}, config.json gives {list(shape)}"

    def _locate(self, name: str) -> TensorLocation:
        if name in self.tensors:
            return self.tensors[name]
        if f"{name}_packed" in self.tensors:
            raise UserError(f"{self.path}: {name} is only there as {name}_packed, a quantised format not read here")
        raise UserError(f"{self.path}: no tensor {name}; check that config.json belongs to these weights")

    def _read(self, name: str, row: int | None = None) -> Tensor:
        from safetensors import SafetensorError, safe_open

        stored = self.stored_name(name)
        place = self.whole_tensors[stored]
        try:
            with safe_open(place.file, framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(stored) if row is None else file.get_slice(stored)[row]
        except SafetensorError as error:  # a path that is no text, a name or a size that only the library refuses
            raise UserError(f"{place.file}: safetensors does not read {short(name)} ({short(str(error))})") from error
        return tensor

    def _check_format(self, name: str) -> None:
        if fault := format_fault(self.path, self.tensors, self.config, name):
            raise UserError(fault)

    def _dequantised(self, name: str, place: TensorLocation) -> Tensor:
        if place.dtype in FP8:
            scale = self._read(f"{name}{SCALES}").float()
            return dequantise.blocks(self._read(name), scale, *block_of(self.config))
        packed, scale, third = (self._read(name + part) for part in PARTS[place.dtype])
        if place.dtype == NVFP4:
            return dequantise.nvfp4(packed, scale, third)
        if third.tolist() != list(place.shape):
            raise UserError(
                f"{place.file}: {name}_shape says {third.tolist()}, but {name}_packed holds {list(place.shape)}"
            )
        return dequantise.int4(packed, scale)


def _check_finite(name: str, place: TensorLocation, tensor: Tensor) -> None:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    if all(
        map(math.isfinite, torch.stack(torch.aminmax(values)).tolist())
    ):  # far faster than a look at each; NaN is an end, too
        return
    bad = tensor.numel() - int(torch.isfinite(values).sum())
    if bad:
        raise UserError(f"{place.file}: {name} has {bad} NaN or infinite values; fetch the file again")
