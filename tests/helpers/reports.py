"""What `convert`, `verify` and `compare` print, small and with hostile text in it."""

from __future__ import annotations

from typing import Any

from pages import HOSTILE


def quality(kl: float) -> dict[str, Any]:
    stretches = [{"first": 64 + 8 * n, "last": 71 + 8 * n, "loss_delta": kl * n, "kl": kl} for n in range(24)]
    worst = {
        "sequence": 1,
        "loss_delta": 0.1,
        "kl": kl,
        "position": 80,
        "token_delta": 2.0,
        "tokens": [1, 2],
        "excerpt": HOSTILE,
    }
    return {
        "loss_delta": kl, "standard_error": None, "kl": kl, "same_top": 0.9, "ppl_ratio": 1.01, "sequence_kls": [kl, None],
        "worst": worst, "by_position": stretches,
    }  # fmt: skip


def verification(passed: bool = True) -> dict[str, Any]:
    text = {
        "dense_loss": 2.5, "positions": 400, "length": 256,
        "by_selection": {name: quality(0.01 * n) for n, name in enumerate(("dsa", "oracle", "window", "dsa-fp8"), 1)},
    }  # fmt: skip
    layers = [
        {
            "name": f"model.layers.{n}.self_attn", "dsa": 0.9 - n / 10, "oracle": 0.95, "window": 0.5, "chance": 0.2,
            "maps": [{"position": p, "dsa": [n] * 12, "oracle": [p // 20] * 12} for p in (100, 200)],
        }
        for n in range(3)
    ]  # fmt: skip
    scores = [
        {"variant": v, "task": "single", "length": 4096, "depth": d, "accuracy": 97.5, "logprob": -0.25}
        for v in ("dense", "dsa") for d in (0, 50)
    ]  # fmt: skip
    check = {
        "name": "loss increase",
        "passed": passed,
        "value": 0.1,
        "limit": 0.2,
        "detail": HOSTILE,
        "remedy": "more text",
    }
    return {
        "checks": [check], "layers": layers, "text": text, "origin": f"/{HOSTILE}/text", "skipped": ["transformers: no class"],
        "foreign": {"origin": "foreign.txt", "text": text, "layers": layers},
        "long": {"haystack": "built-in sentences", "index_topk": 64, "scores": scores},
    }  # fmt: skip


def report(passed: bool = True) -> dict[str, Any]:
    dims = {"name": "a", "num_heads": 8, "kv_lora_rank": 64, "qk_rope_head_dim": 16}
    indexer = {"index_topk": 64, "index_n_heads": 2, "index_head_dim": 32}
    plan = {
        "model": HOSTILE, "model_type": "deepseek_v3", "layers": [dims], "indexer": indexer, "source": "auto", "layout": "own",
        "context": 1024, "decode_attention_flops": {str(n): {"dense": 9.0 * n, "dsa": 900.0 + n} for n in (64, 256, 1024)},
    }  # fmt: skip
    return {"plan": plan, "verification": verification(passed)}


def position(text: str, rank: int = 1, kl: float | None = 0.25) -> dict[str, Any]:
    return {"token": 7, "text": text, "kl": kl, "rank": rank, "dense_logprob": -0.5, "dsa_logprob": -1.5}


def prompt(**fields: Any) -> dict[str, Any]:
    positions = [position("if "), position("<b>", rank=3, kl=1.5), position("\N{REPLACEMENT CHARACTER}"), position("")]
    return {
        "prompt": HOSTILE, "prompt_tokens": 90, "dense": "if <b>\N{EURO SIGN}", "dsa": f"if {HOSTILE}", "agreement": 0.75,
        "mean_kl": 0.5, "first_difference": {"token": 1, "dense": "<b>", "dsa": HOSTILE}, "positions": positions, **fields,
    }  # fmt: skip


def run(context: int, speed: float) -> dict[str, Any]:
    return {
        "runtime": "torch", "dtype": "float32", "batch": 2, "context": context,
        "prefill_seconds": context / speed, "prefill_tokens_per_second": speed,
        "decode_tokens_per_second": speed / 10, "decode_ms": {"p50": 8.0, "p90": 9.0, "p99": 1e4 / speed}, "peak_memory": 3 * 2**30,
        "torch": "2.13.0", "threads": 1, "gpu": None, "cpus": 2, "device": "cpu",
    }  # fmt: skip


def benchmark(models: tuple[str, ...] = ("dense", f"a/{HOSTILE}"), rounds: int = 3) -> dict[str, Any]:
    """Every model is twice as fast as the one before."""
    results = [
        {"model": model, **run(context, 100.0 * 2**n), "runs": [run(context, (100.0 + r) * 2**n) for r in range(rounds)]}
        for context in (4096, 512) for n, model in enumerate(models)
    ]  # fmt: skip
    told = {"ratio": 2.0, "low": 1.5, "high": 2.5, "differs": True} if rounds > 1 else {
        "ratio": 2.0, "low": None, "high": None, "differs": None,
    }  # fmt: skip
    unsure = {**told, "low": 0.5, "differs": False} if rounds > 1 else told
    against = [
        {"model": model, "first": models[0], "context": context, "prefill": told, "decode": unsure, "peak_memory": 0.75}
        for context in (4096, 512) for model in models[1:]
    ]  # fmt: skip
    return {"results": results, "against": against}
