"""What vLLM makes of a checkpoint folder: its config, the model class that CUDA users get and its weight loader, on a CPU.

    PYTHON-WITH-VLLM tests/helpers/vllm_loader.py COMMAND FOLDER [FOLDER ...]

COMMAND is what starts vLLM, with {model} for the folder: its own parser takes it apart. Prints a line of JSON a folder, and one
of versions before. Only MLAAttention's choice of a GPU backend is replaced. No token is computed, but the router is run where it
takes a softmax. Imports nothing of ours: vLLM has an environment of its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", VLLM_NO_USAGE_STATS="1"
)

import torch
import vllm
import vllm.model_executor.layers.attention.mla_attention as mla_attention
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import get_spec_layer_idx_from_weight_name


class Implementation:
    """Stands for a GPU backend."""

    supports_quant_query_input = False
    dcp_world_size = 1


def without_backend(self: Any, **given: Any) -> None:
    """MLAAttention.__init__, but for the backend. Its absorbed weights are made after loading, of kv_b_proj."""
    nn.Module.__init__(self)
    for name, value in given.items():
        setattr(self, name, value)
    self.layer_name, self.impl, self.kv_cache_dtype, self.use_pcp = given["prefix"], Implementation(), "auto", False
    self._vllm_config = vllm.config.get_current_vllm_config()


class Watched:
    """Which tensor of the file went into a parameter: every parameter's loader is told to say so."""

    def __init__(self, model: nn.Module) -> None:
        self.taken = False
        self.parameters = dict(model.named_parameters())
        for parameter in self.parameters.values():
            parameter.data.fill_(float("nan"))
            self._watch(parameter)

    def _watch(self, parameter: Any) -> None:
        load = getattr(parameter, "weight_loader", default_weight_loader)

        def told(*arguments: Any, **options: Any) -> Any:
            self.taken = True
            return load(*arguments, **options)

        parameter.weight_loader = told

    def unfilled(self) -> list[str]:
        """Parameters of which some value came from no tensor."""
        return sorted(name for name, parameter in self.parameters.items() if bool(parameter.isnan().any()))


def started(command: str, folder: Path) -> EngineArgs:
    """What the command means to `vllm serve`. Raises SystemExit for a flag or a value that it does not know."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    _, verb, *arguments = shlex.split(command.format(model=folder))
    assert verb == "serve"
    parser = make_arg_parser(FlexibleArgumentParser())
    flags = ("--enforce-eager", "--load-format", "safetensors", "--max-model-len", "256")
    given = parser.parse_args([*arguments, *flags])
    given.model = getattr(given, "model_tag", None) or given.model
    return EngineArgs.from_cli_args(given)


def loaded(command: str, folder: Path) -> dict[str, Any]:
    """A checkpoint by vLLM's own config, class and loader. Raises whatever they raise."""
    config = started(command, folder).create_engine_config()
    model_config = config.model_config
    said = {
        "architecture": model_config.architecture,
        "tokenizer_mode": model_config.tokenizer_mode,
        "dtype": str(model_config.dtype),
    }
    with set_current_vllm_config(config):
        from vllm.models.deepseek_v32.nvidia.model import DeepseekV32ForCausalLM

        if config.quant_config is not None:
            return {**said, **quantised(config.quant_config)}
        torch.set_default_dtype(model_config.dtype)  # as vLLM does while it makes a model
        model = DeepseekV32ForCausalLM(vllm_config=config)
        torch.set_default_dtype(torch.float32)
        watched, stored, left_over, mtp = Watched(model), 0, [], 0

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal stored, mtp
            for name, tensor in DefaultModelLoader(config.load_config).get_all_weights(model_config, model):
                stored, watched.taken = stored + 1, False
                yield name, tensor
                if get_spec_layer_idx_from_weight_name(model_config.hf_config, name) is not None:
                    mtp += 1
                elif not watched.taken:
                    left_over.append(name)

        model.load_weights(tensors())
        return {
            **said, "tensors": stored, "mtp": mtp, "parameters": len(watched.parameters), "unfilled": watched.unfilled(),
            "left_over": left_over, "values": same_values(folder, watched.parameters), **attention(model), **routing(model),
        }  # fmt: skip


