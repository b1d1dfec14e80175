"""What can be known to fail, found before any work and told in one message: from config.json, headers and the file system alone.

Needs neither torch nor any other heavy library, so that a wrong flag is answered at once. What it cannot see (a model that is not
downloaded yet, a tokenizer, a graph) is checked by the steps themselves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError, UserError, short
from ...exporters.dsa.layout import choose
from ...exporters.dsa.names import MANIFEST, file_names
from ...exporters.dsa.targets import for_targets
from ...files.dtypes import MODEL_DTYPES
from ...files.json_files import read_json
from ...files.manifests.engine_manifest import ENGINE_FILES, ENGINE_MANIFEST, engine_folder
from ...files.manifests.export_manifest import EXPORT_FILES, EXPORT_MANIFEST, export_folder, is_export, read_export
from ...files.model.model_files import CONFIG, is_folder
from ...files.model.text_model import text_config, text_names
from ...files.ownership import refuse_names
from ...files.safetensors_index import TensorLocation, read_index
from ...files.staging import hidden_sibling, resolved
from ..indexer.sizes import Sizes, indexer_sizes, parameters, size_faults
from ..model.config_limits import check_config
from ..model.packed_formats import whole_weights
from ..model.stored_formats import QUANTISED, check_formats, mtp_tensors, stale_fields
from ..recipe import Recipe
from ..share.choose import made_at_most
from .binding import Written, target_verdicts
from .findings import Findings, check_out, check_text
from .space import Needs

_COPIED = "the model's weights, which cannot be linked from there"
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_KEPT_BYTES, _WRITTEN_BYTES = (
    4,
    2,
)  # of an indexer's parameter: in the layers that --resume goes on with, in the checkpoint


@dataclass(frozen=True)
class _Model:
    """A checkpoint's config.json and headers; None where it is not at hand, or damaged. Of a wrapper `config` and `tensors` are the
    language model's, `whole_...` what is stored."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorLocation]
    whole_config: Mapping[str, Any]
    whole_tensors: Mapping[str, TensorLocation]

    def files(self) -> list[Path]:
        """Its weight files."""
        return sorted({place.file for place in self.whole_tensors.values()})

    def size(self, dtype: str) -> int:
        """Bytes of what the graph reads, in this dtype."""
        ignored = mtp_tensors(self.config, self.tensors)
        return sum(
            math.prod(place.shape) * _BYTES[dtype] for name, place in self.tensors.items() if name not in ignored
        )


def check_plan(found: Findings, model: str, recipe: Recipe, drop_stale: bool = False) -> None:
    """plan: the model's files and the indexer's sizes."""
    opened = _model(found, model)
    if opened is not None:
        _check_dense(found, opened, recipe, drop_stale)


def check_conversion(
    found: Findings, model: str, out: Path, recipe: Recipe | None, *, overwrite: bool = False, drop_stale: bool = False,
    calibration: str | None = None,
) -> None:  # fmt: skip
    """convert. recipe: None where it cannot be read; calibration: then what the flag says."""
    opened, needs = _model(found, model), Needs()
    check_out(found, _inputs(model, recipe), out, overwrite)
    check_text(found, recipe.calibration if recipe else calibration)
    if opened is not None:
        _convert(found, opened, out, recipe, drop_stale, needs)
    _check_space(found, needs)


def check_verify(found: Findings, dense: Path, dsa: Path, *texts: str | None) -> None:
    """verify. texts: all that it reads, None where it is not given."""
    for folder in (dense, dsa):
        _model(found, folder)
    for text in texts:
        check_text(found, text)


def check_export(
    found: Findings, model: str | Path, out: Path, kind: str, dtype: str, *, copy_weights: bool = False, overwrite: bool = False,
    needs: Needs | None = None,
) -> None:  # fmt: skip
    """export. kind: "onnx" or "pt2". needs: filled for who goes on, instead of being checked."""
    opened, wanted = _model(found, model), needs or Needs()
    check_out(found, [Path(model)], out, overwrite)
    if opened is not None and dtype in _BYTES:
        if kind == "pt2" or copy_weights:
            wanted.add(out, opened.size(dtype), "all weights")
        else:
            found.collect(refuse_names, opened.folder, [file.name for file in opened.files()], EXPORT_FILES)
            wanted.links(out, opened.files(), _COPIED)
            blocks = [place for place in opened.tensors.values() if place.dtype in QUANTISED]
            wanted.add(
                out, sum(math.prod(place.shape) for place in blocks) * _BYTES[dtype], "weights that are dequantised"
            )
    if needs is None:
        _check_space(found, wanted)


