"""functionalise: when an in-place write stands in the way of an attention, make the whole program functional and look again.

    x.masked_fill_(m, -inf)   =>   masked_fill(x, m, -inf)        every in-place op, by torch's own decompositions

The slow way, minutes on a 61-layer model: taken only when `normalize`, which knows what transformers writes, did not do.
Raises UserError when torch would lose a write (compat/aliasing.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..compat.aliasing import Memory
from ..errors import UserError
from .find_mla import FindMla
from .manager import BrokenPass, Pass, Report, Work
from .matching.sites import Found, Miss
from .matching.writes import FUNCTIONALISE
from .normalize import Normalize


@dataclass(frozen=True)
class Functionalised:
    """Whether the program had to be decomposed."""

    done: bool


@dataclass(frozen=True)
class Functionalise(Pass):
    name: ClassVar[str] = "functionalise"

    def requires(self, work: Work) -> None:
        work.fact(Found)

    def run(self, work: Work) -> Report:
        blocked = _blocked(work.fact(Found))
        if not blocked:
            return Report(("no in-place write reaches an attention: nothing to do",), fact=Functionalised(False))
        untold = Memory(work.editor.graph).untold_write()
        if untold is not None:
            raise UserError(f"{blocked[0]}, but {untold} would be lost then: write out of place, or into a clone")
        work.restart(work.editor.finish().run_decompositions({}))
        again = [each.run(work) for each in (Normalize(), FindMla())]
        for report in again:
            if report.fact is not None:
                work.add(report.fact)
        return Report(
            did=(
                f"decomposed the program for {len(blocked)} attentions, then once more:",
                *(line for r in again for line in r.did),
            ),
            could_not=tuple(line for report in again for line in report.could_not),
            details=tuple(line for report in again for line in report.details),
            fact=Functionalised(True),
        )

    def ensures(self, work: Work) -> None:
        """The sites are those of the program that goes on, not of the one before."""
        graph = work.editor.graph
        stale = [site.core.out for site in work.fact(Found).sites if site.core.out.graph is not graph]
        if stale:
            raise BrokenPass(self.name, "a site belongs to the program as it was before", stale[0].name)


def _blocked(found: Found) -> list[Miss]:
    return [miss for miss in found.misses if miss.reason.endswith(FUNCTIONALISE)]
