"""What bench prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import short
from ...exporters.report.benched import row_names
from .tables import print_table, table


def show_bench(found: Mapping[str, Any]) -> None:
    """A line for each model and context, then how much faster every model is than the first."""
    results = found["results"]
    first = results[0]
    on_gpu = first["runtime"] == "tensorrt" or first["device"].partition(":")[0] != "cpu"
    where = (first["gpu"] if on_gpu else None) or f"{first['threads']} of {first['cpus']} CPUs"
    rounds = len(first["runs"])
    print(
        f"batch {first['batch']}, {where}, torch {first['torch']}, random tokens, medians of {rounds} round{'s' * (rounds != 1)}"
    )
    rows = table(
        "model",
        "runtime",
        "context",
        "first token, s",
        "prefill, tokens/s",
        "decode, tokens/s",
        "step p50, ms",
        "p99",
        "memory",
    )
    names = {model: short(name) for model, name in row_names([one["model"] for one in results]).items()}
    for one in results:
        rows.add_row(
            names[one["model"]], _kind(one), str(one["context"]), f"{one['prefill_seconds']:.2f}",
            f"{one['prefill_tokens_per_second']:.0f}", f"{one['decode_tokens_per_second']:.1f}", f"{one['decode_ms']['p50']:.2f}",
            f"{one['decode_ms']['p99']:.2f}", f"{one['peak_memory'] / 2**30:.2f} GiB",
        )  # fmt: skip
    print_table(rows)
    for one in found["against"]:
        prefill, decode = _told(one["prefill"]), _told(one["decode"])
        print(
            f"{short(one['model'])} against {short(one['first'])}, {one['context']} tokens: prefill {prefill}, decode {decode}, "
            f"memory {one['peak_memory']:.2f}x"
        )


def _kind(one: Mapping[str, Any]) -> str:
    """Runtime and dtype; an engine's manifest may not have the second."""
    return ", ".join(filter(None, (one["runtime"], one["dtype"])))


def _told(ratio: Mapping[str, Any]) -> str:
    if ratio["differs"] is None:
        return f"{ratio['ratio']:.2f}x as fast (one round: no telling how sure)"
    between = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
    return f"{ratio['ratio']:.2f}x as fast ({between})" if ratio["differs"] else f"no difference shown ({between})"
