"""Part of constants.py: how far the limits of the verification are from good conversions, and from the nearest faults."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from constants_fits import CLOSED, DISTILLED, FEWER_HEADS, TOPK, Bench, Indexers, Setting, overridden
from safetensors.torch import load_file, save_file
from tiny_text import TINY
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer import verify
from mla2dsa.optimizer.indexer import site_maps
from mla2dsa.optimizer.indexer.indexer_math import random_indexer
from mla2dsa.optimizer.indexer.samples import SiteMaps
from mla2dsa.optimizer.proof import baselines
from mla2dsa.passes.mla_to_dsa import mla_to_dsa

SHARD, A_WEIGHT = "model-dense.safetensors", "model.layers.1.self_attn.kv_b_proj.weight"
LATENT_NORM = "kv_a_layernorm.weight"
LAST = "model.layers.3.self_attn"
LIMITS = {
    "verify.GRAPH_TOLERANCE": "dense = DSA up to index_topk (graph)",
    "verify.TRANSFORMERS_TOLERANCE": "graph = DeepseekV32ForCausalLM above index_topk",
    "verify.TRANSFORMERS_TOLERANCE (keys)": "keys selected = DeepseekV32ForCausalLM's, up to rounding",
    "Verify.max_loss_delta": "loss increase on text, nats/token",
}


def last_bit(folder: Path, rows: int, columns: int) -> None:
    """The top left of one dense matrix off by the last bit of bfloat16; the shard is a copy, never the linked file."""
    tensors = load_file(folder / SHARD)
    tensors[A_WEIGHT].view(torch.int16)[:rows, :columns] += 1
    (folder / SHARD).unlink()
    save_file(tensors, folder / SHARD, {"format": "pt"})


def config_entry(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def theta(config: dict[str, Any], factor: float) -> None:
    config["rope_parameters"]["rope_theta"] *= factor


def epsilon(config: dict[str, Any], factor: float) -> None:
    config["rms_norm_eps"] *= factor


FILE_FAULTS: dict[str, Callable[[Path], None]] = {
    "one dense weight off by its last bit": partial(last_bit, rows=1, columns=1),
    "one row of a dense matrix off by the last bit": partial(last_bit, rows=1, columns=1 << 20),
    "a dense matrix off by the last bit": partial(last_bit, rows=1 << 20, columns=1 << 20),
    "rope_theta 0.1% larger in config.json": partial(config_entry, change=partial(theta, factor=1.001)),
    "rms_norm_eps doubled in config.json": partial(config_entry, change=partial(epsilon, factor=2.0)),
    "rms_norm_eps 1e-5 in config.json": partial(config_entry, change=partial(epsilon, factor=10.0)),
}


def untrained(indexers: Indexers, layer: int, config: IndexerConfig) -> Indexers:
    name = f"model.layers.{layer}.self_attn"
    like = indexers[name]
    return indexers | {name: random_indexer(config, like.wk.shape[1], like.wq_b.shape[1])}


def altered(indexers: Indexers, layers: str, **change: Callable[[Tensor], Tensor]) -> Indexers:
    def of(weights: IndexerWeights) -> IndexerWeights:
        return replace(weights, **{name: edit(getattr(weights, name)) for name, edit in change.items()})

    return {name: of(weights) if layers in name else weights for name, weights in indexers.items()}


def interleaved(rows: Tensor) -> Tensor:
    """16 rotary rows in the order of the dense model's projections: the mistake that is easiest to make."""
    rows = rows.clone()
    rows[:16] = rows[:16].view(2, 8, *rows.shape[1:]).transpose(0, 1).reshape(16, *rows.shape[1:])
    return rows


def indexer_faults(good: Indexers, config: IndexerConfig) -> dict[str, Indexers]:
    first, second = "model.layers.1.self_attn", "model.layers.2.self_attn"
    return {
        **{f"untrained indexer in layer {n}": untrained(good, n, config) for n in range(len(good))},
        "indexers of layers 1 and 2 exchanged": good | {first: good[second], second: good[first]},
        "head weights of layer 3 negated": altered(good, LAST, weights_proj=torch.neg),
        "rotary rows of wk interleaved": altered(good, "", wk=interleaved),
        "k_norm's bias left out": altered(good, "", k_norm_bias=torch.zeros_like),
        "k_norm's gain left out": altered(good, "", k_norm_weight=torch.ones_like),
        "heads of wq_b in reverse": altered(
            good, "", wq_b=lambda w: w.view(config.index_n_heads, -1, w.shape[-1]).flip(0).flatten(0, 1)
        ),
    }


@dataclass(frozen=True)
class Case:
    label: str
    good: bool
    checks: dict[str, float]
    refused: bool


