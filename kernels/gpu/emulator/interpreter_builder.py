"""Triton's interpreter with the arithmetic of the hardware: bfloat16, float8, tf32, and no access outside a tensor.

Triton (3.6 to 3.9) keeps bfloat16 as uint16 in numpy and then adds, compares and multiplies those integers; its
conversions to bfloat16 truncate, those to float8 round half up. Here bfloat16 is computed in float32 and rounded once
to nearest even, which is what torch and the GPU do; float8 saturates, as the GPU's conversion does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import triton.language as tl

from ....compat import triton_private
from ....files.dtypes import BY_TRITON, torch_dtype

stock = triton_private.interpreter()

_FLOATS = (tl.bfloat16, tl.float16, tl.float32, tl.float64, tl.float8e4nv, tl.float8e5)
_TORCH = {kind: torch_dtype(BY_TRITON[kind.name].name) for kind in _FLOATS}
_FLOAT8 = (tl.float8e4nv, tl.float8e5)
_CARRIED_AS_INTEGERS = (tl.bfloat16, *_FLOAT8)
_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def to_torch(data: Any, kind: Any) -> torch.Tensor:
    """A copy of the interpreter's array as torch sees it; kind: a scalar Triton float type."""
    array = np.array(data, copy=True, order="C")
    carrier = {2: torch.int16, 1: torch.uint8}.get(array.itemsize)
    if kind not in _CARRIED_AS_INTEGERS or carrier is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view({2: np.int16, 1: np.uint8}[array.itemsize])).view(_TORCH[kind])


def from_torch(tensor: torch.Tensor, kind: Any) -> Any:
    """The interpreter's array for a torch tensor of that type."""
    if kind == tl.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    if kind in _FLOAT8:
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()


def convert(data: Any, source: Any, target: Any) -> Any:
    """Round to nearest even; float8 saturates at its largest number (`cvt.rn.satfinite`), NaN stays NaN."""
    tensor = to_torch(data, source)
    if target in _FLOAT8:
        largest = torch.finfo(_TORCH[target]).max
        tensor = (tensor if source == tl.float64 else tensor.float()).clamp(-largest, largest)
    return from_torch(tensor.to(_TORCH[target]), target)


def widened(data: Any, kind: Any) -> Any:
    """float32 for bfloat16, float8 and float16; other arrays as they are."""
    if kind == tl.bfloat16:
        return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)
    return convert(data, kind, tl.float32) if kind in (*_FLOAT8, tl.float16) else data


def as_tf32(data: Any) -> Any:
    """float32 rounded to the 10 bits of mantissa that a tensor core reads of it."""
    bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(data), rounded, data)


class EmulatedMemory:
    """The tensors a kernel was given: what it may touch."""

    def __init__(self, kernel: str, arguments: Mapping[str, Any]) -> None:
        self._kernel = kernel
        tensors = [(name, value) for name, value in arguments.items() if isinstance(value, torch.Tensor)]
        self._spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t), name) for name, t in tensors if t.numel())

    def check(self, action: str, pointers: Any, mask: Any, size: int) -> None:
        """Raises IndexError if an unmasked access of `size` bytes is not inside one of the tensors."""
        live = pointers[np.broadcast_to(np.asarray(mask, dtype=bool), pointers.shape)]
        if live.size == 0:
            return
        low, high = int(live.min()), int(live.max()) + size
        if any(begin <= low and high <= end for begin, end, _ in self._spans):
            return
        inside = np.zeros(live.shape, dtype=bool)
        for begin, end, _ in self._spans:
            inside |= (live >= begin) & (live + size <= end)
        if not inside.all():
            raise IndexError(self._complaint(action, int(live[~inside][0]), size))

    def _complaint(self, action: str, address: int, size: int) -> str:
        where = f"address {address}"
        if self._spans:
            begin, end, name = min(self._spans, key=lambda span: max(span[0] - address, address - span[1], 0))
            where = f"byte {address - begin} of {name}, which holds {end - begin}"
        return f"{self._kernel} {action} {size} bytes at {where}"


