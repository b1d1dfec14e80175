"""deploy: from a checkpoint, dense or not, to an engine folder: convert, export, build.

What is converted lies in .<out>.mla2dsa-deploy until the engine is there: a run that was stopped or failed is gone on with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import SeveralErrors, UsageError, UserError
from ..exporters.dsa.names import MANIFEST
from ..files.manifests.checkpoint_manifest import read_checkpoint_manifest
from ..files.ownership import why_not_ours
from ..files.staging import InTheWay, claim, hidden_sibling, resolved
from ..files.temporary import remove_tree
from .build import Built, OnProgress, build
from .build_plan import BuildOptions, check_ready, plan_build
from .convert import convert, fingerprint
from .indexers import Listener
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
    trust_remote_code: bool = False,
    drop_stale: bool = False,
    listener: Listener | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Built:
    """Write `out`. A dense checkpoint is converted first (and verified, as `convert` does), to `keep_checkpoint` or to a
    hidden folder beside `out`; a conversion that an earlier run began or finished there is gone on with. Raises UserError as
    `convert` and `build` do; what can be known to fail, before converting."""
    plan = plan_build(model, out, options, convert_first=True)
    if Checkpoint.open(model).is_dsa():
        return build(plan, on_progress)
    inputs = [plan.source, *([keep_checkpoint] if keep_checkpoint else [])]
    with claim(out, inputs, overwrite=options.overwrite), _place(out, keep_checkpoint) as converted:
        check_ready(plan)
        again = options.overwrite and keep_checkpoint is None
        if not _is_converted(model, converted, recipe, again, trust_remote_code, drop_stale):
            convert(
                model, converted, recipe, resume=True, overwrite=again, device=device, skip_transformers=skip_transformers,
                trust_remote_code=trust_remote_code, drop_stale=drop_stale, listener=listener,
            )  # fmt: skip
        return build(replace(plan, source=converted), on_progress)


def plan_deploy(
    model: str, out: Path, recipe: Recipe, options: BuildOptions, drop_stale: bool = False
) -> dict[str, Any]:
    """What `deploy` would do: how the engine is built, and for a dense checkpoint the plan of its conversion."""
    planned = plan_build(model, out, options, convert_first=True).to_json()
    if Checkpoint.open(model).is_dsa():
        return planned
    return {**planned, "conversion": prepare(model, recipe, drop_stale=drop_stale).plan.to_json()}


def _is_converted(
    model: str, folder: Path, recipe: Recipe, again: bool, trust_remote_code: bool, drop_stale: bool
) -> bool:
    """Whether `folder` is what this conversion gives, made by an earlier run. Raises UsageError when it is of another one, unless
    it may be made `again`."""
    if not (folder / MANIFEST).is_file() or why_not_ours(folder) is not None:
        return False  # `convert` says what is in the way
    if read_checkpoint_manifest(folder).get("fingerprint") == fingerprint(model, recipe, trust_remote_code, drop_stale):
        return True
    if again:
        return False
    raise UsageError(f"{folder}: converted from another model, recipe or text; pass --overwrite to start again")


@contextmanager
def _place(out: Path, kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    folder = hidden_sibling(resolved(out), "deploy")
    folder.mkdir(exist_ok=True)
    try:
        yield folder / "dsa"
    except InTheWay:  # the engine is whole, though elsewhere
        remove_tree(folder)
        raise
    except (KeyboardInterrupt, UserError) as error:
        if not any(folder.iterdir()):
            folder.rmdir()
            raise
        if isinstance(error, SeveralErrors):  # found before any work of this run
            raise
        message = "what is converted is kept: the same command goes on from there"
        said = [] if isinstance(error, KeyboardInterrupt) else [str(error)]
        raise type(error)("; ".join([*said, message])) from error
    remove_tree(folder)
