"""deploy: from a checkpoint, dense or not, to an engine folder: convert, export, build."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .build import Built, OnProgress, build
from .build_plan import BuildOptions, check_ready, plan_build
from .convert import convert
from .model.checkpoint import Checkpoint
from .plan import prepare
from .recipe import Recipe


def deploy(
    model: str,
    out: Path,
    recipe: Recipe,
    options: BuildOptions,
    *,
    keep_checkpoint: Path | None = None,
    device: str = "cpu",
    skip_transformers: bool = False,
    listener: Any = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Built:
    """Write `out`. A dense checkpoint is converted first (and verified, as `convert` does), to `keep_checkpoint` or to a
    temporary folder beside `out`. Raises UserError as `convert` and `build` do; what can be known to fail, before converting."""
    plan = plan_build(model, out, options, convert_first=True)
    if Checkpoint.open(model).is_dsa():
        return build(plan, on_progress)
    check_ready(plan)
    with _place(out, keep_checkpoint) as converted:
        facts = {} if listener is None else {"listener": listener}
        convert(model, converted, recipe, device=device, skip_transformers=skip_transformers, **facts)
        return build(replace(plan, source=converted), on_progress)


def plan_deploy(model: str, out: Path, recipe: Recipe, options: BuildOptions) -> dict[str, Any]:
    """What `deploy` would do: how the engine is built, and for a dense checkpoint the plan of its conversion."""
    planned = plan_build(model, out, options, convert_first=True).to_json()
    if Checkpoint.open(model).is_dsa():
        return planned
    return {**planned, "conversion": prepare(model, recipe, False).plan.to_json()}


@contextmanager
def _place(out: Path, kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.dsa-") as folder:
        yield Path(folder, "dsa")