def write(out: Path, indexers: Indexers, setting: Setting, topk: int = TOPK) -> Path:
    config = IndexerConfig(topk, setting.heads, setting.width)
    return write_dsa_checkpoint(TINY, out, indexers, config, manifest={})


def verified(label: str, good: bool, pair: verify.Pair, bench: Bench, skip_transformers: bool) -> Case:
    print(label, file=sys.stderr, flush=True)
    result = verify.verify(pair, bench.held_out, "held out", verify.Verify().max_loss_delta, skip_transformers)
    return Case(label, good, {check.name: check.value for check in result.checks}, not result.passed)


def cases(bench: Bench, work: Path) -> Iterator[Case]:
    """Every good conversion, then every fault."""
    captured = bench.prepared.capture
    opened = partial(verify.open_pair, TINY, captured=captured)
    for number, setting in enumerate((*CLOSED, *FEWER_HEADS, replace(CLOSED[1], sequences=1), *DISTILLED)):
        folder = write(work / f"good-{number}", bench.usual(setting, 0)[0], setting)
        yield verified(str(setting), True, opened(folder), bench, skip_transformers=False)
    good = work / "good-1"
    for label, change in FILE_FAULTS.items():
        folder = Path(shutil.copytree(good, work / "fault", copy_function=link_or_copy))
        change(folder)
        yield verified(label, False, opened(folder), bench, skip_transformers=False)
        shutil.rmtree(folder)
    pair = opened(good)
    other = mla_to_dsa(captured.program, replace(pair.config, rope_interleave=True))
    yield verified("indexer rotated interleaved", False, replace(pair, converted=other), bench, skip_transformers=False)
    for label, indexers in indexer_faults(bench.usual(CLOSED[1], 0)[0], pair.config).items():
        folder = write(work / "fault", indexers, CLOSED[1])
        yield verified(label, False, opened(folder), bench, skip_transformers=True)
        shutil.rmtree(folder)


def link_or_copy(source: str, target: str) -> None:
    """Weights are linked, as write_dsa_checkpoint does; a fault in them replaces the link."""
    if source.endswith(".safetensors"):
        Path(target).hardlink_to(source)
    else:
        shutil.copy(source, target)


def limits(bench: Bench, work: Path) -> Iterator[str]:
    found = list(cases(bench, work))
    limit_of = {
        "verify.GRAPH_TOLERANCE": verify.GRAPH_TOLERANCE,
        "verify.TRANSFORMERS_TOLERANCE": verify.TRANSFORMERS_TOLERANCE,
        "verify.TRANSFORMERS_TOLERANCE (keys)": verify.TRANSFORMERS_TOLERANCE,
        "Verify.max_loss_delta": verify.Verify().max_loss_delta,
    }
    for constant, check in LIMITS.items():
        yield f"\n{constant} {limit_of[constant]:g}: {check}"
        looked = sorted((c for c in found if check in c.checks), key=lambda c: c.checks[check])
        worst = max(case.checks[check] for case in looked if case.good)
        seen = [case for case in looked if not case.good and case.checks[check] > limit_of[constant]]
        for case in looked:
            kind = "good " if case.good else "FAULT"
            mark = "over the limit" if case.checks[check] > limit_of[constant] else ""
            yield f"  {kind} {case.checks[check]:10.3g}  {case.label:66} {mark}".rstrip()
        nearest = f"{seen[0].checks[check] / limit_of[constant]:.3g}" if seen else "-"
        yield f"  limit / worst good: {limit_of[constant] / worst if worst else torch.inf:.3g}; nearest fault over it / limit: {nearest}"
    passing = [case.label for case in found if not case.good and not case.refused]
    yield f"\nfaults that pass every check made of them: {'; '.join(passing) or 'none'}"


def lengths(bench: Bench, work: Path) -> Iterator[str]:
    """verify.SHORT at index_topk 512, where it is what limits, and verify.PARITY_SEQUENCES."""
    indexers, _ = bench.usual(CLOSED[0], 0)
    good = write(work / "good-long", indexers, CLOSED[0], topk=512)
    bad = Path(shutil.copytree(good, work / "fault-long", copy_function=link_or_copy))
    last_bit(bad, 1, 1)
    pairs = [verify.open_pair(TINY, folder, captured=bench.prepared.capture) for folder in (good, bad)]
    yield f"\nverify.SHORT (index_topk 512): {'tokens':>8} {'good':>10} {'one bit off':>12} {'seconds':>8}"
    for value in (16, 64, 256, 512):
        with overridden(verify, "SHORT", value):
            start = time.process_time()
            good_gap, bad_gap = (verify._exactness(pair, bench.held_out).value for pair in pairs)
            seconds = (time.process_time() - start) / 2
        yield f"  {'>' if value == verify.SHORT else ' '} {value:35d} {good_gap:10.3g} {bad_gap:12.3g} {seconds:8.2f}"
    yield f"\nverify.PARITY_SEQUENCES: {'sequences':>10} {'logits':>10} {'keys':>10} {'seconds':>8}"
    for value in (1, 2, 4):
        with overridden(verify, "PARITY_SEQUENCES", value):
            start = time.process_time()
            *_, logits, keys = verify._against_transformers(pairs[0], bench.held_out)
            seconds = time.process_time() - start
        mark = ">" if value == verify.PARITY_SEQUENCES else " "
        yield f"  {mark} {value:31d} {logits.value:10.3g} {keys.value:10.3g} {seconds:8.2f}"


