"""The cost of a model in words and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tables import print_table, table


def show_cost(cost: Mapping[str, Any]) -> None:
    """By position, crossovers, caches, memory; how it was computed is said first."""
    guessed = ", speculative decoding" if cost["speculative"] else ""
    many = f"{cost['batch']} sequences at once" if cost["batch"] else "a large batch"
    print(
        f"cost on {cost['gpu']['name']} at ${cost['dollars_per_gpu_hour']:g} an hour, {many}{guessed}: a roofline, not measured"
    )
    rows = table(
        "dollars per million tokens at", "prefill dense", "DSA", "dense/DSA", "decode dense", "DSA", "dense/DSA"
    )
    for row in cost["dollars_per_million_tokens"]:
        cells = [
            _tokens(row["position"]),
            *(
                text
                for name in ("prefill", "decode")
                for text in (_money(row[f"{name}_dense"]), _money(row[f"{name}_dsa"]), f"{row[f'{name}_ratio']:.2f}x")
            ),
        ]
        rows.add_row(*cells)
    print_table(rows)
    for name, position in cost["crossover"].items():
        print(f"DSA is the cheaper one in {name} " + (f"from {_tokens(position)} on" if position else "at no length"))
    size = cost["bytes_per_token"]
    print(
        f"cache of one token, all layers: dense {size['dense']:.0f} bytes, DSA {size['dsa']:.0f} and {size['index']:.0f} of index keys"
    )
    rows = table("memory, weights and caches", "context", "dense", "GPUs", "DSA", "GPUs")
    for row in cost["memory"]:
        rows.add_row(
            f"batch {row['batch']}", _tokens(row["context"]), _gb(row["dense"]), f"{row['gpus_dense']:.0f}", _gb(row["dsa"]),
            f"{row['gpus_dsa']:.0f}",
        )  # fmt: skip
    print_table(rows)


def _money(dollars: float) -> str:
    return f"{dollars:.3g}" if dollars < 0.01 else f"{dollars:.3f}"


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.4g} GB"


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count / 1024:.1f}K" if count >= 4096 else str(count)