def check_build(
    found: Findings, target: str | Path, out: Path, dtype: str, *, overwrite: bool = False, onnx_only: bool = False,
    cache: Path | None = None,
) -> None:  # fmt: skip
    """build. cache: where the engine is kept too."""
    wanted, path = Needs(), Path(target)
    folder = path.parent if path.suffix == ".onnx" else path
    if path.suffix == ".onnx" and not is_export(folder):
        found.collect(export_folder, target)
        return
    if is_export(folder):
        check_out(found, [folder], out, overwrite)
        manifest = found.collect(read_export, folder)
        size = 0 if manifest is None else _exported_bytes(manifest)
    else:
        check_export(found, target, out, "onnx", dtype, overwrite=overwrite, needs=wanted)
        opened = _model(found, target)
        size = 0 if opened is None or dtype not in _BYTES else opened.size(dtype)
        if opened is not None:
            found.collect(refuse_names, opened.folder, [file.name for file in opened.files()], ENGINE_FILES)
    if not onnx_only:
        _add_engine(wanted, out, size, cache)
    _check_space(found, wanted)


def check_deploy(
    found: Findings, model: str, out: Path, recipe: Recipe | None, dtype: str, *, keep_checkpoint: Path | None = None,
    overwrite: bool = False, drop_stale: bool = False, calibration: str | None = None, cache: Path | None = None,
) -> None:  # fmt: skip
    """deploy: a conversion, if the model is dense, and a build, on one disk or two."""
    opened, needs = _model(found, model), Needs()
    if opened is not None and _is_dsa(opened):
        check_build(found, model, out, dtype, overwrite=overwrite, cache=cache)
        return
    if keep_checkpoint is not None and not (keep_checkpoint / MANIFEST).is_file():  # else it is gone on with
        check_out(found, _inputs(model, recipe), keep_checkpoint, False)
    check_out(found, [*_inputs(model, recipe), *([keep_checkpoint] if keep_checkpoint else [])], out, overwrite)
    check_text(found, recipe.calibration if recipe else calibration)
    if opened is not None:
        _convert(found, opened, keep_checkpoint or out, recipe, drop_stale, needs)
        if dtype in _BYTES:
            _add_engine(needs, out, opened.size(dtype), cache)
    _check_space(found, needs)


def check_strip(found: Findings, dsa: Path, out: Path, overwrite: bool) -> None:
    """strip."""
    opened, needs = _model(found, dsa), Needs()
    check_out(found, [dsa], out, overwrite)
    if opened is not None:
        needs.links(out, opened.files(), _COPIED)
    _check_space(found, needs)


def check_generate(found: Findings, models: Sequence[str], runtime: str | None, dtype: str | None = None) -> None:
    """What answers: the files of those that are checkpoints, whose dtype alone can be chosen."""
    found.collect(_check_dtype, models, dtype)
    for model in models:
        _check_answering(found, model, runtime)


def _check_dtype(models: Sequence[str | Path], dtype: str | None) -> None:
    """dtype: of weights and caches of those that are checkpoints, None: as it comes; exports and engines have theirs. Raises UsageError
    where none is a checkpoint, and for a dtype that models do not run in."""
    if dtype is None:
        return
    if dtype not in MODEL_DTYPES:
        raise UsageError(f"dtype {short(repr(dtype))}, expected {' or '.join(MODEL_DTYPES)}")
    if all(is_export(model) or engine_folder(model) is not None for model in models):
        kind = "an exported folder" if is_export(models[0]) else "an engine folder"
        raise UsageError(f"{models[0]}: {kind}, which has its dtype; --dtype is of checkpoints")


def _check_answering(found: Findings, model: str, runtime: str | None) -> None:
    if runtime == "tensorrt":
        return
    path = Path(model)
    folder = path.parent if path.suffix == ".engine" else path
    if not any((folder / name).is_file() for name in (EXPORT_MANIFEST, ENGINE_MANIFEST)):
        _model(found, model)


def _model(found: Findings, model: str | Path) -> _Model | None:
    folder = Path(model)
    if not found.collect(is_folder, model):
        return None
    config = found.collect(read_json, folder / CONFIG)
    tensors = found.collect(read_index, folder)
    if config is None or tensors is None:
        return None
    fits = found.collect(_fits, folder / CONFIG, config, tensors)
    if not fits:
        return None
    inside = whole_weights({name: tensors[stored] for name, stored in text_names(config, tensors).items()})
    return _Model(folder, text_config(config), inside, config, tensors)


def _fits(file: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorLocation]) -> bool:
    check_config(file, config, len(tensors))
    return True


def _inputs(model: str, recipe: Recipe | None) -> list[Path]:
    """Folders that a conversion reads, and that OUT may not replace."""
    return [Path(model), *([Path(recipe.donor)] if recipe is not None and recipe.donor else [])]


def _is_dsa(model: _Model) -> bool:
    """As `Checkpoint.is_dsa`: by config and tensors, since anybody may call a file mla2dsa.json."""
    return model.config.get("index_topk") is not None or any(".indexer." in name for name in model.tensors)


def _without_stale(model: _Model, drop_stale: bool) -> dict[str, Any]:
    return _dropped(model, model.config, drop_stale)


def _dropped(model: _Model, config: Mapping[str, Any], drop_stale: bool) -> dict[str, Any]:
    stale = stale_fields(model.config, model.tensors) if drop_stale else ()
    return {name: value for name, value in config.items() if name not in stale}


