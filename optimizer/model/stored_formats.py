"""What a checkpoint's weights are stored as. The tensors' dtypes say what is quantised; a config.json that says otherwise is refused.

Read are plain floats, DeepSeek's FP8 blocks (`X` in float8 with `X_scale_inv` beside it), and what `packed_formats.py` tells as one
tensor: compressed-tensors' INT4 and ModelOpt's NVFP4. Everything here reads headers only,
and needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files.model.model_files import optional_json
from ...files.safetensors_index import TensorLocation, some
from .packed_formats import PACKED, packed_fault

PLAIN = ("F64", "F32", "F16", "BF16")
FP8 = ("F8_E4M3", "F8_E5M2")
QUANTISED = (*FP8, *PACKED)
FP8_BLOCK = (128, 128)  # DeepSeek-V3's weight_block_size, when config.json does not say
SCALES = "_scale_inv"
_UE8M0 = "F8_E8M0"  # scales that are powers of two
QUANTISATION_FIELDS = ("quantization_config", "compression_config")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_MTP_PREFIX = re.compile(r"(?:^|\.)mtp(?:_layers|_block)?\.")
_MTP_PARTS = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:eh_proj|enorm|hnorm|shared_head)\.")

# Which format a module is in, by a tensor that lies beside its weight. The first that fits counts.
_SIGNS = (
    ("weight_scale_2", "NVFP4, as NVIDIA's ModelOpt writes it"),
    ("g_idx", "GPTQ"),
    ("qzeros", "GPTQ or AWQ"),
    ("qweight", "GPTQ or AWQ"),
    ("weight_packed", "packed by compressed-tensors"),
    ("weight.absmax", "bitsandbytes 4-bit"),
    ("weight.quant_map", "bitsandbytes 4-bit"),
    ("SCB", "bitsandbytes INT8"),
    ("weight_scale_inv", "with block scales"),
)
_BY_SCALE = {
    "I8": "INT8 with a weight_scale per channel (W8A8)",
    **dict.fromkeys(FP8, "FP8 with a weight_scale per channel or tensor"),
}
_MXFP4 = re.compile(r"_(blocks|scales)$")


def mtp_tensors(config: Mapping[str, Any], tensors: Iterable[str]) -> set[str]:
    """Names of the tensors of multi-token-prediction layers: after num_hidden_layers, and with the parts that only those have.

    A layer after num_hidden_layers that is built like the others is none: config.json has cut it off.
    """
    names, layers = list(tensors), config.get("num_hidden_layers")
    # DeepSeek-V3 has 92 thousand names: a look for what may fit takes a tenth of the time of a pattern
    parts = [name for name in names if ".eh_proj." in name or "norm." in name or ".shared_head." in name]
    numbers = {found[1] for name in parts if (found := _MTP_PARTS.search(name))}
    after = {number for number in numbers if isinstance(layers, int) and int(number) >= layers}
    may_be = [name for number in after for name in names if f"layers.{number}." in name]
    inside = {name for name in may_be if (found := _LAYER.search(name)) and found[1] in after}
    return inside | {name for name in names if "mtp" in name and _MTP_PREFIX.search(name)}


def format_fault(
    folder: Path, tensors: Mapping[str, TensorLocation], config: Mapping[str, Any], name: str
) -> str | None:
    """Why the values of `name` cannot be read, in one line; None if they can."""
    place = tensors[name]
    if place.dtype in (*PLAIN, *PACKED):
        return None
    scale = tensors.get(f"{name}{SCALES}")
    if place.dtype not in FP8 or scale is None:
        cause = _cause(tensors, name, place.dtype)
        return (
            f"{place.file}: {name} is {place.dtype} ({cause}{_sidecar(folder, config)}), which is not read here; "
            "start from the checkpoint before quantisation, or from DeepSeek's FP8 blocks (weight_scale_inv), symmetric INT4 by "
            "compressed-tensors or NVFP4 by ModelOpt"
        )
    rows, columns = block_of(config)
    grid = [-(-size // step) for size, step in zip(place.shape, (rows, columns), strict=False)]
    if len(place.shape) != 2 or list(scale.shape) != grid or scale.dtype not in (*PLAIN, _UE8M0):
        return (
            f"{place.file}: {name}{SCALES} is {scale.dtype} {list(scale.shape)}, expected {grid} for {list(place.shape)} in "
            f"blocks of {[rows, columns]} (quantization_config.weight_block_size)"
        )
    return None


def block_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of an FP8 block."""
    rows, columns = (config.get("quantization_config") or {}).get("weight_block_size") or FP8_BLOCK
    return int(rows), int(columns)


