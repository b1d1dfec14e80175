"""Runs Triton kernels on CPU tensors, in a process where the same kernels can also be compiled.

    interpreted(kernel)[grid](x, out, n, BLOCK=64)

Triton has an interpreter, but chooses it by an environment variable when `@triton.jit` decorates: a process either
interprets or compiles. Here a compiled-mode jit function is given an interpreted twin instead, with the jit functions
it calls (its own helpers and those of triton.language alike), and triton.language is swapped for the interpreter's
only while a kernel runs. The arithmetic is that of `interpreter_builder`: Triton's own is wrong for bfloat16.

One kernel at a time: do not compile in another thread meanwhile.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl

from ....compat import triton_private
from ....compat.triton_private import python_function, type_named
from .interpreter_builder import Builder, EmulatedMemory, Reduce, Scan, stock

_LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}  # mean nothing here
_LOCK = threading.RLock()


def interpreted(function: Any, types: Mapping[str, str] | None = None) -> InterpretedKernel:
    """The kernel, to be called as the compiled one is: interpreted(kernel)[grid](*arguments, **constants).

    function: a `@triton.jit` function. types: Triton types of arguments by name ("*bf16", "i32", "i64", "fp32"), as in
    `Variant.arguments`; without one, an integer is i32 where it fits, a float fp32, a pointer what its tensor holds.
    Arguments are CPU tensors and numbers. Reading or writing outside of the tensors given raises IndexError, a number
    that does not fit its type OverflowError; results are written into the tensors.
    Raises TypeError for what is not a jit function (Gluon kernels have no interpreter).
    """
    return InterpretedKernel(_twin(function), dict(types or {}))


class InterpretedKernel:
    """A kernel that runs on CPU tensors; index it with the grid (1 to 3 sizes, or a function of the arguments)."""

    def __init__(self, twin: _Twin, argument_types: dict[str, str]) -> None:
        self._twin = twin
        self._types = argument_types

    def __getitem__(self, grid: tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._run(grid, args, kwargs)

    def _run(self, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name not in _LAUNCH_OPTIONS}
        bound = self._twin.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        sizes = tuple(grid(dict(bound.arguments)) if callable(grid) else grid)
        sizes += (1,) * (3 - len(sizes))
        with _LOCK, np.errstate(all="ignore"), _interpreting(self._twin.__name__, bound.arguments) as builder:
            values = {name: self._value(name, value) for name, value in bound.arguments.items()}
            kernel = self._twin.rewrite()
            builder.set_grid_dim(*sizes)
            for program in itertools.product(*(range(size) for size in sizes)):
                builder.set_grid_idx(*program)
                try:
                    kernel(**values)
                except Exception as error:
                    error.add_note(f"in program {program} of {sizes} of the Triton kernel {self._twin.__name__}")
                    raise

    def _value(self, name: str, value: Any) -> Any:
        """What the body of the kernel sees: constants as they are, numbers and pointers as Triton scalars."""
        if name in self._twin.constants or value is None:
            return value
        declared = self._types.get(name)
        if isinstance(value, torch.Tensor):
            element = type_named(declared or f"*{triton_private.name_of_dtype(value.dtype)}")
            return tl.tensor(stock.Handle(np.array([value.data_ptr()], dtype=np.uint64), element), element)
        if not isinstance(value, bool | int | float):
            raise TypeError(f"argument {name} is a {type(value).__name__}, expected a tensor or a number")
        kind = type_named(declared or _natural_type(value))
        number = np.array([value], dtype=stock.numpy_type(kind))
        return tl.tensor(stock.Handle(number, kind), kind)


def _natural_type(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


class _Twin(stock.Function):  # type: ignore[misc, name-defined]  # triton has no types
    """An interpreted jit function: as Triton's, but calling it as a helper patches nothing (the launch has)."""

    def __init__(self, function: Any, scope: dict[str, Any]) -> None:
        python = python_function(function)
        super().__init__(_with_globals(python, scope))
        self.signature = inspect.signature(python)
        annotations = {name: parameter.annotation for name, parameter in self.signature.parameters.items()}
        self.constants = {name for name, annotation in annotations.items() if _is_constexpr(annotation)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    def __get__(self, instance: Any, owner: type) -> Any:
        """tl.tensor holds jit functions of triton.language as methods."""
        return self if instance is None else types.MethodType(self, instance)


_TWINS: dict[int, tuple[Any, _Twin]] = {}  # by id of the jit function, which is kept so that the id stays its own
_SCOPES: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # by id of a module's globals: those, and the twin's


def _is_jit(value: Any) -> bool:
    return triton_private.is_jit(value) or isinstance(value, stock.Function)


def _is_constexpr(annotation: Any) -> bool:
    return annotation is tl.constexpr or (isinstance(annotation, str) and annotation.rpartition(".")[2] == "constexpr")


def _twin(function: Any) -> _Twin:
    if isinstance(function, _Twin):
        return function
    if not _is_jit(function):
        raise TypeError(f"{function!r} is not a @triton.jit function")
    if id(function) not in _TWINS:
        python = python_function(function)
        scope = _scope(python.__globals__)
        outer = inspect.getclosurevars(python).nonlocals
        if outer:  # a kernel defined in a function: the interpreter would lose what it closes over
            scope = scope | {name: _translated(value) for name, value in outer.items()}
        _TWINS[id(function)] = (function, _Twin(function, scope))
    return _TWINS[id(function)][1]


def _translated(value: Any) -> Any:
    return _twin(value) if _is_jit(value) else value


def _scope(module: dict[str, Any]) -> dict[str, Any]:
    """The globals that a module's interpreted functions run in: its own, with twins in place of its jit functions."""
    if id(module) not in _SCOPES:
        _SCOPES[id(module)] = (module, {})
        _refresh(*_SCOPES[id(module)])
    return _SCOPES[id(module)][1]


def _refresh(module: dict[str, Any], scope: dict[str, Any]) -> None:
    scope.update(dict(module))  # first the names alone: a function may call one that calls it
    scope.update({name: _translated(value) for name, value in list(module.items())})


def _with_globals(function: types.FunctionType, scope: dict[str, Any]) -> types.FunctionType:
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, function.__annotations__
    copy.__module__, copy.__qualname__, copy.__doc__ = function.__module__, function.__qualname__, function.__doc__
    return copy


@contextmanager
def _interpreting(kernel: str, arguments: Mapping[str, Any]) -> Iterator[Builder]:
    """triton.language as the interpreter's, for one launch; then exactly as it was."""
    for module, scope in list(_SCOPES.values()):
        _refresh(module, scope)
    builder = Builder(EmulatedMemory(kernel, arguments))
    holders = _holders()
    before = [(holder, dict(vars(holder))) for holder in holders]
    try:
        _set_semantic(stock.use(builder, Reduce, Scan))
        stock.patch_language()
        # Triton 3.6 converts an array of one element to int, which numpy 2.4 no longer does.
        tl.tensor.__index__ = lambda self: int(self.handle.data.item())
        for holder in holders:
            for name, value in list(vars(holder).items()):
                if _is_jit(value):
                    setattr(holder, name, _twin(value))
        yield builder
    finally:
        for holder, content in before:
            _restore(holder, content)


def _holders() -> list[Any]:
    """Whatever is changed while a kernel runs: triton.language, and modules through which kernels call jit functions."""
    holders = [stock.module, *triton_private.language_parts()]
    for module, _ in list(_SCOPES.values()):
        for value in list(module.values()):
            if inspect.ismodule(value) and value not in holders and any(map(_is_jit, list(vars(value).values()))):
                holders.append(value)
    return holders


def _restore(holder: Any, content: dict[str, Any]) -> None:
    for name, value in list(vars(holder).items()):
        if name not in content:
            delattr(holder, name)
        elif value is not content[name]:
            setattr(holder, name, content[name])


def _set_semantic(semantic: Any) -> None:
    """Rewritten functions find the interpreter under this name among their globals."""
    for _, scope in _SCOPES.values():
        scope["interpreter_semantic"] = semantic
    for _, twin in _TWINS.values():
        python_function(twin).__globals__["interpreter_semantic"] = semantic