def _convert(found: Findings, model: _Model, out: Path, recipe: Recipe | None, drop_stale: bool, needs: Needs) -> None:
    """What a conversion takes from the model, and adds at `out`."""
    if _is_dsa(model):
        found.add(UserError(f"{model.folder}: no DSA checkpoint can be written: already a DSA model"))
        return
    found.collect(file_names, model.folder, model.whole_tensors)
    _check_layout(found, model, out, recipe, drop_stale, needs)
    if recipe is not None:
        _check_dense(found, model, recipe, drop_stale)
        _add_indexers(needs, model, recipe, out)
    needs.links(out, model.files(), _COPIED)


def _check_layout(
    found: Findings, model: _Model, out: Path, recipe: Recipe | None, drop_stale: bool, needs: Needs
) -> None:
    """What is asked for fits the model; room for the shards that are written anew."""
    wanted, config = recipe or Recipe(), _dropped(model, model.whole_config, drop_stale)
    tensors = model.whole_tensors
    try:
        layout = choose(
            config,
            tensors,
            wanted.layout,
            untie=wanted.untie,
            mtp=wanted.mtp,
            targets=wanted.target,
            shares=wanted.shares,
        )
        layout = for_targets(layout, config, wanted.target)
    except UserError as error:
        found.add(UserError(f"{model.folder}: {error}"))
        return
    folding = layout.folding(config, tensors, mtp_tensors(config, tensors))
    anew = {tensors[name].file for name in folding.replaced}
    needs.add(out, sum(file.stat().st_size for file in anew), "shards that are written anew")


def _check_dense(found: Findings, model: _Model, recipe: Recipe, drop_stale: bool) -> None:
    """The tensors' formats, and sizes of the indexer that the model does not take."""
    found.collect(check_formats, model.folder, model.tensors, _without_stale(model, drop_stale))
    donor = _donor_sizes(found, recipe)
    if recipe.donor is not None and donor is None:
        return  # what is wrong with the donor was said; the sizes are its
    context = model.config.get("max_position_embeddings")
    for fault in size_faults(recipe, model.config, context if isinstance(context, int) else None, donor):
        found.add(UsageError(fault))
    if recipe.target:
        _check_targets(found, model, recipe, indexer_sizes(recipe, model.config, donor), drop_stale)


def _check_targets(found: Findings, model: _Model, recipe: Recipe, sizes: Sizes, drop_stale: bool) -> None:
    """Every target that was asked for loads what would be written."""
    config = _dropped(model, model.whole_config, drop_stale)
    try:
        layout = choose(
            config, model.whole_tensors, recipe.layout, untie=recipe.untie, mtp=recipe.mtp, targets=recipe.target,
            shares=recipe.shares,
        )  # fmt: skip
    except UserError:
        return  # said by `_check_layout`, or by the plan
    layout = for_targets(layout, config, recipe.target)
    written = Written(*sizes, (1,) if recipe.share == "auto" else tuple(recipe.shared))  # which ones does not matter
    for verdict in target_verdicts(model.folder, model.config, model.tensors, layout, written, recipe.target):
        if not verdict.loads:
            found.add(UserError(f"--target {verdict.target} ({verdict.version}): {verdict}"))


def _donor_sizes(found: Findings, recipe: Recipe) -> Sizes | None:
    if recipe.donor is None:
        return None
    folder = Path(recipe.donor)
    if not found.collect(is_folder, recipe.donor):
        return None
    config = found.collect(read_json, folder / CONFIG) or {}
    names = ("index_topk", "index_n_heads", "index_head_dim")
    sizes = [config[name] for name in names if isinstance(config.get(name), int)]
    if len(sizes) == len(names):
        return sizes[0], sizes[1], sizes[2]
    missing = next(name for name in names if not isinstance(config.get(name), int))
    found.add(UserError(f"{folder}: no donor of indexers ({missing} in config.json missing)"))
    return None


def _add_indexers(needs: Needs, model: _Model, recipe: Recipe, out: Path) -> None:
    layers = model.config.get("num_hidden_layers")
    count = parameters(indexer_sizes(recipe, model.config), model.config) * (layers if isinstance(layers, int) else 0)
    needs.add(out, count * _WRITTEN_BYTES, "indexers")
    if recipe.donor is None:
        kept = hidden_sibling(resolved(out), "layers")
        there = sum(file.stat().st_size for file in kept.glob("*.safetensors")) if os.path.isdir(kept) else 0
        made = (
            count * _KEPT_BYTES * (made_at_most(layers) if recipe.share == "auto" and isinstance(layers, int) else 1.0)
        )
        needs.add(out, max(0, round(made) - there), "finished layers")


def _add_engine(needs: Needs, out: Path, size: int, cache: Path | None) -> None:
    needs.add(out, size, "the engine")
    if cache is not None and not needs.same_disk(out, cache):
        needs.add(cache, size, "the engine in the cache (--no-engine-cache does without)")


def _exported_bytes(manifest: Mapping[str, Any]) -> int:
    return int(manifest["weights"]["zero_copy_bytes"]) + int(manifest["weights"]["written_bytes"])


def _check_space(found: Findings, needs: Needs) -> None:
    for fault in needs.faults():
        found.add(UserError(fault))
