"""Run as a script: calls every ATen op whose schema is silent about memory with guessed arguments; prints JSON of those that ran
and of those that returned memory they were given. An op runs in a process of its own, for some crash on what they do not expect."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

TRIES, SECONDS = 40, 5
_TEXTS = ("sum", "mean", "none", "i->i", "ij->ji", "ij,jk->ik", "L")


def _tensors() -> list[Tensor]:
    return [
        torch.rand(3), torch.rand(3, 3), torch.rand(2, 3), torch.rand(2, 3, 4), torch.rand(1, 2, 3, 3), torch.tensor(1.0),
        torch.ones(2, 3, dtype=torch.long), torch.zeros(3, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool),
        torch.rand(3, 3, dtype=torch.complex64), torch.rand(2, 3, dtype=torch.float64), torch.rand(2, 3).half(),
    ]  # fmt: skip


def _guess(kind: str, rng: random.Random, tensor: Callable[[], Tensor]) -> Any:
    if kind.startswith("Optional["):
        return None if rng.random() < 0.6 else _guess(kind[9:-1], rng, tensor)
    if kind.startswith("List["):
        return [_guess(kind[5:-1], rng, tensor) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
    return {
        "Tensor": tensor, "int": lambda: rng.choice([0, 0, 1, 1, 2, -1, 3]), "SymInt": lambda: rng.choice([0, 1, 2, -1]),
        "float": lambda: rng.choice([0.0, 0.5, 1.0]), "number": lambda: rng.choice([0, 1, 1.5]),
        "bool": lambda: rng.random() < 0.5, "str": lambda: rng.choice(_TEXTS), "Device": lambda: torch.device("cpu"),
    }[kind]()  # fmt: skip


def _call(op: Any, rng: random.Random) -> bool:
    """Whether the result was memory of an argument. Raises whatever the op raises."""
    kind = rng.randrange(12)
    tensor = (lambda: _tensors()[kind]) if rng.random() < 0.7 else (lambda: rng.choice(_tensors()))
    given = {}
    for argument in op._schema.arguments:
        if not (argument.has_default_value() and rng.random() < 0.6):
            given[argument.name] = _guess(str(argument.type), rng, tensor)
    result = op(**given)
    own, returned = ({t.untyped_storage().data_ptr() for t in tree_leaves(tree) if isinstance(t, Tensor) and t.numel()}
                     for tree in (given, result))  # fmt: skip
    return bool(own & returned)


def _probe(op: Any) -> str:
    """ "ran", "aliasing", or nothing when no guess fitted."""
    rng, found = random.Random(0), ""
    for _ in range(TRIES):
        try:
            found = "aliasing" if _call(op, rng) else found or "ran"
        except Exception:  # a guess that does not fit
            continue
        if found == "aliasing":
            break
    return found


def _in_child(op: Any) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.write(writer, _probe(op).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return pipe.read()


def _silent_ops() -> list[Any]:
    """Composite ops, whose implementations may return anything, and the unsafe ones, which are not composite."""
    ops = []
    for schema in torch._C._jit_get_all_schemas():
        space, name = schema.name.split("::")
        op = (
            getattr(getattr(torch.ops.aten, name, None), schema.overload_name or "default", None)
            if space == "aten"
            else None
        )
        if op is None or not torch._C._dispatch_has_kernel(op.name()) or schema.is_mutable:
            continue
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
        if any(result.alias_info is not None for result in schema.returns) or not (composite or "unsafe" in name):
            continue
        if not any(
            word in name for word in ("_test_", "cuda", "cudnn", "miopen", "fbgemm", "quantized", "rnn", "lstm", "gru")
        ):
            ops.append(op)
    return ops


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, list[str]] = {"ran": [], "aliasing": []}
    for op in _silent_ops():
        outcome = _in_child(op)
        if outcome:
            found["ran"].append(str(op))
        if outcome == "aliasing":
            found["aliasing"].append(str(op))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
