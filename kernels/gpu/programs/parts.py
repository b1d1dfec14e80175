"""What the programs of all ops are put together with: launches from named arguments, and one workspace shared out."""

from __future__ import annotations

from collections.abc import Mapping

from .program import Expr, Launch, Tensor, Variant, Workspace, ceil_div, integer

Value = Tensor | Workspace | Expr | int | float
Argument = tuple[str, str, Value]  # name, Triton type, value

_ALIGNMENT = 256  # of each part of the workspace: more than any load needs
_LAUNCH_OPTIONS = ("num_warps", "num_stages")


def launch(
    kernel: str,
    grid: tuple[Expr | int, ...],
    arguments: tuple[Argument, ...],
    constants: Mapping[str, int | bool | str | None],
    blocks: Mapping[str, int],
) -> Launch:
    """A launch of `kernel`. arguments: all that are not constants, in the kernel's order; pointers are declared to be
    16-byte aligned. blocks: the kernel's row of the tuning table, of which num_warps and num_stages are used."""
    variant = Variant(
        kernel=kernel,
        constants=tuple(constants.items()),
        arguments=tuple((name, kind) for name, kind, _ in arguments),
        aligned=frozenset(name for name, kind, _ in arguments if kind.startswith("*")),
        num_warps=blocks["num_warps"],
        num_stages=blocks["num_stages"],
    )
    sizes = tuple(integer(size) for size in (*grid, 1, 1)[:3])
    values = tuple(integer(value) if isinstance(value, int) else value for _, _, value in arguments)
    return Launch(variant, (sizes[0], sizes[1], sizes[2]), values)


class Arena:
    """Shares one workspace out."""

    def __init__(self) -> None:
        self.size: Expr = integer(0)

    def take(self, count: Expr | int, itemsize: int = 4) -> Workspace:
        """Room for `count` items."""
        start = self.size
        self.size = start + ceil_div(integer(count) * itemsize, _ALIGNMENT) * _ALIGNMENT
        return Workspace(start)


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is not below `number` or `least`."""
    return max(least, 1 << max(0, number - 1).bit_length())
