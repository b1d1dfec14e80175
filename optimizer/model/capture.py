"""Capture: a transformers model becomes an ATen graph, without reading a single weight.

The model is built on fake tensors from its config alone, and exported without a cache, with dynamic batch and sequence.
attention="anchor" keeps each attention as one node through transformers' own registries (the smallest and most
version-proof graph), "sdpa" and "eager" are plain transformers. MoE experts stay one node.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...compat import torch_private, transformers_private
from ...errors import UserError, short
from ...files.model.text_model import text_config
from ...passes.graph.repeated_layers import NotRepeatable, alike, repeated, shortened
from . import hf_interfaces

# What the hub calls a model that transformers knows under another name.
_ALIASES = {"kimi_k2": "deepseek_v3", "sarvam_mla": "deepseek_v3"}
ATTENTION = ("anchor", "sdpa", "eager")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capture:
    """A captured model.

    program: parameters and persistent buffers are meta tensors, to be loaded by name; computed buffers (rotary
    frequencies) are real. Inputs: input_ids, attention_mask, position_ids, each [batch, sequence] int64.
    shapes: what each parameter and persistent buffer must be, by name. tied: name -> name of the tensor it shares.
    naming: how transformers finds them in files.
    """

    program: ExportedProgram
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    max_length: int
    naming: transformers_private.Naming = field(default_factory=transformers_private.Naming)


def capture(
    config: Mapping[str, Any], attention: str = "anchor", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Capture:
    """Export the causal language model of a transformers `config` (the dict of a config.json).

    Raises UserError when transformers does not know the model, or cannot export it.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention is {attention!r}, expected one of {ATTENTION}")
    hf_interfaces.register()
    hf_config = read_config(config)
    model_class = model_class_of(hf_config, config)
    context = max_length(hf_config)
    _check_rope(hf_config.get_text_config(), context)
    with _quiet(), hf_interfaces.capturable(hf_config):
        model = _fake_model(model_class, hf_config, attention, dtype, device)
        with _short_factors(model):
            program = _export_layer_by_layer(model, hf_config, context, device)
        program = _without_fakes(program, _computed_buffers(model))
    shapes = {name: tuple(t.shape) for name, t in program.state_dict.items()}
    return Capture(program, shapes, _tied(model), context, transformers_private.naming_of(model))


def max_length(hf_config: Any) -> int:
    """Tokens of the longest sequence that the model takes."""
    return int(getattr(hf_config.get_text_config(), "max_position_embeddings", 0) or 2**17)


def read_config(config: Mapping[str, Any]) -> Any:
    """The transformers config object. Raises UserError for an unknown model_type or a field transformers refuses."""
    from transformers import CONFIG_MAPPING

    known = text_config(config)
    model_type = known.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        model_type = _ALIASES.get(str(model_type), model_type)
    known.pop("quantization_config", None)  # the graph is that of the dequantised model
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"config.json: model_type {short(repr(model_type))} is not one transformers knows; update transformers"
        )
    try:
        with _quiet():
            return CONFIG_MAPPING[model_type].from_dict(known)
    except Exception as error:  # transformers raises whatever its validators raise
        raise UserError(f"config.json: transformers does not accept it ({_first_line(error)})") from error


def model_class_of(hf_config: Any, config: Mapping[str, Any]) -> Any:
    """The causal language model class of transformers. Raises UserError when it has none."""
    import transformers

    names = [
        *(text_config(config).get("architectures") or []),
        transformers_private.causal_lm_class_name(hf_config.model_type),
        type(hf_config).__name__.removesuffix("Config") + "ForCausalLM",  # in no list: the text models of wrappers
    ]
    for name in names:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if found is not None and name.endswith("ForCausalLM"):
            return found
    raise UserError(
        f"config.json: no causal language model class for model_type {hf_config.model_type!r} in transformers"
    )