def proof_size(bench: Bench, most: int = 32) -> Iterator[str]:
    """Verify.sequences: how sure the loss increase is. Positions of a sequence are not independent, so by sequence."""
    many = bench.with_held_out(most)
    loss, _, _ = many.on_texts(IndexerConfig(TOPK, CLOSED[1].heads, CLOSED[1].width), bench.usual(CLOSED[1], 0)[0])
    yield f"\nVerify.sequences, loss increase {float(loss.mean()):+.4f} over {len(loss)}: {'sequences':>10} {'s.e.':>8}"
    for value in (2, 4, 8, 16, 32):
        mark = ">" if value == verify.Verify().sequences else " "
        yield f"  {mark} {value:51d} {float(loss.std()) / value**0.5:8.4f}"


def sinks(bench: Bench) -> Iterator[str]:
    yield f"\nindexer/indexer_math.SINKS: {'sinks':>6} {'loss+':>8} {'KL':>8} {'KL foreign':>11}"
    for value in (0, 1, 2, 4, 8, 16):
        with overridden(baselines, "SINKS", value):
            result = bench.baseline("window")
        mark = ">" if value == baselines.SINKS else " "
        means = (float(x.mean()) for x in (result.loss, result.kl, result.foreign))
        yield "  {} {:25d} {:+8.4f} {:8.4f} {:11.4f}".format(mark, value, *means)


def map_faults(maps: SiteMaps) -> dict[str, SiteMaps]:
    gain = maps.latent_gain.clone()
    gain[0] *= 1.01
    turned = maps.k_rope.clone()
    turned[[0, 1]] = turned[[1, 0]]
    last = maps.latent.clone()
    last[0] = (last[0].bfloat16().view(torch.int16) + 1).view(torch.bfloat16).float()
    return {
        "a gain 1% off": replace(maps, latent_gain=gain),
        "two rotary channels exchanged": replace(maps, k_rope=turned),
        "two heads exchanged": replace(maps, q_absorbed=maps.q_absorbed[[1, 0, *range(2, len(maps.q_absorbed))]]),
        "a latent row off by the last bit": replace(maps, latent=last),
    }


def accepted(bench: Bench, fault: str | None) -> int:
    """Of how many layers the maps, or maps with that fault, are taken for the model's."""
    count = 0
    for layer in bench.layers(0):
        given = map_faults(layer.maps)[fault] if fault else layer.maps
        try:
            site_maps.check_maps(layer.site, given, layer.held_out[0])
            count += 1
        except UserError:
            pass
    return count


def maps(bench: Bench) -> Iterator[str]:
    """indexer/site_maps: what check_maps lets through."""
    faults = list(map_faults(bench.layers(0)[0].maps))
    for name, values in (("TOLERANCE", (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)), ("CHECKED_ROWS", (1, 2, 4, 16))):
        yield f"\nindexer/site_maps.{name}: layers accepted, of {len(bench.layers(0))}"
        yield f"{'':10} {'good':>6}  " + "  ".join(faults)
        for value in values:
            mark = ">" if value == getattr(site_maps, name) else " "
            with overridden(site_maps, name, value):
                counts = [accepted(bench, fault) for fault in faults]
                yield f"  {mark} {value:6g} {accepted(bench, None):6d}  " + "  ".join(
                    f"{count:{len(fault)}d}" for count, fault in zip(counts, faults, strict=True)
                )


def unit(bench: Bench) -> Iterator[str]:
    """indexer/site_maps._UNIT: error of the gain that is read off the latent norm by running it."""
    load = bench.prepared.checkpoint.load
    yield "\nindexer/site_maps._UNIT: largest relative error of the latent norm's gain"
    for value in (1e-1, 1e0, 1e1, 1e2, 1e4, 1e6):
        errors = []
        for layer in bench.layers(0):
            true = load(f"{layer.name}.{LATENT_NORM}", torch.float32)
            with overridden(site_maps, "_UNIT", value), overridden(site_maps, "TOLERANCE", 1.0):
                errors.append(((layer.read().latent_gain - true) / true).abs().max())
        yield f"  {'>' if value == site_maps._UNIT else ' '} {value:6g} {float(max(errors)):10.2e}"
