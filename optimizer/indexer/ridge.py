"""Ridge regression: of many rows at once, and to one, solved again and again for weights of which few change (the constant one of
`head_weights.py`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Fixed by memory: two copies of so many tokens are half of what 4096 take, the fewest of a large model.
_ROWS = 1024


def regression(pairs: Iterable[tuple[Tensor, Tensor]], ridge: float, few: bool) -> Tensor:
    """Rows W [n, D] with the least sum of |W a - b|^2 + lambda |W|^2, lambda being `ridge` times the mean diagonal of sum a a^T.

    pairs: a [N, D] and b [N, n], float64, of one piece after another. few: in all they are fewer than channels, and all are kept.
    """
    if few:  # by one [N, N] moment, and else by one [D, D] moment
        parts = list(pairs)
        a, b = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
        moment = a @ a.T
        moment.diagonal().add_(ridge * a.square().sum() / a.shape[1])
        return torch.cholesky_solve(b, torch.linalg.cholesky(moment)).T @ a
    sums: tuple[Tensor, Tensor] | None = None
    for a, b in pairs:
        sums = (a.T @ a, b.T @ a) if sums is None else (sums[0].addmm_(a.T, a), sums[1].addmm_(b.T, a))
    assert sums is not None, "pairs of at least one piece"
    moment, right = sums
    moment.diagonal().add_(ridge * moment.diagonal().mean())
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(moment)).T


class Ridge:
    """argmin over v of sum_t weight_t (v . x_t - 1)^2 + ridge |v|^2, float64.

    tokens: [N, D], x_t. base: [N], weight of each before it is overshot: one, and of tokens that were added twice as much whenever
    others are added. Of the normal equations, what a change of weights changes is added to what there was, so that a round of
    reweighting costs what it changed and a factorisation.
    """

    def __init__(self, tokens: Tensor, ridge: float) -> None:
        self.tokens, self.base, self._ridge = tokens, torch.ones_like(tokens[:, 0]), ridge
        self._first = len(tokens)
        self._gram: Tensor | None = None  # [N, N] of all tokens
        self._weight = torch.zeros_like(self.base)  # that `_parts` are of
        self._parts: tuple[Tensor, Tensor] | None = None  # [D, D] of the tokens given first, and of those added

    @property
    def added(self) -> int:
        """Tokens that were added."""
        return len(self.tokens) - self._first

    def add(self, tokens: Tensor) -> None:
        """More tokens, and twice the weight on those that were added before."""
        one, zero = torch.ones_like(tokens[:, 0]), torch.zeros_like(tokens[:, 0])
        self.tokens, self._gram = torch.cat((self.tokens, tokens)), None
        self.base, self._weight = (
            torch.cat((weight[: self._first], 2 * weight[self._first :], more))
            for weight, more in ((self.base, one), (self._weight, zero))
        )
        if self._parts is not None:
            self._parts[1].mul_(2)

    def solved(self, weight: Tensor) -> Tensor:
        """v [D] for these weights [N] > 0."""
        if len(self.tokens) < self.tokens.shape[1]:
            return self._dual(weight)
        self._follow(weight)
        assert self._parts is not None
        primal = self._parts[0] + self._parts[1]
        primal.diagonal().add_(self._ridge)
        moment = (self.tokens.T @ weight)[:, None]
        return torch.cholesky_solve(moment, torch.linalg.cholesky(primal))[:, 0]

    def _dual(self, weight: Tensor) -> Tensor:
        """The smaller of two equivalent systems, where there are fewer tokens than channels."""
        if self._gram is None:
            self._gram = self.tokens @ self.tokens.T
        dual = self._gram.clone()
        dual.diagonal().add_(self._ridge / weight)
        ones = torch.ones_like(weight)[:, None]
        return self.tokens.T @ torch.cholesky_solve(ones, torch.linalg.cholesky(dual))[:, 0]

    def _follow(self, weight: Tensor) -> None:
        """Bring the normal equations to these weights."""
        if self._parts is None:
            square = self.tokens.new_zeros(self.tokens.shape[1], self.tokens.shape[1])
            self._parts = (square, square.clone())
        change = weight - self._weight
        for part, begin, end in ((0, 0, self._first), (1, self._first, len(self.tokens))):
            (where,) = change[begin:end].nonzero(as_tuple=True)
            for some in where.split(_ROWS):
                rows = self.tokens[begin + some]
                self._parts[part].addmm_((rows * change[begin + some, None]).T, rows)
        self._weight = weight