def _fake_model(model_class: Any, hf_config: Any, attention: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    for part in {id(c): c for c in (hf_config, hf_config.get_text_config())}.values():
        transformers_private.choose(
            part, hf_interfaces.NAME if attention == "anchor" else attention, hf_interfaces.NAME
        )
        part.use_cache = False
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch_private.fake_tensors(), torch.device(device):
            model: torch.nn.Module = model_class(hf_config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"config.json: transformers cannot build {model_class.__name__} ({_first_line(error)})"
        ) from error
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def _check_rope(hf_config: Any, context: int) -> None:
    """Raises UserError for rotary frequencies that depend on the longest position of a batch: keys in a cache would keep old ones."""
    rope = getattr(hf_config, "rope_parameters", None) or {}
    kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    if kind == "dynamic":
        raise UserError(
            "config.json: rope_type dynamic (NTK) changes the frequencies with the length of the sequence, so that keys in a cache "
            "would be wrong: no graph is made of it; remove rope_scaling to convert the model for its trained length"
        )
    if kind == "longrope" and isinstance(original, int) and context > original:
        raise UserError(
            f"config.json: rope_type longrope takes other factors beyond original_max_position_embeddings ({original}), so that keys in a "
            f"cache would be wrong; set max_position_embeddings ({context}) to {original} to convert the model for that length"
        )


@contextlib.contextmanager
def _short_factors(model: torch.nn.Module) -> Iterator[None]:
    """While it lasts, longrope's frequencies are not chosen anew by the positions: up to max_position_embeddings they are the short
    ones (`_check_rope`), which are in the buffers."""
    chosen = [module for module in model.modules() if getattr(module, "rope_type", None) == "longrope"]
    for module in chosen:
        setattr(module, "rope_type", "default")  # noqa: B010
    try:
        yield
    finally:
        for module in chosen:
            setattr(module, "rope_type", "longrope")  # noqa: B010


def _export_layer_by_layer(model: torch.nn.Module, hf_config: Any, max_length: int, device: str) -> ExportedProgram:
    """Exports no more than two of the layers that are alike, where the others can be made of them."""
    text = hf_config.get_text_config()
    runs = alike(model, text)
    if runs:
        try:
            with shortened(model, text, runs):
                program = _export(model, max_length, device)
            return repeated(program, model, runs)
        except (
            NotRepeatable,
            UserError,
        ) as error:  # of the part; the whole says itself what is wrong with it, if anything is
            _LOG.info("layers that look alike are exported one by one: %s", error)
    return _export(model, max_length, device)


def _export(model: torch.nn.Module, max_length: int, device: str) -> ExportedProgram:
    from torch.export import Dim

    batch, length = 2, 7  # 0 and 1 would be specialised
    with torch_private.fake_mode_of(model.parameters()):
        inputs = {
            name: torch.ones(batch, length, dtype=torch.int64, device=device)
            for name in ("input_ids", "attention_mask", "position_ids")
        }
    named = {0: Dim("batch", min=1, max=2**16), 1: Dim("seq", min=1, max=max(max_length, 8))}
    anything = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    errors = []
    for dims in (named, anything):  # what named dims cannot state: sparse models' min(index_topk, seq)
        shapes: dict[str, Any] = {**dict.fromkeys(inputs, dims), "use_cache": None}
        try:
            with torch.no_grad(), torch_private.uncached_shapes():
                program = torch.export.export(
                    model, (), {**inputs, "use_cache": False}, dynamic_shapes=shapes, strict=False
                )
            _check_lengths(program, model, max_length)
            return program
        except UserError:
            raise
        except Exception as error:
            errors.append(error)
    raise UserError(f"torch.export cannot capture {type(model).__name__}: {_first_line(errors[0])}") from errors[0]


def _check_lengths(program: ExportedProgram, model: torch.nn.Module, max_length: int) -> None:
    """Raises UserError where the model's own code was followed for short sequences alone: a loop over chunks, say."""
    ids = next(node for node in program.graph.nodes if node.name == "input_ids")
    length = ids.meta["val"].shape[1]
    bounds = program.range_constraints.get(getattr(getattr(length, "node", None), "expr", None))
    if bounds is not None and bounds.upper < max_length:
        raise UserError(
            f"torch.export follows {type(model).__name__} for up to {bounds.upper} tokens alone, of {max_length}: a graph of it would "
            "be wrong for longer sequences"
        )


def _computed_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """Real values of the buffers that are not in any checkpoint, computed by the model's own initialisation."""
    buffers: dict[str, Tensor] = {}
    stored = model.state_dict().keys()
    for prefix, module in model.named_modules():
        computed = {f"{prefix}.{name}".lstrip("."): (name, fake) for name, fake in module.named_buffers(recurse=False)}
        computed = {full: found for full, found in computed.items() if full not in stored}
        for name, fake in computed.values():
            blank = float("nan") if fake.is_floating_point() else -1
            setattr(module, name, torch.full(fake.shape, blank, dtype=fake.dtype))
        if computed:
            transformers_private.initialise(model, module)
        for full, (name, _) in computed.items():
            value = getattr(module, name)
            if value is None or not bool(torch.isfinite(value).all()):
                raise UserError(f"{full} is not in checkpoints and transformers does not say how to compute it")
            buffers[full] = value
    return buffers


def _without_fakes(program: ExportedProgram, buffers: Mapping[str, Tensor]) -> ExportedProgram:
    """Weights become meta tensors, computed buffers real ones: a program must not carry fake tensors around."""
    for name, tensor in program.state_dict.items():
        blank = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        program.state_dict[name] = (
            torch.nn.Parameter(blank, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else blank
        )
    for name in list(program.constants):
        if name in buffers:
            program.constants[name] = buffers[name]
    program.example_inputs = None
    return program


def _tied(model: torch.nn.Module) -> dict[str, str]:
    """Parameter names that share another parameter's tensor (tied embeddings)."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' advice on kernels and dtypes is about running the model, which is not what happens here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _first_line(error: Exception) -> str:
    return short((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
