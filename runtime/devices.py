"""Which devices torch can use here."""

from __future__ import annotations

from ..errors import UsageError
from .processes import processes


def usable_device(name: str) -> str:
    """`name` itself; of several processes, "cuda" is another GPU for each. Raises UsageError when torch has no such device here."""
    import torch

    shared = processes()
    if name == "cuda" and shared.count > 1 and torch.cuda.is_available():
        if shared.local >= torch.cuda.device_count():
            raise UsageError(
                f"--device cuda: {shared.beside} processes and {torch.cuda.device_count()} GPUs on this machine; start one a GPU "
                "(torchrun --nproc-per-node)"
            )
        name = f"cuda:{shared.local}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UsageError(f"--device {name}: torch cannot use it here ({reason}); pass cpu or cuda") from error
    return name
