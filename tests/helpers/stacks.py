"""ONNX models made by hand: layers of nothing but the DSA ops, at a real model's widths, with cheap ops between."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import onnx
from onnx import TensorProto, helper

from mla2dsa.exporters.onnx_model.nodes import DOMAIN, VERSION

HEADS, RANK, ROPE, INDEX_HEADS, INDEX_DIM, TOPK = 128, 512, 64, 64, 128, 2048
BF16, I64, I32 = TensorProto.BFLOAT16, TensorProto.INT64, TensorProto.INT32


def attention_stack(layers: int, shared: Collection[int] = ()) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """The model, and its inputs as an export's manifest lists them. Weightless: what a layer reads is what the last one made.

    shared: layers that attend to what the last one before them selected.
    """
    batch, seq, length = "batch", "seq", "cache_length"
    inputs: list[dict[str, Any]] = [
        {"name": "q", "dtype": BF16, "shape": [batch, seq, HEADS, RANK + ROPE]},
        {"name": "index_q", "dtype": BF16, "shape": [batch, seq, INDEX_HEADS, INDEX_DIM]},
        {"name": "weights", "dtype": BF16, "shape": [batch, seq, INDEX_HEADS]},
        {"name": "latent", "dtype": BF16, "shape": [batch, seq, RANK + ROPE]},
        {"name": "index_key", "dtype": BF16, "shape": [batch, seq, INDEX_DIM]},
        *({"name": name, "dtype": I64, "shape": [batch, seq]} for name in ("slots", "begin", "end")),
    ]
    nodes, values, outputs = [], [], []

    def ours(op: str, name: str, of: list[str], to: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(op, of, [to], name=name, domain=DOMAIN, plugin_namespace=DOMAIN, **attributes))

    def value(name: str, kind: int, *shape: int | str) -> None:
        values.append(helper.make_tensor_value_info(name, kind, shape))

    q, indices = "q", ""
    for layer in range(layers):
        caches = (("past_latent", "latent", RANK + ROPE), ("past_key", "index_key", INDEX_DIM))
        for cache, new, width in caches[:1] if layer in shared else caches:
            inputs.append({"name": f"{cache}_{layer}", "dtype": BF16, "shape": [batch, length, width]})
            present = f"present_{new}_{layer}"
            ours("CacheWrite", f"layers.{layer}/CacheWrite_{new}", [f"{cache}_{layer}", new, "slots"], present)
            outputs.append(helper.make_tensor_value_info(present, BF16, [batch, length, width]))
        if layer not in shared:
            of, indices = ["index_q", f"present_index_key_{layer}", "weights", "begin", "end"], f"indices_{layer}"
            ours("LightningIndexer", f"layers.{layer}/LightningIndexer", of, indices, topk=TOPK)
            value(indices, I32, batch, seq, "keys")
        of = [q, f"present_latent_{layer}", indices]
        ours("SparseMLA", f"layers.{layer}/SparseMLA", of, f"out_{layer}", scale=192**-0.5, kv_lora_rank=RANK)
        value(f"out_{layer}", BF16, batch, seq, HEADS, RANK)
        nodes.append(helper.make_node("Pad", [f"out_{layer}", "pads"], [f"wide_{layer}"], name=f"layers.{layer}/Pad"))
        value(f"wide_{layer}", BF16, batch, seq, HEADS, RANK + ROPE)
        nodes.append(helper.make_node("Add", [f"wide_{layer}", q], [f"q_{layer}"], name=f"layers.{layer}/Add"))
        value(f"q_{layer}", BF16, batch, seq, HEADS, RANK + ROPE)
        q = f"q_{layer}"
    outputs.append(helper.make_tensor_value_info(q, BF16, [batch, seq, HEADS, RANK + ROPE]))
    values = [value for value in values if value.name != q]
    pads = helper.make_tensor("pads", I64, [8], [0] * 7 + [ROPE])
    declared = [helper.make_tensor_value_info(entry["name"], entry["dtype"], entry["shape"]) for entry in inputs]
    graph = helper.make_graph(nodes, "stack", declared, outputs, [pads], value_info=values)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), inputs
