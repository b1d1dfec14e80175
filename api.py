"""The Python front door: `mla2dsa.plan`, `convert`, `verify`, `compare`, `bench`, `export`, `build`. Loaded when one of them is asked for.

Each does what the command of its name does, with the same looks before any work, raises UserError and UsageError with its messages, and
gives a `Result`, which prints as the command does. Settings are those of a recipe (docs/recipe.md), by keyword: `index_topk=512,
indexer="distil"`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from .optimizer.answers.compare import Compared
    from .optimizer.build import Built
    from .optimizer.convert import Outcome
    from .optimizer.export import Exported
    from .optimizer.indexers import Listener
    from .optimizer.plan import Plan
    from .optimizer.recipe import Recipe
    from .optimizer.verify import Verification

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Result(Generic[T]):
    """value: what was made, typed. data: the same as the command prints it with --json."""

    value: T
    data: Mapping[str, Any]
    show: Callable[[], None] = field(compare=False)

    def __repr__(self) -> str:
        """As the command prints it."""
        with redirect_stdout(io.StringIO()) as printed:
            self.show()
        return printed.getvalue().rstrip()


def plan(
    model: str | Path, *, recipe: str | Path | None = None, allow_partial: bool = False, **settings: Any
) -> Result[Plan]:
    """What a conversion of `model` (a folder or a hub id) would do, and why not; reads no weight, and fetches none."""
    from .commands.show.conversion import plan_json, show_plan
    from .files.model.hub import planned_folder
    from .optimizer.before.findings import Findings
    from .optimizer.before.preflight import check_plan
    from .optimizer.plan import prepare

    wanted = _recipe(recipe, settings)
    with planned_folder(str(model)) as folder:
        with Findings() as found:
            check_plan(found, folder, wanted)
        made = replace(prepare(folder, wanted, allow_partial).plan, model=str(model))
    return Result(made, plan_json(made), lambda: show_plan(made))


def convert(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    skip_verification: bool = False,
    skip_transformers: bool = False,
    device: str = "cpu",
    listener: Listener | None = None,
    **settings: Any,
) -> Result[Outcome]:
    """Write the DSA checkpoint of `model` to `out`, whole and verified or not at all. listener: is told how far the work is."""
    from .commands.show.conversion import show_layers, show_plan, show_verification
    from .errors import UsageError
    from .optimizer.convert import convert

    if overwrite and resume:
        raise UsageError("convert: overwrite and resume, expected one of them")

    done = convert(
        str(model), Path(out), _recipe(recipe, settings), overwrite=overwrite, resume=resume, device=device,
        skip_verification=skip_verification, skip_transformers=skip_transformers, listener=listener,
    )  # fmt: skip

    def show() -> None:
        show_plan(done.plan)
        show_layers(done.layers, done.report)
        if done.verification is not None:
            show_verification(done.verification, layers=False)
        print(f"{out}: written{'' if done.verification else ', NOT verified'}")

    return Result(done, done.report, show)


def verify(
    dense: str | Path, dsa: str | Path, *, text: str | Path | None = None, foreign_text: str | Path | None = None,
    sequences: int | None = None, sequence_length: int | None = None, max_loss_delta: float | None = None,
    gates: Mapping[str, float] | None = None, skip_transformers: bool = False, device: str = "cpu",
) -> Result[Verification]:  # fmt: skip
    """Hold `dsa` against the dense checkpoint that it was made from. Raises `FailedVerification`, a UserError that has all figures as
    `.verification`, for a check that does not hold. gates: limits as --gate has them."""
    from .commands.show.conversion import show_verification
    from .optimizer.before.findings import Findings
    from .optimizer.before.preflight import check_verify
    from .optimizer.verify import FailedVerification, verify_folders

    texts = [None if path is None else str(path) for path in (text, foreign_text)]
    with Findings() as looked:
        check_verify(looked, Path(dense), Path(dsa), *texts)
    found = verify_folders(
        Path(dense), Path(dsa), texts[0], foreign_text=texts[1], sequences=sequences, sequence_length=sequence_length,
        max_loss_delta=max_loss_delta, gates=[f"{name}={limit}" for name, limit in (gates or {}).items()],
        skip_transformers=skip_transformers, device=device,
    )  # fmt: skip
    if not found.passed:
        raise FailedVerification(found)
    return Result(found, found.to_json(), lambda: show_verification(found))


def compare(
    dense: str | Path, dsa: str | Path, prompts: str | Sequence[str], *, max_new_tokens: int = 64, chat: bool = False,
    system: str | None = None, runtime: str | None = None, device: str = "cpu", dtype: str | None = None,
) -> Result[tuple[Compared, ...]]:  # fmt: skip
    """What a dense model and its DSA one (checkpoint, exported folder or engine) say to the same prompts, and how far apart they are by
    position. runtime: of `dsa`, None for its own. dtype: of checkpoints' weights and caches, None for float32."""
    from .commands.show.answers import comparisons_json, show_comparison
    from .optimizer.answers.compare import compare, open_both
    from .optimizer.before.findings import Findings
    from .optimizer.before.preflight import check_generate

    with Findings() as looked:
        check_generate(looked, [str(dense)], "torch", dtype)
        check_generate(looked, [str(dsa)], runtime)
    both = open_both(str(dense), str(dsa), runtime, device, False, dtype)
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    found = tuple(compare(both, asked, max_new_tokens, chat=chat, system=system))

    def show() -> None:
        for one in found:
            show_comparison(one, both.index_topk)

    return Result(found, comparisons_json(found, both.index_topk), show)


