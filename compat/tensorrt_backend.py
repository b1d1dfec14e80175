"""TensorRT 10.3 and newer, and TensorRT-RTX, behind one face: what differs between them is here and nowhere else.

| | TensorRT 10, 11 | TensorRT-RTX |
|---|---|---|
| builds on | the GPU it builds for | any machine; GPU architectures are named, or left open |
| strong typing | a flag in 10, always in 11 | always |
| kernels are timed | yes, with a timing cache | no, when the engine is loaded |
| layers of the engine | the builder's log, or the engine's inspector | the builder's log |
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError, UserError
from ..files.temporary import scratch_folder
from ..files.writing import link_to

BACKENDS = ("tensorrt", "tensorrt-rtx")
NAMESPACE = "mla2dsa"
RTX_SMS = (75, 80, 86, 89, 120, 121)  # TensorRT-RTX 1.7's ComputeCapability
_OLDEST = (10, 3)  # of TensorRT: IPluginV3OneBuildV2
_MODULES = {"tensorrt": ("tensorrt", "tensorrt"), "tensorrt-rtx": ("tensorrt_rtx", "rtx")}
OnProgress = Callable[[str, int, int], None]
_LIBRARIES: dict[str, Any] = {}  # handles of what `load_plugins` has loaded, by backend


@dataclass(frozen=True)
class Backend:
    """A TensorRT that is installed. trt: its Python module; version: as it says itself."""

    name: str
    trt: Any
    version: str

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt-rtx"

    def logger(self) -> Any:
        """A logger that prints nothing and keeps `errors`, and the `layers` text of finished engines."""
        return _logger_class(self.trt)()

    def monitor(self, on_progress: OnProgress) -> Any:
        """An IProgressMonitor that reports (phase, step, steps)."""
        return _monitor_class(self.trt)(on_progress)

    def network(self, builder: Any) -> Any:
        """A new network with types as the ONNX model has them."""
        flags = self.trt.NetworkDefinitionCreationFlag
        typed = not self.is_rtx and self.version.startswith("10.")  # always so in 11 and in RTX
        return builder.create_network(1 << int(flags.STRONGLY_TYPED) if typed else 0)


@cache
def open_backend(name: str) -> Backend:
    """Import it. Raises UserError when it is not installed or too old, UsageError when there is no such backend."""
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r}: expected one of {', '.join(BACKENDS)}")
    module, extra = _MODULES[name]
    if importlib.util.find_spec(module) is None:
        other = next(backend for backend in BACKENDS if backend != name)
        raise UserError(f"{name} is not installed: pip install 'mla2dsa[{extra}]', or pass --backend {other}")
    try:
        if name == "tensorrt-rtx":
            _preload_rtx()
        trt = importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise UserError(f"{name} is installed but does not load: {error}") from error
    version = str(trt.__version__)
    if name == "tensorrt" and tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise UserError(f"TensorRT {version} is too old, expected {'.'.join(map(str, _OLDEST))} or newer")
    return Backend(name, trt, version)


def load_plugins(backend: Backend, library: Path, plugins: Sequence[str]) -> None:
    """Register the `plugins` of `library` with TensorRT, once a process. Raises UserError when TensorRT does not take them."""
    registry = backend.trt.get_plugin_registry()
    if not _missing(registry, plugins):
        return
    try:
        _LIBRARIES[backend.name] = registry.load_library(str(library))
    except Exception as error:  # TensorRT's bindings raise kinds of their own
        raise UserError(f"{library}: {backend.name} {backend.version} cannot load it ({error})") from error
    missing = _missing(registry, plugins)
    if missing:
        raise UserError(f"{library}: {backend.name} {backend.version} finds no plugin {', '.join(missing)} in it")


def gpu_sm() -> int | None:
    """Architecture of the current GPU, as 90; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def plugin_error(library: Path) -> str:
    """What the plugin library last refused, "" if nothing."""
    try:
        last = ctypes.CDLL(str(library)).mla2dsa_last_error
    except (OSError, AttributeError):
        return ""
    last.restype = ctypes.c_char_p
    return (last() or b"").decode(errors="replace")


def check_sms(backend: str, sms: Sequence[int]) -> None:
    """Raises UsageError for an architecture that the backend has no engines for."""
    wrong = [sm for sm in sms if backend == "tensorrt-rtx" and sm not in RTX_SMS]
    if wrong:
        known = ", ".join(map(str, RTX_SMS))
        raise UsageError(f"TensorRT-RTX has no engines for sm_{wrong[0]}, only for {known}; use --backend tensorrt")


def set_architectures(backend: Backend, config: Any, sms: Sequence[int]) -> None:
    """Of an RTX engine; a TensorRT engine is always for the GPU it is built on."""
    if not backend.is_rtx:
        return
    config.num_compute_capabilities = len(sms)
    for number, sm in enumerate(sms):
        config.set_compute_capability(getattr(backend.trt.ComputeCapability, f"SM{sm}"), number)


def _missing(registry: Any, plugins: Sequence[str]) -> list[str]:
    known = {creator.name for creator in registry.all_creators if creator.plugin_namespace == NAMESPACE}
    return [name for name in plugins if name not in known]


@cache
def _preload_rtx() -> None:
    """RTX's ONNX parser opens "libtensorrt_rtx.so" when a node is a plugin, but the wheel only has the name with a version; the
    exception ends the process. A folder that has both names, loaded first, is where the parser then looks. Once a process."""
    if "tensorrt_rtx" in sys.modules:
        raise UserError(
            "tensorrt_rtx was imported before mla2dsa, and its parser then ends the process at the first plugin:"
            " call mla2dsa.compat.tensorrt_backend.open_backend first"
        )
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return
    libraries = Path(spec.origin).parent
    place = ExitStack()
    folder = place.enter_context(scratch_folder("rtx"))
    atexit.register(place.close)
    for real, name in (
        ("libtensorrt_rtx.so.1", "libtensorrt_rtx.so.1"),
        ("libtensorrt_rtx.so.1", "libtensorrt_rtx.so"),
        ("libtensorrt_onnxparser_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"),
    ):
        link_to(libraries / real, folder / name)
    ctypes.CDLL(str(folder / "libtensorrt_rtx.so.1"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(folder / "libtensorrt_onnxparser_rtx.so.1"))


@cache
def _logger_class(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.strip())
            if message.startswith("Layers:"):
                self.layers += message + "\n"

    return Log


@cache
def _monitor_class(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self, on_progress: OnProgress) -> None:
            trt.IProgressMonitor.__init__(self)
            self._report = on_progress
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str, steps: int) -> None:
            if parent is None:  # what a phase is made of would make the bar jump back and forth
                self._steps[phase] = steps

        def phase_finish(self, phase: str) -> None:
            steps = self._steps.pop(phase, None)
            if steps is not None:
                self._report(phase, steps, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._steps:
                self._report(phase, step + 1, self._steps[phase])
            return True

    return Monitor
