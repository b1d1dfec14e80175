"""Non-negative least squares on the normal equations, by an active set."""

from __future__ import annotations

import torch
from torch import Tensor

# Fixed by float64's rounding (2e-16), of which products of a few hundred terms lose three digits.
ROUND_OFF = 1e-12  # of the largest moment


def nnls(gram: Tensor, moment: Tensor) -> Tensor:
    """argmin over x >= 0 of x^T gram x / 2 - moment^T x, [n]; gram: [n, n] positive definite, float64.

    Lawson and Hanson's active-set method (Solving Least Squares Problems, 1974, ch. 23) on the normal equations.
    """
    tolerance = ROUND_OFF * float(moment.abs().max())
    x, passive = torch.zeros_like(moment), torch.zeros_like(moment, dtype=torch.bool)
    for _ in range(10 * len(moment)):  # finite in exact arithmetic; the bound guards against cycling on round-off
        descent = (moment - gram @ x).masked_fill(passive, -torch.inf)
        if float(descent.max()) <= tolerance:
            break
        passive[descent.argmax()] = True
        while True:
            trial = torch.zeros_like(x)
            trial[passive] = torch.linalg.solve(gram[passive][:, passive], moment[passive])
            blocking = passive & (trial <= 0)
            if not blocking.any():
                break
            reach = (x / (x - trial).clamp_min(torch.finfo(x.dtype).tiny)).masked_fill(~blocking, torch.inf)
            passive &= reach > reach.min()
            x = torch.where(passive, x + reach.min() * (trial - x), 0.0)
        x = trial
    return x
