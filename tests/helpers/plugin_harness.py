"""The plugin library called as TensorRT calls it, through `tests/exporters/tensorrt_plugin/native/harness.cpp`, without TensorRT.

Without a GPU a stand-in for the CUDA driver writes down the launches (`Harness.mocked`). On a GPU `Harness.real` runs them: the
same library and the same calls, with the data_ptr of torch's CUDA tensors as pointers, after torch has made a context.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from places import NATIVE, ROOT
from plugin_readers import read_bundle

from mla2dsa.exporters.engine.plugin_build import build_plugin
from mla2dsa.kernels.native_build import build_library, compiler

SOURCES = NATIVE
PLUGIN = ROOT / "exporters" / "tensorrt_plugin"
KCHAR, RUNTIME = 6, 1
TYPES = {"fp32": 0, "fp16": 1, "u8": 2, "i32": 3, "fp8e4nv": 6, "bf16": 7, "i64": 8}  # nvinfer1::DataType
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Launch:
    """One launch as the driver sees it. opted: bytes of shared memory the function was allowed beforehand (0: not asked)."""

    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    opted: int
    stream: int
    words: tuple[int, ...]


@dataclass(frozen=True)
class Copy:
    to: int
    source: int
    bytes: int


@functools.cache
def _built(name: str) -> Path:
    sources = [SOURCES / f"{name}.cpp", PLUGIN / "tensorrt_abi.h"]
    return build_library(f"mla2dsa_test_{name}", sources, ("-std=c++17", "-O1", "-shared", "-fPIC", f"-I{PLUGIN}"))


@functools.cache
def mock() -> ctypes.CDLL:
    """The stand-in for the driver, in this process. The plugin looks for a driver once, so this comes first."""
    library = _built("mock_driver")
    os.environ["MLA2DSA_LIBCUDA"] = str(library)
    loaded = ctypes.CDLL(str(library))
    loaded.mock_launches.restype = ctypes.c_char_p
    return loaded


class Refused(Exception):
    """The plugin said no; the text is its reason."""


class Harness:
    """One plugin. program, kernels: its fields."""

    def __init__(self, op: str, program: bytes, kernels: bytes, *, mocked: bool, **changes: int) -> None:
        self._mock = mock() if mocked else None
        self._library = _opened()
        if self._mock is not None:
            for kernel in read_bundle(kernels).values() if _whole(kernels) else ():
                for binary in kernel.binaries.values():
                    self._mock.mock_parameters(binary.entry.encode(), len(kernel.parameters))
        sizes = changes.get("program_size", len(program)), changes.get("kernels_size", len(kernels))
        kind = changes.get("type", KCHAR)
        phase = changes.get("phase", RUNTIME)
        self._plugin = self._library.h_create(op.encode(), b"node", program, sizes[0], kernels, sizes[1], kind, phase)
        if not self._plugin:
            raise Refused(self.error())

    @classmethod
    def mocked(cls, op: str, program: bytes, kernels: bytes, **changes: int) -> Harness:
        return cls(op, program, kernels, mocked=True, **changes)

    @classmethod
    def real(cls, op: str, program: bytes, kernels: bytes) -> Harness:
        return cls(op, program, kernels, mocked=False)

    def error(self) -> str:
        return bytes(self._library.h_error()).decode()

    def describe(self) -> str:
        text = ctypes.create_string_buffer(256)
        self._library.h_describe(self._plugin, text, 256)
        return text.value.decode()

    def field(self, name: str) -> bytes:
        data = ctypes.c_void_p()
        size = self._library.h_field(self._plugin, name.encode(), ctypes.byref(data))
        return ctypes.string_at(data.value or 0, size)

    def alias(self, output: int) -> int:
        return int(self._library.h_alias(self._plugin, output))

    def supports(self, position: int, inputs: int, outputs: int, types: Sequence[int]) -> bool:
        return bool(self._library.h_supports(self._plugin, position, inputs, outputs, _ints(types)))

    def output_types(self, inputs: Sequence[str], count: int) -> list[int]:
        types = (ctypes.c_int * 16)(*(TYPES[kind] for kind in inputs))
        self._check(self._library.h_output_types(self._plugin, len(inputs), types))
        return list(types)[:count]

    def outputs(self, shapes: Shapes) -> str:
        """Shapes of the outputs as text; a dim of -1 is a symbol."""
        text = ctypes.create_string_buffer(4096)
        ranks, dims = _shapes(shapes)
        self._check(self._library.h_outputs(self._plugin, len(shapes), ranks, dims, text, 4096))
        return text.value.decode()

    def workspace(self, types: Sequence[str], inputs: int, shapes: Shapes) -> int:
        return int(self._library.h_workspace(self._plugin, *_tensors(types, inputs, shapes)))

    def attach(self) -> Harness:
        """What a context gets: a plugin of its own, with its kernels loaded."""
        return self._other(self._library.h_attach(self._plugin))

    def clone(self) -> Harness:
        return self._other(self._library.h_clone(self._plugin))

    def shapes(self, types: Sequence[str], inputs: int, shapes: Shapes) -> None:
        self._check(self._library.h_shapes(self._plugin, *_tensors(types, inputs, shapes)))

    def enqueue(
        self,
        types: Sequence[str],
        inputs: int,
        shapes: Shapes,
        pointers: Sequence[int],
        workspace: int,
        stream: int = 0,
    ) -> list[Launch | Copy]:
        """What the driver was asked for; [] on a GPU, where it is done instead."""
        if self._mock is not None:
            self._mock.mock_clear()
        addresses = (ctypes.c_void_p * len(pointers))(*pointers)
        tensors = _tensors(types, inputs, shapes)
        self._check(self._library.h_enqueue(self._plugin, *tensors, addresses, workspace, stream))
        return [] if self._mock is None else list(_read(self._mock.mock_launches().decode()))

    def free(self) -> None:
        self._library.h_free(self._plugin)
        self._plugin = None

    def _other(self, plugin: Any) -> Harness:
        assert plugin
        other = object.__new__(Harness)
        other._mock, other._library, other._plugin = self._mock, self._library, plugin
        return other

    def _check(self, result: int) -> None:
        if result != 0:
            raise Refused(self.error())


@contextmanager
def failing(call: str) -> Iterator[None]:
    """The stand-in's call fails."""
    mock().mock_fail(call.encode())
    try:
        yield
    finally:
        mock().mock_fail(b"")


