"""deploy: from a checkpoint, dense or not, to an engine folder: convert, export, build."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files.staging import check_target
from .build import BuildOptions, Built, OnProgress, build, check_build, plan_build
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
    checkpoint = Checkpoint.open(model)
    check_target(checkpoint.path, out, overwrite=options.overwrite)
    if checkpoint.is_dsa():
        return build(model, out, options, on_progress)
    check_build(model, options, convert_first=True)
    with _place(out, keep_checkpoint) as converted:
        facts = {} if listener is None else {"listener": listener}
        convert(model, converted, recipe, device=device, skip_transformers=skip_transformers, **facts)
        return build(converted, out, options, on_progress)


def plan_deploy(model: str, recipe: Recipe, options: BuildOptions) -> dict[str, Any]:
    """What `deploy` would do: as `plan_build`, and for a dense checkpoint the plan of its conversion."""
    if Checkpoint.open(model).is_dsa():
        return plan_build(model, options)
    planned = plan_build(model, options, convert_first=True)
    return {**planned, "conversion": prepare(model, recipe, False).plan.to_json()}


@contextmanager
def _place(out: Path, kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.dsa-") as folder:
        yield Path(folder, "dsa")
