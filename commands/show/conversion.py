"""What the command line prints: tables on stdout, progress on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...optimizer.before.resources import Machine, Resources, this_machine
from ...optimizer.indexer.calibrate import LayerResult
from ...optimizer.indexers import Listener
from ...optimizer.model.text import RANDOM
from ...optimizer.plan import Plan
from ...optimizer.proof.limits import Measured
from ...optimizer.verify import Verification
from .long import show_long
from .progress import Bars
from .quality import show_text
from .tables import print_table, table


def show_plan(plan: Plan) -> None:
    """The model, its layers (equal ones together), what will be added and what it changes."""
    config = plan.indexer
    print(f"{plan.model}: {plan.model_type}, {len(plan.layers)} MLA layers, context {plan.context}")
    sizes = f"top-k {config.index_topk}, {config.index_n_heads} heads of {config.index_head_dim}"
    without = f"; without one of its own: {', '.join(plan.shared)}" if config.shared else ""
    print(f"indexer: {plan.source}, {sizes}, {plan.new_parameters / 1e6:.2f} M new parameters{without}")
    if len(set(plan.told.values())) > 1:
        for names, told in _grouped(plan.told.items()):
            print(f"  {names}: {told}")
    rows = table("layers", "heads", "q latent", "kv latent", "nope/rope/v")
    for names, dims in _grouped(plan.layers):
        rows.add_row(names, str(dims.num_heads), str(dims.q_lora_rank or "-"), str(dims.kv_lora_rank), _widths(dims))
    print_table(rows)
    counted = [(length, *plan.attention_flops(length)) for length in plan.lengths]
    ratios = ", ".join(f"{dense / sparse:.1f}x at {_length(length)}" for length, dense, sparse in counted)
    print(f"attention FLOPs of a decoded token, dense / DSA, counted: {ratios}")
    if plan.layout:
        print(f"layout: {plan.layout} ({plan.layout_reason})")
    if plan.query_forms:
        forms = {
            "identity": "the identity, if its error on the real weights allows",
            "bias": "biases (transformers only)",
        }
        print(f"query latent, which the model has none of: {', else '.join(forms[form] for form in plan.query_forms)}")
    for line in resource_lines(plan.resources, this_machine()):
        print(line)
    for miss in plan.misses:
        print(f"not dense MLA: {miss}")
    for note in plan.notes:
        print(f"note: {note}")
    for target in plan.targets:
        print(f"{target.target} {target.version}: {target}")
        for note in target.notes:
            print(f"  {note}")
        if target.loads:
            print(f"  {target.start.format(model='OUT')}")
    if plan.refusal is not None:
        print(f"no checkpoint can be written: {plan.refusal}")


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan, and what it takes `here`: the only figures in it that differ from run to run."""
    here, needed = this_machine(), plan.resources
    figures = {
        "resident": here.resident, "flops_per_second": here.rate, "peak_memory": here.peak(needed),
        "seconds": round(here.seconds(needed), 1),
    }  # fmt: skip
    return {**plan.to_json(), "here": figures}


