"""What other runtimes ask of a DSA checkpoint, as data: which of them load what a conversion writes, which do not, and why.

A requirement is a look at the config.json that would be written, at its layout and at the chat template. What is told here was
read in the runtime's source (or run, where it says so) at the version that stands beside it; nothing here starts a runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .config import DsaSizes, words_of
from .families import OWN, SOFTMAX_ROUTERS
from .folds import Config
from .layout import Layout

_HEADS = (32, 64)
_WIDTH = 128
_LATENT, _ROPE = 512, 64
_TOPK_STEP = 64


@dataclass(frozen=True)
class Facts:
    """A checkpoint as it would be written. config: of the text model; chat_template: the model has one of its own; mtp_indexers: its
    multi-token-prediction layers have indexers."""

    config: Config
    layout: str
    query_form: str = ""
    chat_template: bool = False
    mtp_indexers: bool = False


@dataclass(frozen=True)
class Requirement:
    """met: whether the checkpoint has what is asked. because: what is said where it has not; {field} stands for a field of
    config.json. hard: without it the checkpoint does not load, or is read wrongly; else it is only told."""

    asks: str
    met: Callable[[Facts], bool]
    because: str
    hard: bool = True


@dataclass(frozen=True)
class Target:
    """A runtime. version: the one that was read; source: the file there; ran: whether a checkpoint was run with it. start: the
    command, with {model} for the folder. ties: it reads a model whose lm_head is tied to the embedding."""

    name: str
    version: str
    source: str
    start: str
    requirements: tuple[Requirement, ...]
    ran: str = "no"
    ties: bool = True


@dataclass(frozen=True)
class Verdict:
    """Whether a target loads a checkpoint. because: why it does not; notes: what to know where it does; ran: whether a result of
    ours was ever run with it, and what it asks for is not only read."""

    target: str
    version: str
    loads: bool
    because: tuple[str, ...]
    notes: tuple[str, ...]
    start: str
    ran: bool

    def __str__(self) -> str:
        if not self.loads:
            return f"does not, because {'; '.join(self.because)}"
        return "loads" if self.ran else "loads, by what its source says (not run)"


def _rope_type(facts: Facts) -> str:
    rope = facts.config.get("rope_parameters") or facts.config.get("rope_scaling") or {}
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _routed(facts: Facts) -> bool:
    """Some layer has experts."""
    layers = facts.config.get("num_hidden_layers") or 0
    return bool(facts.config.get("n_routed_experts")) and (facts.config.get("first_k_dense_replace") or 0) < layers


def _quantised(facts: Facts) -> Any:
    return (facts.config.get("quantization_config") or {}).get("quant_method")


def _router_of(facts: Facts) -> tuple[Any, Any]:
    return facts.config.get("scoring_func"), facts.config.get("topk_method")


_CLASS = Requirement(
    "a DSA class in config.json (deepseek_v32 or glm_moe_dsa)",
    lambda facts: facts.layout != OWN,
    "the own layout is no class of its: model_type {model_type}",
)
_IGNORED = replace(_CLASS, because="it loads the own layout as the dense model {model_type} and ignores the indexers")
_Q_LATENT = Requirement(
    "a query latent", lambda facts: facts.config.get("q_lora_rank") is not None, "q_lora_rank is null"
)
_UNTIED = Requirement(
    "an lm_head of its own (--untie)",
    lambda facts: not facts.config.get("tie_word_embeddings"),
    "lm_head is tied to the embedding (--untie, or --target, writes it out)",
)
_INDEX_WIDTH = Requirement(
    f"index_head_dim {_WIDTH}",
    lambda facts: facts.config.get("index_head_dim") == _WIDTH,
    f"index_head_dim is {{index_head_dim}}, expected {_WIDTH}",
)
_INDEX_HEADS = Requirement(
    "index_n_heads 32 or 64 (DeepGEMM on SM90)",
    lambda facts: facts.config.get("index_n_heads") in _HEADS,
    "index_n_heads is {index_n_heads}, and DeepGEMM takes 32 or 64 on SM90",
)
_TOPK = Requirement(
    f"index_topk a multiple of {_TOPK_STEP}",
    lambda facts: facts.config.get("index_topk", 0) % _TOPK_STEP == 0,
    f"index_topk is {{index_topk}}, expected a multiple of {_TOPK_STEP}",
)
_FLASH_MLA = Requirement(
    f"kv_lora_rank {_LATENT} and qk_rope_head_dim {_ROPE} (FlashMLA)",
    lambda facts: (facts.config.get("kv_lora_rank"), facts.config.get("qk_rope_head_dim", _ROPE)) == (_LATENT, _ROPE),
    f"kv_lora_rank is {{kv_lora_rank}} and qk_rope_head_dim {{qk_rope_head_dim}}, and FlashMLA takes {_LATENT} and {_ROPE}",
)
_NO_BIAS = Requirement(
    "no attention_bias",
    lambda facts: not facts.config.get("attention_bias"),
    "attention_bias is true, and it drops the biases without a word",
)
_ROPE_YARN = Requirement(
    "rope of type default or yarn",
    lambda facts: _rope_type(facts) in ("default", "yarn", "deepseek_yarn"),
    "its rope is neither default nor yarn, and it reads any other as yarn",
)
_ROUTER = Requirement(
    "topk_method noaux_tc, where there are experts",
    lambda facts: not _routed(facts) or facts.config.get("topk_method") == "noaux_tc",
    "topk_method is {topk_method}, expected noaux_tc (it looks for e_score_correction_bias by it)",
)
_ROUTERS = Requirement(
    "topk_method noaux_tc with scoring_func sigmoid, or (group_limited_)greedy with softmax, where there are experts",
    lambda facts: not _routed(facts) or _router_of(facts) in (("sigmoid", "noaux_tc"), *SOFTMAX_ROUTERS),
    "topk_method is {topk_method} and scoring_func {scoring_func}, expected noaux_tc and sigmoid, or greedy or "
    "group_limited_greedy and softmax (it looks for e_score_correction_bias by the first)",
)
_SIGMOID = Requirement(
    "no scoring_func softmax, where there are experts",
    lambda facts: not _routed(facts) or facts.config.get("scoring_func") != "softmax",
    "scoring_func is softmax, and its class takes a sigmoid whatever that says",
)
_ALL_INDEXERS = Requirement(
    "an indexer in every layer",
    lambda facts: "shared" not in (facts.config.get("indexer_types") or ()),
    "layers share indexers, and whether it knows of that was not read (convert with --share none)",
)
_FUSED = Requirement(
    "no query latent that is made beside FP8 weights",
    lambda facts: not facts.query_form or _quantised(facts) != "fp8",
    "the query latent is made in plain numbers beside a quantised kv_a_proj_with_mqa, and it fuses the two",
)
_MTP = Requirement(
    "no multi-token-prediction layer without an indexer",
    lambda facts: facts.mtp_indexers or not facts.config.get("num_nextn_predict_layers"),
    "the multi-token-prediction layers have no indexer: start it without speculative decoding, or convert with --mtp drop",
    hard=False,
)
_TEMPLATE = Requirement(
    "--tokenizer-mode hf, where the model has a chat template",
    lambda facts: not facts.chat_template,
    "without --tokenizer-mode hf, DeepSeek-V3.2's chat template silently replaces the model's own",
    hard=False,
)
_GGUF = Requirement(
    "a GGUF file",
    lambda facts: False,
    "it reads GGUF only, which is not written here: its own convert_hf_to_gguf.py makes one of the folder, where it knows the "
    "tokenizer and tokenizer_config.json has add_bos_token",
)
_HADAMARD = Requirement(
    "index_head_dim a multiple of 64 (it rotates index keys by a Hadamard matrix)",
    lambda facts: facts.config.get("index_head_dim", 0) % 64 == 0,
    "index_head_dim is {index_head_dim}, expected a multiple of 64",
)

TARGETS = (
    Target(
        "transformers", "5.23", "models/deepseek_v32/modeling_deepseek_v32.py", "transformers serve {model}",
        (_IGNORED, _Q_LATENT, _SIGMOID), ran="yes, by every conversion's verification",
    ),
    Target(
        "vllm", "0.33", "vllm/models/deepseek_v32/nvidia/model.py", "vllm serve {model} --tokenizer-mode hf",
        (
            _CLASS, _Q_LATENT, _FUSED, _UNTIED, _INDEX_WIDTH, _INDEX_HEADS, _TOPK, _FLASH_MLA, _NO_BIAS, _ROPE_YARN, _ROUTERS, _MTP,
            _TEMPLATE,
        ),
        ran="0.32.0's parser, config and weight loader on a CPU (docs/vllm.txt): every parameter was loaded, no tensor left over",
        ties=False,
    ),
    Target(
        "sglang", "no pinned version", "python/sglang/srt/configs/model_config.py (is_deepseek_dsa), and its reported assertions",
        "python -m sglang.launch_server --model-path {model}", (_CLASS, _Q_LATENT, _INDEX_WIDTH, _INDEX_HEADS, _ROUTER, _MTP),
    ),
    Target(
        "tensorrt-llm", "0165a13a", "tensorrt_llm/_torch/attention_backend/sparse/dsa/indexer.py",
        "trtllm-serve {model} --backend pytorch", (_CLASS, _Q_LATENT, _SIGMOID, _ALL_INDEXERS, _MTP),
    ),
    Target(
        "mlx-lm", "0.32.2", "mlx_lm/models/deepseek_v32.py", "mlx_lm.generate --model {model} --prompt TEXT",
        (_CLASS, _Q_LATENT, _UNTIED, _SIGMOID, _ALL_INDEXERS),
        ran="yes, on a CPU: logits and greedy text equal ours up to index_topk", ties=False,
    ),
    Target(
        "llama.cpp", "in llama-cpp-python 0.3.36", "conversion/deepseek.py, src/models/deepseek32.cpp, src/llama-kv-cache.cpp",
        "llama-server -m FILE.gguf", (_GGUF, _HADAMARD, _ALL_INDEXERS),
        ran="by hand, on a CPU: GGUF files that its own converter made (float32, no vocabulary) of random deepseek_v3, Moonlight and Youtu "
        "models gave transformers' logits to 2e-6, below index_topk and above",
    ),
)  # fmt: skip
NAMES = tuple(target.name for target in TARGETS)


def facts_of(
    config: Config,
    layout: Layout,
    sizes: DsaSizes,
    mtp_layers: int = 0,
    chat_template: bool = False,
    mtp_indexers: bool = False,
) -> Facts:
    """What would be written for a model. config: its config.json, of a wrapper the text model's."""
    words = words_of(config, layout, sizes, mtp_layers)
    return Facts(words, layout.name, layout.forms[0] if layout.forms else "", chat_template, mtp_indexers)


