"""Run a TensorRT engine through TensorRT's Python API, with torch's memory: what `generate` and `bench` use.

    step(tokens) --profile that fits--> shapes, addresses --execute_async_v3--> logits
                                        a cache's input and output are the same memory

The engine has two optimisation profiles, "prefill" for many tokens and "decode" for one (`to_tensorrt`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compat.tensorrt_backend import Backend, gpu_sm, load_plugins, open_backend, plugin_error
from ..errors import UserError
from ..files.dtypes import torch_dtype
from ..files.manifests.engine_manifest import check_engine, read_engine, read_plan, read_plugin
from ..files.sizes import FIRST_CAPACITY
from ..files.temporary import scratch_folder
from ..files.writing import write_new
from ..kernels.op_spec import NODES
from .caches import Caches, outputs_of, widths_of

Range = tuple[int, int, int]


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: its number in the engine, and (min, opt, max) of the dynamic dims."""

    index: int
    name: str
    batch: Range
    seq: Range
    cache_length: Range

    def takes(self, batch: int, seq: int, cache_length: int) -> bool:
        sizes = ((self.batch, batch), (self.seq, seq), (self.cache_length, cache_length))
        return all(low <= size <= high for (low, _, high), size in sizes)


def profiles_of(manifest: Mapping[str, Any]) -> tuple[Profile, ...]:
    """The profiles of an engine, from its manifest, in the engine's order."""
    return tuple(
        Profile(number, entry["name"], *(tuple(entry[dim]) for dim in ("batch", "seq", "cache_length")))
        for number, entry in enumerate(manifest["profiles"])
    )


class TensorRtSession:
    """One batch of sequences on an engine; see `generation.Session`.

    engine: a deserialised ICudaEngine, whose plugins are loaded. device: "cuda", or "cpu" for a stand-in in tests.
    Raises UserError if batch or capacity is more than the engine was built for.
    """

    def __init__(
        self,
        engine: Any,
        manifest: Mapping[str, Any],
        batch: int,
        capacity: int | None = None,
        device: str = "cuda",
        first: int = FIRST_CAPACITY,
    ) -> None:
        self._manifest, self._device = manifest, device
        self._profiles = profiles_of(manifest)
        most = min(int(manifest["limits"]["max_seq"]), max(profile.cache_length[2] for profile in self._profiles))
        if capacity is not None and capacity > most:
            raise UserError(
                f"a cache of {capacity} tokens is over the {most} this engine was built for; build it again"
            )
        self.batch, self.capacity = batch, most if capacity is None else capacity
        self._check_batch()
        self._dtype = torch_dtype(manifest["dtype"])
        self._present = outputs_of(manifest)
        least = max(profile.cache_length[0] for profile in self._profiles)
        self._caches = Caches(
            widths_of(manifest), batch, max(self.capacity, least), self._dtype, device, first=max(first, least)
        )
        self._engine, self._context = engine, _context(engine)
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._profile = -1

    def step(self, ids: Tensor, positions: Tensor, slots: Tensor, key_begin: Tensor, last: Tensor) -> Tensor:
        """See `generation.Session`; more tokens than a profile takes are fed in parts."""
        self._caches.reserve(int(slots.max()) + 1)
        most = max(profile.seq[2] for profile in self._profiles)
        result: Tensor | None = None
        for start in range(0, ids.shape[1], most):
            part = slice(start, start + most)
            size = ids[:, part].shape[1]
            at = (last - start).clamp(0, size - 1)
            logits = self._run(ids[:, part], positions[:, part], slots[:, part], key_begin, at)
            result = logits if result is None else torch.where((last >= start)[:, None], logits, result)
        assert result is not None
        return result

    def _run(self, ids: Tensor, positions: Tensor, slots: Tensor, key_begin: Tensor, last: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "position_ids": positions, "slots": slots, "key_begin": key_begin, "last": last}
        shape = (self.batch, 1, int(self._manifest["model"]["vocab_size"]))
        if self._stream is not None:  # the caches were made, or enlarged, on the stream of whoever calls
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            moved = {name: tensor.to(self._device).contiguous() for name, tensor in inputs.items()}
            logits = torch.empty(shape, dtype=self._dtype, device=self._device)
            self._choose(ids.shape[1])
            for name, tensor in (moved | self._caches.tensors).items():
                self._bind(name, tensor, is_input=True)
            for past, cache in self._caches.tensors.items():
                self._bind(self._present[past], cache)
            self._bind(self._manifest["outputs"][0]["name"], logits)
            self._execute()
            return logits[:, 0].float().cpu()

    def _choose(self, seq: int) -> None:
        """The profile for the fewest tokens that takes these shapes."""
        length = next(iter(self._caches.tensors.values())).shape[1]
        fitting = [profile for profile in self._profiles if profile.takes(self.batch, seq, length)]
        if not fitting:
            raise UserError(
                f"no profile of the engine takes batch {self.batch}, {seq} tokens and caches of {length}:"
                f" it was built for {'; '.join(map(_described, self._profiles))}; build it with other --min and --max"
            )
        profile = min(fitting, key=lambda profile: profile.seq[2])
        if profile.index != self._profile:
            if not self._context.set_optimization_profile_async(profile.index, self._handle()):
                raise UserError(f"TensorRT does not change to profile {profile.name}")
            self._profile = profile.index

    def _bind(self, name: str, tensor: Tensor, is_input: bool = False) -> None:
        if is_input and not self._context.set_input_shape(name, tuple(tensor.shape)):
            raise UserError(f"TensorRT refuses the shape {tuple(tensor.shape)} of input {name}")
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise UserError(f"the engine has no tensor {name}: its manifest is of another engine; build it again")

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._handle()):
            raise UserError("the engine failed to run; TensorRT or the plugin said why on stderr")
        if self._stream is not None:
            self._stream.synchronize()

    def _handle(self) -> int:
        return 0 if self._stream is None else int(self._stream.cuda_stream)

    def _check_batch(self) -> None:
        most = max(profile.batch[2] for profile in self._profiles)
        if self.batch > most:
            raise UserError(
                f"batch {self.batch} is over the {most} this engine was built for; build it with --max batch=N"
            )