def bench(
    models: str | Path | Sequence[str | Path], contexts: Sequence[int] = (), *, batch: int = 1, tokens: int = 64, rounds: int = 3,
    runtime: str | None = None, device: str = "cpu", dtype: str | None = None,
) -> Result[Mapping[str, Any]]:  # fmt: skip
    """Time prefill and decode of models side by side, each run in a process of its own. contexts: tokens of prefill; none for a default.
    dtype: of checkpoints' weights and caches, None for float32."""
    from .commands.show.bench import show_bench
    from .optimizer.before.findings import Findings
    from .optimizer.before.preflight import check_generate
    from .optimizer.bench import bench

    names = [str(model) for model in ([models] if isinstance(models, str | Path) else models)]
    with Findings() as looked:
        check_generate(looked, names, runtime, dtype)
    found = bench(
        names, contexts or (None,), batch=batch, tokens=tokens, rounds=rounds, runtime=runtime, device=device, dtype=dtype
    )  # fmt: skip
    return Result(found, found, lambda: show_bench(found))


def export(
    model: str | Path, out: str | Path, *, format: str = "onnx", dtype: str = "float32", max_batch: int = 1,
    max_seq: int | None = None, copy_weights: bool = False, overwrite: bool = False,
) -> Result[Exported]:  # fmt: skip
    """Write the graph of a DSA checkpoint with its caches to `out`: "onnx" or "pt2"."""
    from .optimizer.before.findings import Findings
    from .optimizer.before.preflight import check_export
    from .optimizer.export import export

    with Findings() as found:
        check_export(found, model, Path(out), format, dtype, copy_weights=copy_weights, overwrite=overwrite)
    done = export(
        model, Path(out), format, dtype, max_batch, max_seq, copy_weights=copy_weights, overwrite=overwrite
    )  # fmt: skip
    return Result(done, done.manifest, lambda: print(f"{done.folder}: {format}, {dtype}"))


def build(source: str | Path, out: str | Path, **options: Any) -> Result[Built]:
    """A TensorRT engine with our plugins from a DSA checkpoint or an ONNX export. options: fields of `BuildOptions`, as
    backend="tensorrt-rtx", sms=[90], most={"batch": 4, "cache_length": 65536}."""
    from .commands.show.engines import show_built
    from .optimizer.before.findings import Findings
    from .optimizer.before.preflight import check_build
    from .optimizer.build import build
    from .optimizer.build_plan import BuildOptions, plan_build

    wanted = BuildOptions(**options)
    with Findings() as found:
        check_build(found, source, Path(out), wanted.dtype, overwrite=wanted.overwrite)
    built = build(plan_build(source, Path(out), wanted))
    return Result(built, built.manifest, lambda: show_built(Path(out), built))


def _recipe(file: str | Path | None, settings: Mapping[str, Any]) -> Recipe:
    from .optimizer.recipe import read_recipe

    named = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return read_recipe(None if file is None else str(file), named)