def resource_lines(needed: Resources, here: Machine) -> list[str]:
    """What a conversion will take."""
    parts = ", ".join(f"{_gib(nbytes)} {what}" for what, nbytes in needed.memory.items())
    seconds = _duration(here.seconds(needed))
    return [
        f"sequences: {needed.sequences} of {needed.sequence_length} tokens",
        f"predicted memory: {_gib(here.peak(needed))} ({_gib(here.resident)} this process, {parts})",
        f"comparing with transformers' models: {_gib(needed.transformers)} in place of the last of these",
        f"predicted disk for hidden states: {_gib(needed.disk)}",
        f"predicted time of computing: {seconds} ({needed.flops / 1e12:.1f} TFLOP, {here.rate / 1e9:.0f} GFLOP/s measured now)",
    ]


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _grouped(layers: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Neighbours of which the same is said together: ("first .. last", what)."""
    groups: list[tuple[list[str], Any]] = []
    for name, said in layers:
        if groups and groups[-1][1] == said:
            groups[-1][0].append(name)
        else:
            groups.append(([name], said))
    return [(names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}", said) for names, said in groups]


def _widths(dims: Any) -> str:
    return f"{dims.qk_nope_head_dim}/{dims.qk_rope_head_dim}/{dims.v_head_dim}"


def show_layers(layers: Sequence[LayerResult], report: Mapping[str, Any]) -> None:
    """Recall per layer on the sequences kept for choosing the snapshot."""
    if not layers:
        return
    used = report["calibration"]
    beside = f" and {used['random_sequences']} of random tokens" if used["random_sequences"] else ""
    print(
        f"calibrated on {used['tokens']} tokens of {used['text']} ({used['sequences']} sequences of {used['sequence_length']}){beside}"
    )
    if used["text"] == RANDOM:
        print(
            "no calibration text was given: second moments of random tokens were used, and the figures below are on random tokens"
        )
    rows = table("attention mass captured, held out", "indexer", "closed form", "oracle", "window", "steps")
    for layer in layers:
        numbers = (layer.recall, layer.closed_form_recall, layer.oracle, layer.window)
        rows.add_row(layer.layers, *(f"{number:.3f}" for number in numbers), str(layer.steps))
    print_table(rows)
    for layer in layers:
        print(f"{layer.layers}: {layer.indexer}, {layer.why}")
        if layer.negative:
            print(
                f"  head weights sum below zero on {layer.negative:.2%} of the vocabulary: there the selection is turned round"
            )


def show_sharing(sharing: Mapping[str, Any] | None) -> None:
    """Which layers were chosen to share, and what that costs and saves."""
    if sharing is None:
        return
    count, layers, allowed = len(sharing["shared"]), sharing["layers"], sharing["allowed"]
    tried = ", ".join(f"{one['layers']} of them {one['loss']:+.4f}" for one in sharing["tried"]) or "no set of layers"
    if not count:
        print(f"no layer shares an indexer: more than {allowed:g} nats/token ({tried})")
        return
    print(
        f"what the last layer before selected is attended to by {', '.join(sharing['names'])}: {count} of {layers} "
        f"indexers and caches of index keys less, {sharing['loss']:+.4f} nats/token on held-out text (allowed {allowed:g}; tried {tried})"
    )


def show_verification(result: Verification, layers: bool = True) -> None:
    """Checks with their limits, then dense against DSA, oracle and window on text."""
    rows = table("check", "value", "limit", "")
    for check in result.checks:
        rows.add_row(check.name, f"{check.value:.3g}", f"{check.limit:.3g}", "ok" if check.passed else "FAILED")
    print_table(rows)
    for name in result.skipped:
        print(f"not checked: {name}")
    show_text(Measured(result.origin, result.text, result.layers), layers)
    if result.foreign is not None:
        show_text(result.foreign, layers)
    if result.long is not None:
        show_long(result.long)


def show_environment(found: Mapping[str, Any]) -> None:
    """Versions and what is usable."""
    print(f"mla2dsa {found['mla2dsa']}, Python {found['python']}, {found['machine']}")
    for name, installed in found["packages"].items():
        print(f"  {name:16} {installed or 'not installed'}")
    print("devices: " + ("; ".join(found["devices"]) or "no CUDA device"))
    print("commands:")
    for names, state in _by_state(found["commands"]):
        print(f"  {names}: {state}")
    print("beside:")
    for name, state in found["usable"].items():
        print(f"  {name}: {state}")


def _by_state(commands: Mapping[str, str]) -> list[tuple[str, str]]:
    """Commands of the same state together, in their order."""
    states = dict.fromkeys(commands.values())
    return [(", ".join(name for name in commands if commands[name] == state), state) for state in states]


def show_description(found: Mapping[str, Any], indent: str = "") -> None:
    """`inspect`'s findings, one field a line."""
    for name, content in found.items():
        if isinstance(content, Mapping) and content:
            print(f"{indent}{name}:")
            show_description(content, indent + "  ")
        elif content not in (None, [], {}):
            print(f"{indent}{name}: {', '.join(map(str, content)) if isinstance(content, list) else content}")


class Progress(Bars):
    """Bars on a terminal, one line a layer otherwise; always on stderr."""

    def listener(self) -> Listener:
        return Listener(on_plan=self._plan, on_progress=self.advance, on_step=self._step, on_layer=self._layer)

    def _plan(self, plan: Plan) -> None:
        if not self._console.is_terminal:
            return  # logs have a line a layer; `plan` says it to whoever asks
        lines = resource_lines(plan.resources, this_machine())
        self._console.print(f"plan: {', '.join(lines)}", soft_wrap=True, markup=False)

    def _step(self, layer: str, step: int, loss: float) -> None:
        if "distil" not in self._tasks:
            self._tasks["distil"] = self._bars.add_task("distilling", total=None)
        self._bars.update(self._tasks["distil"], description=f"distilling {layer}: step {step}, KL {loss:.3f}")

    def _layer(self, result: LayerResult, resumed: bool) -> None:
        line = (
            f"{result.layers}: captures {result.recall:.3f} of the attention mass (oracle {result.oracle:.3f}, window "
            f"{result.window:.3f}), {result.indexer}"
        )
        self._console.print(line + (", kept from before" if resumed else ""), soft_wrap=True, markup=False)