def case(op: str, program: bytes, kernels: bytes, types: Sequence[str], inputs: int, shapes: Shapes) -> bytes:
    """One case of the replay program."""
    parts = [struct.pack("<i", len(text)) + text for text in (op.encode(), program, kernels)]
    parts.append(struct.pack("<ii", inputs, len(types) - inputs))
    for kind, shape in zip(types, shapes, strict=True):
        parts.append(struct.pack(f"<ii{len(shape)}q", TYPES[kind], len(shape), *shape))
    return b"".join(parts)


def replay(cases: Sequence[bytes], folder: Path) -> list[str]:
    """Run cases in a process of its own, with AddressSanitizer and UndefinedBehaviorSanitizer; one line each. Raises
    AssertionError with their report when they find something."""
    program, file = _sanitized(), folder / "cases"
    file.write_bytes(b"".join(cases))
    environment = {"MLA2DSA_LIBCUDA": str(_built("mock_driver")), "ASAN_OPTIONS": "abort_on_error=1:detect_leaks=0"}
    done = subprocess.run([program, file], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases)
    return lines


@functools.cache
def _sanitized() -> Path:
    """The harness and the plugin in one program: linked, not loaded, so that the sanitizers see all of it."""
    sources = [SOURCES / "harness.cpp", *sorted(PLUGIN.glob("*.cpp")), *sorted(PLUGIN.glob("*.h"))]
    return build_library(
        "mla2dsa_test_replay", sources, ("-std=c++17", "-O1", "-DREPLAY", f"-I{PLUGIN}", *SANITIZERS), ("-ldl",)
    )


def has_sanitizers() -> bool:
    """Whether the compiler brings its sanitizers' libraries."""
    found = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return Path(found).is_absolute()  # else it repeats the name


@functools.cache
def _opened() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_built("harness")))
    for name in ("h_create", "h_attach", "h_clone"):
        getattr(library, name).restype = ctypes.c_void_p
    library.h_workspace.restype = ctypes.c_size_t
    library.h_error.restype = ctypes.c_char_p
    pointer, number = ctypes.c_void_p, ctypes.c_int
    tensors = [pointer, number, number, pointer, pointer, pointer]
    library.h_create.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_char_p,
        number,
        ctypes.c_char_p,
        number,
        number,
        number,
    ]
    library.h_describe.argtypes = [pointer, ctypes.c_char_p, number]
    library.h_field.argtypes = [pointer, ctypes.c_char_p, pointer]
    library.h_supports.argtypes = [pointer, number, number, number, pointer]
    library.h_outputs.argtypes = [pointer, number, pointer, pointer, ctypes.c_char_p, number]
    library.h_output_types.argtypes = [pointer, number, pointer]
    library.h_alias.argtypes = [pointer, number]
    library.h_workspace.argtypes = library.h_shapes.argtypes = tensors
    library.h_enqueue.argtypes = [*tensors, pointer, pointer, pointer]
    for name in ("h_attach", "h_clone", "h_free"):
        getattr(library, name).argtypes = [pointer]
    # A copy, for the plugin looks for a driver once: what other tests of this process have loaded may have found none.
    folder = tempfile.mkdtemp(prefix="mla2dsa-plugin-")
    atexit.register(shutil.rmtree, folder, True)
    own = shutil.copy(build_plugin(), folder)
    assert library.h_open(str(own).encode()) == 0
    return library


def _whole(kernels: bytes) -> bool:
    try:
        read_bundle(kernels)
    except Exception:  # whatever a test made of it
        return False
    return True


def _ints(values: Sequence[int]) -> Any:
    return (ctypes.c_int * len(values))(*values)


def _shapes(shapes: Shapes) -> tuple[Any, Any]:
    flat = [size for shape in shapes for size in shape]
    return _ints([len(shape) for shape in shapes]), (ctypes.c_int64 * len(flat))(*flat)


def _tensors(types: Sequence[str], inputs: int, shapes: Shapes) -> tuple[Any, ...]:
    return inputs, len(types) - inputs, _ints([TYPES[kind] for kind in types]), *_shapes(shapes)


def _read(text: str) -> Iterator[Launch | Copy]:
    for line in text.splitlines():
        kind, *words = line.split(" ")
        if kind == "copy":
            yield Copy(*map(int, words))
            continue
        numbers = [int(word) for word in words[1:]]
        grid, block = numbers[:3], numbers[3:6]
        yield Launch(
            words[0], (grid[0], grid[1], grid[2]), (block[0], block[1], block[2]), *numbers[6:9], tuple(numbers[9:])
        )
