"""A device that is not there: its tensors say they are on it, and are held to that, while the CPU does the work.

An op with tensors of both devices fails as it would on a GPU. What lives on the device is counted, in bytes.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# To torch's own code the tensors are of the one kind that any torch has a guard for; with this number nobody else makes any.
NAME = "meta:7"
_BOTH = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default}


class Device:
    """bytes that live on it now, and the most there were."""

    def __init__(self) -> None:
        self.bytes = self.peak = 0
        self._users: dict[int, int] = {}

    def take(self, tensor: _On, inner: Tensor) -> None:
        storage = inner.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not self._users.get(key):
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.bytes -= size


class _On(Tensor):
    """inner: the values, on the CPU."""

    inner: Tensor
    on: Device

    @staticmethod
    def __new__(cls, inner: Tensor, on: Device) -> _On:
        made: _On = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME),
        )  # fmt: skip
        made.inner, made.on = inner, on
        on.take(made, inner)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:  # torch would make a tensor of a list itself, where nobody sees it
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(part) if isinstance(part, list) else part for part in index))
        with torch._C.DisableTorchFunctionSubclass():  # or what is on the CPU would be called one of these
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_flatten((args, kwargs or {}))[0] if isinstance(leaf, _On)]
        return _run(func, args, kwargs or {}, tensors[0].on)


class Present(TorchDispatchMode):
    """While it lasts, there is such a device."""

    def __init__(self) -> None:
        super().__init__()
        self.device = Device()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.device)


def _run(func: Any, args: Any, kwargs: Any, on: Device) -> Any:
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, _On)]
    asked = kwargs.get("device")
    wanted = bool(here) if asked is None else torch.device(asked) == torch.device(NAME)
    strangers = [tensor for tensor in tensors if not isinstance(tensor, _On) and tensor.dim()]
    if any(tensor.device == torch.device(NAME) for tensor in strangers):
        raise RuntimeError(f"{func}: a tensor on {NAME} that came from nowhere")
    if here and strangers and func not in _BOTH | _INDEXED:
        raise RuntimeError(f"{func}: tensors on {NAME} and on the CPU")
    given, named = tree_map(_inside, (args, kwargs))
    made = func(*given, **named)
    if func._schema.name.endswith("_"):
        if made.shape != args[0].shape:  # squeeze_: what is on the device takes the new shape, too
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)
        return args[0]
    return tree_map(lambda leaf: _On(leaf, on) if wanted and isinstance(leaf, Tensor) else leaf, made)


def _inside(leaf: Any) -> Any:
    if isinstance(leaf, _On):
        return leaf.inner
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf == torch.device(NAME) else leaf
