"""Runs a program on torch tensors: on a CUDA device through Triton, on CPU tensors in the interpreter.

Nothing waits for the device and nothing depends on the values of a tensor, so a run can be captured in a CUDA graph
(after one run outside: the first compiles). Expressions are evaluated once per set of shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...files.dtypes import BY_TRITON, torch_dtype
from .programs.program import Env, Expr, Launch, LaunchProgram, Repeat, Workspace
from .programs.program import Tensor as TensorArgument
from .triton_code.registry import jit_function

DTYPES = {name: torch_dtype(kind.name) for name, kind in BY_TRITON.items()}
TRITON_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_PROGRAMS = 65535  # in the second and third dim of a grid
_KEPT = 512  # sets of shapes whose launches are kept

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Pointer:
    tensor: int | None  # None: the workspace
    offset: int  # bytes
    dtype: torch.dtype


@dataclass(frozen=True)
class _Call:
    """A launch with numbers in the place of expressions."""

    kernel: Callable[..., Any]
    pointers: dict[str, _Pointer]
    numbers: dict[str, int | float]
    options: dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    outputs: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    workspace: int
    calls: tuple[_Call, ...]


class Launcher:
    """A program, ready to run: Launcher(program)(*inputs) gives its outputs.

    interpret: for CPU tensors. Inputs must be contiguous and of the program's types and ranks; what they must be to each
    other is the op's contract, which is checked before.
    """

    def __init__(self, program: LaunchProgram, interpret: bool = False) -> None:
        self._program = program
        self._interpret = interpret
        self._plans: dict[Shapes, _Plan] = {}

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self._check(inputs)
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        plan = self._plans.get(shapes)
        if plan is None:
            if len(self._plans) >= _KEPT:
                self._plans.clear()
            plan = self._plans[shapes] = self._plan(shapes)
        device = inputs[0].device
        outputs = self._outputs(plan, inputs)
        if all(output.numel() == 0 for output in outputs):
            return outputs
        workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for call in plan.calls:
                _run(call, (*inputs, *outputs), workspace)
        return outputs

    def _outputs(self, plan: _Plan, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """New memory each, for torch's ops change no input: a copy of it where the program updates one."""
        aliases = dict(self._program.aliases)
        return tuple(
            inputs[aliases[number]].clone()
            if number in aliases
            else torch.empty(shape, dtype=dtype, device=inputs[0].device)
            for number, (dtype, shape) in enumerate(plan.outputs)
        )

    def _check(self, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs) != len(self._program.inputs):
            raise ValueError(f"the program takes {len(self._program.inputs)} tensors, got {len(inputs)}")
        for number, (name, tensor) in enumerate(zip(self._program.inputs, inputs, strict=True)):
            if tensor.dtype != DTYPES[name] or not tensor.is_contiguous():
                found = f"{tensor.dtype} with strides {tensor.stride()}"
                raise ValueError(f"input {number} of the program must be contiguous and {DTYPES[name]}, got {found}")

    def _plan(self, inputs: Shapes) -> _Plan:
        program, shapes = self._program, [*inputs]
        for _, shape in program.outputs:
            shapes.append(tuple(size.value(shapes) for size in shape))
        outputs = tuple((DTYPES[name], shapes[len(inputs) + i]) for i, (name, _) in enumerate(program.outputs))
        if all(0 in shape for _, shape in outputs):
            return _Plan(outputs, 0, ())
        calls = []
        for step in program.steps:
            for launch, env in _unrolled(step, shapes):
                calls += self._call(launch, shapes, env)
        return _Plan(outputs, program.workspace.value(shapes), tuple(calls))

    def _call(self, launch: Launch, shapes: list[tuple[int, ...]], env: Env) -> list[_Call]:
        variant = launch.variant
        grid = tuple(size.value(shapes, env) for size in launch.grid)
        if 0 in grid:
            return []
        if max(grid[1:]) > _MOST_PROGRAMS:
            raise ValueError(f"{variant.kernel} would need {grid} programs for tensors of shape {shapes}: too many")
        pointers: dict[str, _Pointer] = {}
        numbers: dict[str, int | float] = {}
        for (name, kind), value in zip(variant.arguments, launch.arguments, strict=True):
            if isinstance(value, TensorArgument | Workspace):
                tensor = value.number if isinstance(value, TensorArgument) else None
                pointers[name] = _Pointer(tensor, value.offset.value(shapes, env), DTYPES[kind.removeprefix("*")])
            else:
                numbers[name] = _number(name, kind, value, shapes, env)
        options = dict(variant.constants)
        function = jit_function(variant.kernel)
        if self._interpret:
            from .emulator.interpreter import interpreted

            function = interpreted(function, dict(variant.arguments))
        else:
            options |= {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
        return [_Call(function[grid], pointers, numbers, options)]


def _unrolled(step: Launch | Repeat, shapes: list[tuple[int, ...]]) -> list[tuple[Launch, Env]]:
    if isinstance(step, Launch):
        return [(step, {})]
    values = range(0, step.stop.value(shapes), step.step.value(shapes))
    return [(launch, {step.variable: value}) for value in values for launch in step.launches]


def _number(name: str, kind: str, value: Expr | float, shapes: list[tuple[int, ...]], env: Env) -> int | float:
    if not isinstance(value, Expr):
        return value
    number = value.value(shapes, env)
    if kind == "i32" and not -(2**31) <= number < 2**31:
        raise ValueError(f"{name} is {number} for tensors of shape {shapes}: the kernels count up to 2^31 - 1")
    return number


def _run(call: _Call, tensors: tuple[torch.Tensor, ...], workspace: torch.Tensor) -> None:
    """Triton itself looks whether a pointer is 16-byte aligned, and has a variant of the kernel for when it is not."""
    pointers = {}
    for name, pointer in call.pointers.items():
        if pointer.tensor is None:
            pointers[name] = workspace[pointer.offset :].view(pointer.dtype)
        else:
            pointers[name] = tensors[pointer.tensor]
    call.kernel(**pointers, **call.numbers, **call.options)