def open_engine_session(folder: Path, batch: int, capacity: int | None = None) -> TensorRtSession:
    """A session on an engine folder, on the current GPU. Raises UserError, one line with what does not fit."""
    manifest = read_engine(folder)
    sm = gpu_sm()
    if sm is None:
        raise UserError(f"{folder}: an engine runs on an NVIDIA GPU, and torch sees none here")
    backend = open_backend(manifest["backend"]["name"])
    check_engine(folder, manifest, backend.version, sm)
    return TensorRtSession(deserialised(backend, folder, manifest), manifest, batch, capacity)


def deserialised(backend: Backend, folder: Path, manifest: Mapping[str, Any]) -> Any:
    """The ICudaEngine of a folder that `check_engine` has looked at. Raises UserError with TensorRT's or the plugin's reason,
    or where a file is not the one of the manifest: what is loaded is a copy of the bytes that were checked."""
    log = backend.logger()
    runtime = backend.trt.Runtime(log)
    with scratch_folder(
        "plugin"
    ) as place:  # a library is loaded by its path: one that nobody else can put another file at
        plugin = place / manifest["plugin"]["file"]
        write_new(plugin, read_plugin(folder, manifest))
        if manifest["plugin"]["embedded"]:
            runtime.engine_host_code_allowed = True
        else:
            load_plugins(backend, plugin, NODES)
        engine = runtime.deserialize_cuda_engine(read_plan(folder, manifest))
        if engine is None:
            reason = plugin_error(plugin) or " ".join((log.errors or ["it gives no reason"])[0].split())
            raise UserError(f"{folder}: {backend.name} {backend.version} cannot load the engine: {reason}")
    return engine


def _context(engine: Any) -> Any:
    context = engine.create_execution_context()
    if context is None:
        raise UserError("TensorRT creates no execution context: most likely the GPU's memory is too small")
    return context


def _described(profile: Profile) -> str:
    dims = (("batch", profile.batch), ("seq", profile.seq), ("cache_length", profile.cache_length))
    return f"{profile.name} " + ", ".join(f"{name} {low}..{high}" for name, (low, _, high) in dims)