def verdicts(facts: Facts, names: Iterable[str] = NAMES) -> tuple[Verdict, ...]:
    """What each target makes of it, in the order of TARGETS."""
    wanted = set(names)
    return tuple(_verdict(target, facts) for target in TARGETS if target.name in wanted)


def _verdict(target: Target, facts: Facts) -> Verdict:
    unmet = [requirement for requirement in target.requirements if not requirement.met(facts)]
    said = {hard: tuple(_said(one, facts.config) for one in unmet if one.hard is hard) for hard in (True, False)}
    if facts.layout == OWN and said[True]:
        said[True] = said[True][:1]  # the rest is about a class that it does not have
    return Verdict(
        target.name, target.version, not said[True], said[True], said[False], target.start, target.ran != "no"
    )


def _said(requirement: Requirement, config: Config) -> str:
    return requirement.because.format_map(_Fields(config))


class _Fields(dict[str, Any]):
    def __missing__(self, name: str) -> str:
        return "absent"


def for_targets(layout: Layout, config: Config, names: Sequence[str]) -> Layout:
    """`layout` with lm_head written out, where one of these targets does not tie it and a class is written."""
    unties = any(not target.ties for target in TARGETS if target.name in names)
    tied = words_of(config, layout, None).get("tie_word_embeddings") if layout.family else False
    return replace(layout, untie=True) if unties and tied else layout


def page() -> str:
    """docs/targets.md."""
    lines = [
        "# Which runtimes load what is written", "",
        "Written by `python -m mla2dsa.exporters.dsa.targets > docs/targets.md`; a test holds the two equal. `plan` and `convert`",
        "print what holds for one model; `--target vllm,sglang` makes it binding, before any work.", "",
    ]  # fmt: skip
    for target in TARGETS:
        lines += [
            f"## {target.name}",
            "",
            f"Read: {target.version}, {target.source}. Run with a result of ours: {target.ran}.",
            "",
        ]
        lines += [f"    {target.start.format(model='MODEL-DSA')}", ""]
        lines += [f"* {'asks for' if one.hard else 'take care:'} {one.asks}" for one in target.requirements]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def as_json(found: Iterable[Verdict]) -> dict[str, Mapping[str, Any]]:
    """By the targets' names."""
    return {
        one.target: {
            "version": one.version, "loads": one.loads, "because": list(one.because), "notes": list(one.notes), "start": one.start,
            "ran": one.ran,
        }
        for one in found
    }  # fmt: skip


if __name__ == "__main__":
    print(page(), end="")