def quantised(config: Any) -> dict[str, Any]:
    """Which linears of the first layer vLLM takes for plain and which for quantised, by its own rules: there is no kernel for blocks
    of FP8 or packed INT4 on a CPU, so no model is made."""
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    fused = {"gate_up_proj": ["gate_proj", "up_proj"], "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]}
    attention = ("indexer.wq_b", "fused_qkv_a_proj", "q_b_proj", "kv_b_proj", "o_proj")
    names = [
        *(f"model.layers.1.self_attn.{name}" for name in attention),
        "model.layers.1.mlp.experts.0.down_proj",
        "lm_head",
    ]
    plain = {}
    for name in names:
        if config.get_name() == "fp8":
            plain[name] = is_layer_skipped(name, config.ignored_layers, fused)
        else:
            plain[name] = should_ignore_layer(name, config.ignore, fused)
    return {"quantised": config.get_name(), "plain": plain}


def same_values(folder: Path, parameters: dict[str, nn.Parameter]) -> bool:
    """The indexers' tensors are in the parameters as they are in the file; vLLM stores two of them in one."""
    from safetensors.torch import load_file

    same = []
    for name, tensor in load_file(folder / "model-indexer.safetensors").items():
        fused = re.sub(r"\.(wk|weights_proj)\.weight$", ".wk_weights_proj.weight", name)
        found, rows = parameters[fused], tensor.shape[0]
        part = found if fused == name else found[:rows] if name.endswith(".wk.weight") else found[-rows:]
        same.append(torch.equal(part.float(), tensor.float()))
    return bool(same) and all(same)


def attention(model: Any) -> dict[str, Any]:
    """How the first layer rotates: the indexer's channels half-split (NeoX) or in pairs, and MLA's."""
    first = model.model.layers[0].self_attn
    return {"indexer_halves": first.indexer_rope_emb.is_neox_style, "mla_halves": first.rotary_emb.is_neox_style}


def routing(model: Any) -> dict[str, Any]:
    """Of the last layer with experts: how its router scores and, for a softmax, how far its weights are from DeepSeek-V2's router in
    transformers on the stored gate."""
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2MoE

    blocks = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, DeepseekV2MoE)]
    if not blocks:
        return {"scoring": None}
    config, block, router = model.config, blocks[-1], blocks[-1].experts.router
    if router.scoring_func != "softmax":
        return {"scoring": router.scoring_func}
    hidden = torch.randn(64, config.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    logits = hidden @ block.gate.weight.float().T
    weights, experts = router.select_experts(hidden, logits)
    found = torch.zeros(64, config.n_routed_experts).scatter_(1, experts.long(), weights.float())
    expected = softmax_router(config, block.gate.weight, hidden)
    return {"scoring": "softmax", "router_error": float((found - expected).abs().max())}


def softmax_router(config: Any, gate: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Every expert's weight, [tokens, experts], by transformers."""
    from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    names = (
        "hidden_size",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "topk_method",
        "routed_scaling_factor",
    )
    router = DeepseekV2TopkRouter(DeepseekV2Config(**{name: getattr(config, name) for name in names}))
    router.weight.data = gate.data.float()
    with torch.no_grad():
        _, weights, experts = router(hidden)
    return torch.zeros(len(hidden), config.n_routed_experts).scatter_(1, experts, weights.float())


def main() -> None:
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    command, *folders = sys.argv[1:]
    print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__}))
    mla_attention.MLAAttention.__init__ = without_backend
    mla_attention.MLAAttention.supports_dense_mha_prefill = False
    with set_current_vllm_config(vllm.config.VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)
    for folder in map(Path, folders):
        try:
            found = loaded(command, folder)
        except (Exception, SystemExit) as error:
            found = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
        print(json.dumps({"folder": folder.name, **found}), flush=True)


if __name__ == "__main__":
    main()