def _extent(tensor: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _as_mask(handle: Any) -> Any:
    """As bool: the product of a scalar and a row of one element is an int32 in Triton's interpreter."""
    return stock.Handle(np.asarray(handle.data, dtype=bool), tl.int1)


class Builder(stock.Builder):  # type: ignore[misc, name-defined]  # triton has no types
    """Every operation Triton's language has, on numpy arrays."""

    def __init__(self, memory: EmulatedMemory) -> None:
        super().__init__()
        self._memory = memory

    def get_bf16(self, value: float) -> Any:
        return stock.Handle(convert(np.array([value], np.float32), tl.float32, tl.bfloat16), tl.bfloat16)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *policy: Any, **named: Any) -> Any:
        self._memory.check("reads", ptrs.data, mask.data, _itemsize(ptrs))
        return super().create_masked_load(ptrs, _as_mask(mask), other, *policy, **named)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *policy: Any, **named: Any) -> Any:
        size = _itemsize(ptrs)
        self._memory.check("writes", ptrs.data, mask.data, size)
        if value.data.itemsize != size:  # Triton would write as many bytes as numpy happens to hold
            value = stock.Handle(value.data.astype(stock.numpy_type(ptrs.get_element_ty())), value.dtype)
        return super().create_masked_store(ptrs, value, _as_mask(mask), *policy, **named)

    def create_atomic_rmw(self, rmwOp: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        self._memory.check("updates", ptr.data, mask.data, _itemsize(ptr))
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, *rest)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, *rest: Any) -> Any:
        self._memory.check("updates", ptr.data, np.True_, _itemsize(ptr))
        return super().create_atomic_cas(ptr, cmp, val, *rest)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source in _TORCH and target in _TORCH:
            return stock.Handle(convert(src.data, source, target), target)
        if source == tl.bfloat16:
            return super().cast_impl(stock.Handle(widened(src.data, source), tl.float32), dst_type)
        if target == tl.bfloat16:
            return stock.Handle(convert(src.data.astype(np.float32), tl.float32, target), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if rounding_mode == stock.truncates:
            if (source, target) != (tl.float32, tl.bfloat16):
                raise NotImplementedError(f"{source} to {target} rounded to zero is not emulated")
            return stock.Handle((src.data.view(np.uint32) >> 16).astype(np.uint16), target)
        if source in _TORCH and target in _TORCH:
            return stock.Handle(convert(src.data, source, target), target)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        kind = lhs.dtype.scalar
        if kind in _FLOAT8:
            raise NotImplementedError(f"{kind} has no arithmetic on the GPU: convert it first")
        if kind != tl.bfloat16:
            return super().binary_op(lhs, rhs, op)
        return _rounded(op, widened(lhs.data, kind), widened(rhs.data, rhs.dtype.scalar))

    def unary_op(self, arg: Any, op: Any) -> Any:
        if arg.dtype.scalar != tl.bfloat16:
            return super().unary_op(arg, op)
        return _rounded(op, widened(arg.data, tl.bfloat16))

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if op is np.where or other.dtype.scalar != tl.bfloat16:
            return super().ternary_op(lhs, rhs, other, op)
        return _rounded(op, *(widened(arg.data, tl.bfloat16) for arg in (lhs, rhs, other)))

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar != tl.bfloat16:
            return super().create_fma(x, y, z)
        return _rounded(lambda a, b, c: a * b + c, *(widened(arg.data, tl.bfloat16) for arg in (x, y, z)))

    # A NaN loses against a number (Triton before 3.9 lets it win).
    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        """Products and sums in float32, as a tensor core's; float32 operands lose what tf32 does not hold."""
        if not a.dtype.is_floating() or a.dtype.scalar == tl.float64:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        left, right = widened(a.data, a.dtype.scalar), widened(b.data, b.dtype.scalar)
        if a.dtype.scalar == tl.float32 and input_precision == stock.tf32:
            left, right = as_tf32(left), as_tf32(right)
        product = torch.matmul(torch.from_numpy(np.array(left)), torch.from_numpy(np.array(right))).numpy()
        kind = d.dtype.scalar
        total = product + widened(d.data, kind)
        return stock.Handle(convert(total, tl.float32, kind) if kind in _TORCH else total, kind)

    def create_histogram(self, data: Any, bins: int, mask: Any) -> Any:
        """Values outside [0, bins) are not counted (Triton before 3.9 counts `bins` in the last bin)."""
        counted = (data.data >= 0) & (data.data < bins)
        if mask is not None:
            counted &= mask.data
        counts = np.bincount(data.data[counted].astype(np.int64), minlength=bins)
        return stock.Handle(counts.astype(np.int32), tl.int32)


class Reduce(stock.Reduce):  # type: ignore[misc, name-defined]  # triton has no types
    """tl.reduce, where numpy can do it at once; bfloat16 in float32, rounded at the end."""

    def sum(self, input: Any) -> Any:
        return _narrowed(super().sum(_wide(input)), input)

    def min_max(self, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        input = input[0] if isinstance(input, tuple) else input
        found = super().min_max(_wide(input), val_reduce_op, idx_reduce_op)
        return (_narrowed(found[0], input), found[1]) if isinstance(found, tuple) else _narrowed(found, input)


class Scan(stock.Scan):  # type: ignore[misc, name-defined]  # triton has no types
    """tl.associative_scan, likewise."""

    def cumsum(self, input: Any) -> Any:
        return [_narrowed(part, input) for part in super().cumsum(_wide(input))]

    def cumprod(self, input: Any) -> Any:
        return [_narrowed(part, input) for part in super().cumprod(_wide(input))]


def _rounded(op: Callable[..., Any], *args: Any) -> Any:
    """The result of a float32 operation, as bfloat16, or as a truth value."""
    result = op(*args)
    if op in _COMPARISONS:
        return stock.Handle(result, tl.int1)
    return stock.Handle(convert(result.astype(np.float32), tl.float32, tl.bfloat16), tl.bfloat16)


def _wide(tensor: Any) -> Any:
    if tensor.dtype != tl.bfloat16:
        return tensor
    handle = stock.Handle(widened(tensor.handle.data, tl.bfloat16), tl.float32)
    return tl.tensor(handle, _with_element(tensor.type, tl.float32))


def _narrowed(result: Any, like: Any) -> Any:
    if like.dtype != tl.bfloat16 or result.dtype != tl.float32:
        return result
    handle = stock.Handle(convert(result.handle.data, tl.float32, tl.bfloat16), tl.bfloat16)
    return tl.tensor(handle, _with_element(result.type, tl.bfloat16))


def _with_element(kind: Any, element: Any) -> Any:
    return kind.with_element_ty(element) if kind.is_block() else element


def _itemsize(pointers: Any) -> int:
    return int(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
