"""The cost of DeepSeek-V3 by position, computed beside published: the tables of docs/cost.md.

    python benchmarks/cost.py          # writes the tables into docs/cost.md
    python benchmarks/cost.py --json   # prints the rows

Published: the chart of DeepSeek-V3.2-Exp's release (V3.1-Terminus against V3.2-Exp, H800 at 2 dollars an hour), read off its pixels to 3 %.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.cost.gpus import data, gpu_of
from mla2dsa.optimizer.cost.roofline import ModelShape, Roofline
from mla2dsa.passes.matching.sites import MlaDims

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cost.md"
BEGIN, END = "<!-- benchmarks/cost.py writes from here -->", "<!-- to here -->"
# position: dollars per million tokens, prefill dense and DSA, decode dense and DSA
PUBLISHED = {
    4096: (0.071, 0.084, 0.14, 0.150),
    8192: (0.091, 0.102, 0.204, 0.152),
    16384: (0.130, 0.108, 0.334, 0.154),
    32768: (0.208, 0.118, 0.600, 0.171),
    65536: (0.361, 0.141, 1.12, 0.195),
    131072: (0.665, 0.187, 2.15, 0.245),
}
PUBLISHED_CROSSOVER = {"prefill": 10_500, "decode": 4_900}
# 61 layers; 671 billion parameters in FP8, 37 billion for a token, without the embedding: arXiv 2412.19437
DEEPSEEK_V3 = ModelShape(
    (MlaDims(7168, 128, 1536, 512, 128, 64, 128),) * 61, IndexerConfig(2048, 64, 128), 36.6e9, 671e9, 61 * 13.96e6
)  # fmt: skip


def deepseek_v3() -> Roofline:
    """As in the chart."""
    return Roofline(DEEPSEEK_V3, gpu_of("h800"), price=2.0, speculative=True)


def computed(model: Roofline, position: int) -> tuple[float, ...]:
    """In the order of PUBLISHED."""
    costs = (cost(position, sparse) for cost in (model.prefill, model.decode) for sparse in (False, True))
    return tuple(model.dollars(seconds) for seconds in costs)


def tables() -> str:
    """Markdown."""
    model = deepseek_v3()
    lines = [
        "| position | prefill dense | published | prefill DSA | published | decode dense | published | decode DSA | published |",
        "|---|" + "---|" * 8,
    ]
    for position, published in PUBLISHED.items():
        pairs = zip(computed(model, position), published, strict=True)
        lines.append(f"| {position // 1024}K | {' | '.join(f'{ours:.3f} | {theirs:.3f}' for ours, theirs in pairs)} |")
    lines += ["", "| | computed | published |", "|---|---|---|"]
    for name, cost in (("prefill", model.prefill), ("decode", model.decode)):
        crossed = model.crossover(cost) or 0
        lines.append(
            f"| {name}: DSA is cheaper from | {crossed / 1000:.1f}K | {PUBLISHED_CROSSOVER[name] / 1000:.1f}K |"
        )
        last, at = max(PUBLISHED), 0 if name == "prefill" else 2
        theirs = PUBLISHED[last][at] / PUBLISHED[last][at + 1]
        lines.append(f"| {name}: dense / DSA at 128K | {cost(last, False) / cost(last, True):.1f}x | {theirs:.1f}x |")
    return "\n".join([*lines, "", *sources()])


def sources() -> list[str]:
    """Of the data file, as Markdown."""
    lines = ["| GPU | bf16 TFLOP/s | fp8 TFLOP/s | GB/s | GB | source |", "|---|" + "---|" * 5]
    for name, one in data()["gpus"].items():
        fp8 = f"{one['fp8'] / 1e12:g}" if one["fp8"] else "-"
        sizes = f"{one['bf16'] / 1e12:g} | {fp8} | {one['bandwidth'] / 1e9:g} | {one['memory'] / 1e9:g}"
        lines.append(f"| {name} | {sizes} | {one['source']} |")
    lines += ["", "| figure | value | what | source |", "|---|---|---|---|"]
    for name, share in data()["shares"].items():
        lines.append(f"| {name} | {share['value']:g} | {share['what']} | {share['source']} |")
    selection, steps = data()["selection"], data()["speculation"]
    lines.append(f"| selection | {selection['seconds'] * 1e6:g} us | {selection['what']} | {selection['source']} |")
    lines.append(f"| speculation | {steps['queries']} for {steps['tokens']} | {steps['what']} | {steps['source']} |")
    return lines


def page(text: str) -> str:
    """docs/cost.md with the tables in it."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, write nothing")
    if parser.parse_args().json:
        print(json.dumps({position: computed(deepseek_v3(), position) for position in PUBLISHED}))
        return
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