def check_formats(
    folder: Path, tensors: Mapping[str, TensorLocation], config: Mapping[str, Any], config_file: str = "config.json"
) -> None:
    """Raises UserError for the first tensor whose values cannot be read, and for a quantization_config that is not about these
    tensors. MTP layers are not looked at: nothing reads them."""
    ignored = mtp_tensors(config, tensors)
    odd = [
        name
        for name, place in tensors.items()
        if place.dtype not in PLAIN and name not in ignored and not _scales(tensors, name)
    ]
    for name in odd:
        if fault := format_fault(folder, tensors, config, name):
            raise UserError(fault)
    for kind, names in _by_kind(tensors, odd).items():
        how = "in float8 with block scales" if kind == "FP8" else f"packed as {kind}"
        if fault := _fp8_fault(config) if kind == "FP8" else packed_fault(config, kind):
            raise UserError(f"{tensors[names[0]].file}: {some(names)} {how}, but {folder / config_file}: {fault}")
    if stale := () if odd else stale_fields(config, tensors):
        dtypes = ", ".join(sorted({place.dtype for place in tensors.values()}))
        raise UserError(
            f"{folder / config_file}: {stale[0]} (quant_method {_method(config, stale[0])}) is stale, for every tensor is plain "
            f"({dtypes}); remove the field from config.json, or convert with --drop-stale-quantization"
        )


def _scales(tensors: Mapping[str, TensorLocation], name: str) -> bool:
    """Whether a tensor is the scales, powers of two, of an FP8 weight."""
    weight = tensors.get(name.removesuffix(SCALES))
    return tensors[name].dtype == _UE8M0 and name.endswith(SCALES) and weight is not None and weight.dtype in FP8


def _by_kind(tensors: Mapping[str, TensorLocation], odd: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in odd:
        dtype = tensors[name].dtype
        found.setdefault("FP8" if dtype in FP8 else dtype, []).append(name)
    return found


def stale_fields(config: Mapping[str, Any], tensors: Mapping[str, TensorLocation]) -> tuple[str, ...]:
    """Fields of config.json that speak of a quantisation, where no tensor is quantised: a cast left them behind."""
    if any(place.dtype not in PLAIN for place in tensors.values()):
        return ()
    return tuple(name for name in QUANTISATION_FIELDS if config.get(name) is not None)


def _fp8_fault(config: Mapping[str, Any]) -> str | None:
    known = '"quant_method": "fp8", "weight_block_size": [128, 128]'
    if config.get("quantization_config") is None:
        return f"no quantization_config, so that runtimes would read them unscaled; put it back ({known})"
    method = _method(config, "quantization_config")
    return None if method == "fp8" else f"quantization_config.quant_method is {method}, expected fp8 ({known})"


def _method(config: Mapping[str, Any], field: str) -> Any:
    value = config[field]
    return value.get("quant_method") if isinstance(value, dict) else value


def _cause(tensors: Mapping[str, TensorLocation], name: str, dtype: str) -> str:
    module, _, own = name.rpartition(".")
    module = module.removesuffix(".weight")  # of "weight.absmax"
    for sign, cause in _SIGNS:
        if own == sign or f"{module}.{sign}" in tensors:
            return cause
    if _MXFP4.search(name):
        return "MXFP4"
    if f"{module}.weight_scale" in tensors and dtype in _BY_SCALE:
        return _BY_SCALE[dtype]
    if dtype in FP8:
        return f"FP8 without {name}{SCALES}"
    return "AMD's FP8" if dtype.endswith("FNUZ") else "a quantised format"


def _sidecar(folder: Path, config: Mapping[str, Any]) -> str:
    """What the folder itself says about its quantisation."""
    quantisation = optional_json(folder / "hf_quant_config.json").get("quantization")
    algorithm = quantisation.get("quant_algo") if isinstance(quantisation, dict) else None
    said = [f"hf_quant_config.json says {algorithm}"] if algorithm else []
    said += [f"{field} says {_method(config, field)}" for field in QUANTISATION_FIELDS if config.get(field) is not None]
    return f"; {', '.join(said)}" if said else ""
