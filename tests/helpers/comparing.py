"""One comparison of tensors for all tests: what differs, by how much, and where the worst of it lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Index = tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Values that are not finite are counted, and take no part in the errors.

    wrong: of `count` values, those outside of the tolerance. worst: index, got and wanted value of the largest error beyond
    its tolerance, None where no pair is finite. rms: root mean square of the error over that of what was wanted. strays:
    where one is NaN or infinite and the other is not the same, with the first such index. nans, infinities: of what was
    got, of what was wanted.
    """

    count: int
    wrong: int
    worst: tuple[Index, float, float] | None
    rms: float
    strays: int
    first_stray: tuple[Index, float, float] | None
    nans: tuple[int, int]
    infinities: tuple[int, int]

    def __str__(self) -> str:
        said = [f"{self.wrong} of {self.count} values differ"]
        if self.worst is not None:
            at, got, wanted = self.worst
            error = abs(got - wanted)
            relative = f"{error / abs(wanted):.3g}" if wanted else "infinite"
            said.append(
                f"worst at {list(at)}: got {got:.9g}, expected {wanted:.9g} (error {error:.3g}, relative {relative})"
            )
            said.append(f"relative RMS {self.rms:.3g}")
        for what, (mine, theirs) in (("NaN", self.nans), ("infinite", self.infinities)):
            if mine or theirs:
                said.append(f"{what}: {mine} got, {theirs} expected")
        if self.first_stray is not None:
            at, got, wanted = self.first_stray
            said.append(
                f"{self.strays} not finite where they should be, or otherwise, first at {list(at)}: got {got}, expected {wanted}"
            )
        return "; ".join(said)


def compare(
    actual: Tensor, expected: Tensor, rtol: float = 0.0, atol: float = 0.0, equal_nan: bool = False
) -> Comparison:
    """In float64, a complex value as two, along a last axis; integers without a tolerance as they are.

    Equal infinities are equal; NaN equals NaN only if `equal_nan`.
    """
    got, wanted = (_in_float64(x, actual.is_complex() or expected.is_complex()) for x in (actual, expected))
    same = (got == wanted) & got.isinf()
    if equal_nan:
        same |= got.isnan() & wanted.isnan()
    finite = got.isfinite() & wanted.isfinite()
    stray = ~finite & ~same
    error = torch.where(finite, (got - wanted).abs(), 0.0)
    beyond = torch.where(finite, error - (atol + rtol * torch.where(finite, wanted.abs(), 0.0)), -torch.inf)
    if not (rtol or atol or actual.is_floating_point() or expected.is_floating_point() or actual.is_complex()):
        unequal = actual.detach().cpu() != expected.detach().cpu()  # float64 holds no integer beyond 2^53
        beyond = torch.where(unequal & (beyond <= 0), torch.finfo(torch.float64).tiny, beyond)
    size = torch.where(finite, wanted, 0.0).norm()
    return Comparison(
        count=got.numel(),
        wrong=int(((beyond > 0) | stray).sum()),
        worst=_value_at(_place_of_largest(beyond), got, wanted) if bool(finite.any()) else None,
        rms=float(error.norm() / size) if bool(error.any()) else 0.0,
        strays=int(stray.sum()),
        first_stray=_value_at(_place_of_largest(stray.double()), got, wanted) if bool(stray.any()) else None,
        nans=(int(got.isnan().sum()), int(wanted.isnan().sum())),
        infinities=(int(got.isinf().sum()), int(wanted.isinf().sum())),
    )


def close(
    actual: Tensor,
    expected: Tensor,
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    of_max: float | None = None,
    rms: float | None = None,
    equal_nan: bool = False,
    name: str = "values",
) -> None:
    """Assert that they have one shape and every |actual - expected| <= atol + rtol |expected|.

    of_max: atol as a part of the largest |expected|. rms: instead of each value, the relative root mean square may be at
    most this. What is not finite has to be the same in both, whatever the tolerance; NaN is so only if `equal_nan`.
    """
    assert actual.shape == expected.shape, f"{name}: got {list(actual.shape)}, expected {list(expected.shape)}"
    assert expected.numel(), f"{name}: there is nothing to compare"
    if of_max is not None:
        largest = expected.detach().abs().to(torch.float64)
        atol = of_max * float(torch.where(largest.isfinite(), largest, 0.0).max())
    found = compare(actual, expected, rtol, atol, equal_nan)
    if rms is None:
        assert not found.wrong, f"{name}: {found} (rtol {rtol:g}, atol {atol:.3g})"
    else:
        assert not found.strays, f"{name}: {found}"
        assert found.rms <= rms, f"{name}: {found}, expected a relative RMS of at most {rms:g}"


def _in_float64(values: Tensor, as_complex: bool) -> Tensor:
    values = values.detach().cpu()
    return torch.view_as_real(values.to(torch.complex128)) if as_complex else values.to(torch.float64)


def _place_of_largest(values: Tensor) -> Index:
    return tuple(int(i) for i in torch.unravel_index(values.argmax(), values.shape))


def _value_at(place: Index, got: Tensor, wanted: Tensor) -> tuple[Index, float, float]:
    return place, float(got[place]), float(wanted[place])
