"""The manager and the list of passes: order, facts, reports, what is required and what is ensured, who may watch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any, ClassVar

import families
import pytest
import torch
from handwritten import Mla, build, export
from refused_variants import Sliding3
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.passes import mla_to_dsa as rewriting
from mla2dsa.passes.add_cache import AddCache, Caches, add_cache
from mla2dsa.passes.find_mla import FindMla
from mla2dsa.passes.functionalise import Functionalised
from mla2dsa.passes.manager import (
    BrokenPass,
    MissingFact,
    Pass,
    Report,
    Step,
    Work,
    apply_passes,
    run_passes,
    watched_by,
)
from mla2dsa.passes.matching.sites import Found
from mla2dsa.passes.mla_to_dsa import MlaToDsa, Rewritten, mla_to_dsa
from mla2dsa.passes.pipeline import FIND, cached_passes, dsa_passes, tap_passes
from mla2dsa.passes.tap import Tap, Taps

CONFIG = IndexerConfig(index_topk=4, index_n_heads=4, index_head_dim=16)
SITES = families.FAMILIES["deepseek_v3"].sites
FINDING = ["normalize", "find_mla", "functionalise"]
aten, dsa = torch.ops.aten, torch.ops.mla2dsa


@pytest.fixture(scope="module")
def dense() -> ExportedProgram:
    return families.exported("deepseek_v3", "sdpa")[1]


@pytest.fixture(scope="module")
def handwritten() -> ExportedProgram:
    return export(build(Mla))


class WrittenMask(Mla):
    """An in-place write that `normalize` does not know."""

    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        seen = super().visible(mask, pos)
        seen &= mask.bool()[:, None, None]
        return seen


@dataclass(frozen=True)
class Free(Pass):
    """Does what a test gives it."""

    action: Callable[[Work], object] = lambda work: None
    after: Callable[[Work], object] = lambda work: None
    name: ClassVar[str] = "free"

    def requires(self, work: Work) -> None:
        pass

    def run(self, work: Work) -> Report:
        return Report(did=("acted",), could_not=("think (node x)",), details=("slowly",), fact=self.action(work))

    def ensures(self, work: Work) -> None:
        self.after(work)


def core_of(work: Work) -> Node:
    return next(node for node in work.editor.graph.nodes if "scaled_dot_product" in str(node.target))


# The list


@pytest.mark.parametrize(
    ("passes", "names"),
    [
        (FIND, FINDING),
        (dsa_passes(CONFIG), [*FINDING, "mla_to_dsa"]),
        (cached_passes(CONFIG, True), [*FINDING, "mla_to_dsa", "add_cache"]),
        (tap_passes(3), [*FINDING, "tap"]),
    ],
    ids=["find", "dsa", "cached", "tap"],
)
def test_the_order_of_the_passes(passes: tuple[Pass, ...], names: list[str]) -> None:
    assert [each.name for each in passes] == names


def test_a_pass_keeps_no_state() -> None:
    for each in (*cached_passes(CONFIG, True), *tap_passes(3)):
        with pytest.raises(FrozenInstanceError):
            each.name = "other"  # type: ignore[misc]


def test_one_edit_makes_the_same_program_as_one_after_the_other(dense: ExportedProgram) -> None:
    at_once = run_passes(dense, cached_passes(CONFIG, True))
    converted = mla_to_dsa(dense, CONFIG)
    stepwise = add_cache(converted.program, [change.name for change in converted.changes], last_only=True)
    once, twice = at_once.program.graph, stepwise.program.graph
    assert [str(node.target) for node in once.nodes] == [str(node.target) for node in twice.nodes]
    assert at_once.program.graph_signature.user_inputs == stepwise.program.graph_signature.user_inputs
    assert at_once.fact(Caches).specs == stepwise.caches
    assert set(at_once.program.state_dict) == set(converted.program.state_dict)


def test_what_a_run_says(dense: ExportedProgram) -> None:
    run = run_passes(dense, cached_passes(CONFIG, True))
    steps = {step.name: step for step in run.steps}
    assert steps["find_mla"].report.did == (f"2 MLA attentions found, {SITES[0]} to {SITES[1]}",)
    assert steps["mla_to_dsa"].report.did[0].startswith("2 layers rewritten")
    assert [line.split(": ")[0] for line in steps["mla_to_dsa"].report.details] == list(SITES)
    assert steps["add_cache"].report.did[0].startswith("4 caches added")
    assert not any(step.report.could_not for step in run.steps)
    sizes = [(step.nodes_before, step.nodes_after) for step in run.steps]
    assert [after for _, after in sizes[:-1]] == [before for before, _ in sizes[1:]]
    assert sizes[0][0] == len(dense.graph.nodes)
    assert sizes[-1][1] == len(run.program.graph.nodes)
    assert all(step.seconds >= 0 for step in run.steps)


@pytest.mark.parametrize(("attention", "done"), [(Mla, False), (WrittenMask, True)], ids=["clean", "written"])
def test_a_write_in_the_way_is_functionalised_and_looked_at_again(attention: type[Mla], done: bool) -> None:
    work = Work(export(build(attention)))
    steps = apply_passes(work, FIND)
    assert work.fact(Functionalised) == Functionalised(done)
    assert bool(steps[1].report.could_not) == done
    assert [site.name for site in work.fact(Found).sites] == ["self_attn"]
    assert work.fact(Found).sites[0].core.out.graph is work.editor.graph


def test_what_could_not_be_done_names_reason_and_node() -> None:
    work = Work(export(build(Sliding3)))
    (line,) = apply_passes(work, FIND)[1].report.could_not
    miss = work.fact(Found).misses[0]
    assert line == f"match self_attn: {miss.reason} (node {miss.node})"
    with pytest.raises(UserError, match="no dense MLA attention"):
        apply_passes(work, [MlaToDsa(CONFIG)])


# Facts


def test_a_fact_that_nobody_found_is_named(handwritten: ExportedProgram) -> None:
    with pytest.raises(MissingFact, match=r"^no Found was found yet: run the pass that finds it before$"):
        run_passes(handwritten, [MlaToDsa(CONFIG)])


def test_facts_of_own_passes_are_found(handwritten: ExportedProgram) -> None:
    run = run_passes(handwritten, [Free(lambda work: 3), Free(lambda work: "three"), Free()])
    assert (run.fact(int), run.fact(str)) == (3, "three")
    with pytest.raises(MissingFact, match="no Caches"):
        run.fact(Caches)


# What is required


@pytest.mark.parametrize("layers", [(), ("a",), ("a", "b", "c")], ids=len)
def test_caches_need_a_name_for_every_dsa_layer(dense: ExportedProgram, layers: tuple[str, ...]) -> None:
    program = mla_to_dsa(dense, CONFIG).program
    with pytest.raises(UserError, match=f"^{len(layers)} layers are named, but this program has 2 DSA layers$"):
        add_cache(program, layers)


def test_caches_need_input_ids(handwritten: ExportedProgram) -> None:
    with pytest.raises(UserError, match="no input called input_ids"):
        run_passes(handwritten, cached_passes(IndexerConfig(4, 2, 8), True))


def test_an_error_of_a_pass_arrives_as_it_was_raised(handwritten: ExportedProgram) -> None:
    def complain(work: Work) -> None:
        raise UserError("not this one")

    with pytest.raises(UserError, match=r"^not this one$"):
        run_passes(handwritten, [Free(complain)])


# What is ensured


def test_a_graph_that_is_not_well_formed_is_named(handwritten: ExportedProgram) -> None:
    def use_before_definition(work: Work) -> None:
        nodes = [node for node in work.editor.graph.nodes if node.op == "call_function"]
        nodes[0].args = (nodes[-1],)

    with pytest.raises(
        BrokenPass, match=r"^pass free: the graph is not well formed: .*used before it has been defined"
    ):
        run_passes(handwritten, [Free(use_before_definition)])


@dataclass(frozen=True)
class Spoilt(Pass):
    """A pass that does wrong after the real one has run."""

    inner: Pass
    spoil: Callable[[Work], object] = field(repr=False)
    name: ClassVar[str] = "spoilt"

    def requires(self, work: Work) -> None:
        self.inner.requires(work)

    def run(self, work: Work) -> Report:
        report = self.inner.run(work)
        if report.fact is not None:
            work.add(report.fact)
        self.spoil(work)
        return Report(report.did)

    def ensures(self, work: Work) -> None:
        self.inner.ensures(work)


def forget_a_site(work: Work) -> None:
    found = work.fact(Found)
    work.add(Found(found.sites[:1], found.misses))


def attend_densely(work: Work) -> None:
    """What a rewrite that forgot a layer would leave."""
    sparse = next(node for node in work.editor.graph.nodes if node.target is dsa.sparse_mla.default)
    build = work.editor.builder(before=sparse)
    query = build(aten.transpose.int, sparse.args[0], 1, 2)
    build(aten.scaled_dot_product_attention.default, query, query, query)


def share_a_selection(work: Work) -> None:
    """What a rewrite that reuses the indices of a layer where it must not would leave."""
    first, second = (node for node in work.editor.graph.nodes if node.target is dsa.lightning_indexer.default)
    second.replace_all_uses_with(first)
    work.editor.graph.erase_node(second)


def lose_a_change(work: Work) -> None:
    done = work.fact(Rewritten)
    work.add(Rewritten(done.changes[:1], done.nodes_removed, done.added))


def read_past_the_cache(work: Work) -> None:
    sparse = next(node for node in work.editor.graph.nodes if node.target is dsa.sparse_mla.default)
    write = sparse.all_input_nodes[1]
    sparse.replace_input_with(write, write.all_input_nodes[1])


def ask_for_a_mask(work: Work) -> None:
    work.editor.add_input("mask", (2, 7), torch.int64).name = "attention_mask"


def lose_the_outputs(work: Work) -> None:
    work.editor.output.args = ((work.editor.first_user_input,),)


DSA = MlaToDsa(CONFIG)
BROKEN = [
    (FIND[:1], FindMla(), forget_a_site, "an attention is neither matched nor missed"),
    (FIND, DSA, attend_densely, "dense attention is left, expected 0"),
    (FIND, DSA, share_a_selection, "1 of 2 layers select keys"),
    (FIND, DSA, lose_a_change, "layers got lost: 2 sites, 1 changes, 2 sparse attentions"),
    ((*FIND, DSA), AddCache(), read_past_the_cache, "a DSA op reads no cache, or one that is not given out"),
    ((*FIND, DSA), AddCache(), ask_for_a_mask, "the attention mask is still an input"),
    (FIND, Tap(3), lose_the_outputs, "is not given out"),
]


@pytest.mark.parametrize(
    ("before", "inner", "spoil", "message"), BROKEN, ids=[spoil.__name__ for _, _, spoil, _ in BROKEN]
)
def test_a_broken_promise_is_named_with_its_node(
    dense: ExportedProgram, before: tuple[Pass, ...], inner: Pass, spoil: Callable[[Work], object], message: str
) -> None:
    work = Work(dense)
    apply_passes(work, before)
    with pytest.raises(BrokenPass, match=rf"^pass {inner.name}: .*{message}.* \(node [\w, ]+\)$"):
        apply_passes(work, [Spoilt(inner, spoil)])


def test_an_output_may_be_another_node(handwritten: ExportedProgram) -> None:
    """The signature follows; the verifier would complain otherwise."""

    def double(work: Work) -> None:
        (result,) = work.editor.output.all_input_nodes
        doubled = work.editor.builder(before=work.editor.output)(aten.mul.Tensor, result, 2)
        work.editor.output.replace_input_with(result, doubled)

    program = run_passes(handwritten, [Free(double)]).program
    (name,) = program.graph_signature.user_outputs
    assert name != handwritten.graph_signature.user_outputs[0]
    assert [node.name for node in program.graph.output_node().all_input_nodes] == [name]


# Who is told


class Seen:
    """A watcher that takes notes."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str, int]] = []

    def before(self, name: str, module: GraphModule) -> None:
        self.notes.append(("before", name, len(module.graph.nodes)))

    def after(self, step: Step, module: GraphModule) -> None:
        self.notes.append(("after", step.name, len(module.graph.nodes)))


def test_a_watcher_sees_every_pass_inside_of_its_block(dense: ExportedProgram) -> None:
    seen = Seen()
    with watched_by(seen):
        run = run_passes(dense, tap_passes(3))
    apply_passes(Work(dense), FIND)
    expected = [
        note for s in run.steps for note in (("before", s.name, s.nodes_before), ("after", s.name, s.nodes_after))
    ]
    assert seen.notes == expected
    assert set(run.fact(Taps).nodes) >= {f"{site}.hidden" for site in SITES}


def test_a_pass_that_fails_was_seen_before_it_ran(handwritten: ExportedProgram) -> None:
    seen = Seen()
    with pytest.raises(MissingFact), watched_by(seen):
        run_passes(handwritten, [MlaToDsa(CONFIG)])
    assert [note[:2] for note in seen.notes] == [("before", "mla_to_dsa")]


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.name, record.getMessage()))


@pytest.fixture
def log() -> Iterator[Callable[[int], Lines]]:
    logger, lines = logging.getLogger("mla2dsa"), Lines()
    level = logger.level

    def at(chosen: int) -> Lines:
        logger.setLevel(chosen)
        return lines

    logger.addHandler(lines)
    yield at
    logger.removeHandler(lines)
    logger.setLevel(level)


INFO = [("INFO", "acted"), ("INFO", "could not: think (node x)")]


@pytest.mark.parametrize(
    ("level", "expected"),
    [(logging.WARNING, []), (logging.INFO, INFO), (logging.DEBUG, [*INFO, ("DEBUG", "slowly")])],
    ids=["quiet", "info", "debug"],
)
def test_passes_log_under_their_names(
    handwritten: ExportedProgram, log: Callable[[int], Lines], level: int, expected: list[Any]
) -> None:
    lines = log(level)
    run_passes(handwritten, [Free()])
    assert {name for _, name, _ in lines.lines} <= {"mla2dsa.passes.free"}
    said = [(kind, text) for kind, _, text in lines.lines if " nodes" not in text]
    assert said == expected
    assert len([text for _, _, text in lines.lines if " nodes before, " in text]) == bool(expected)


def test_weights_are_not_logged(dense: ExportedProgram, log: Callable[[int], Lines]) -> None:
    lines = log(logging.DEBUG)
    given = {site: families.indexer_weights(CONFIG, 64, 48, seed=1) for site in SITES}
    rewriting.mla_to_dsa(dense, CONFIG, given)
    settings = [text for _, name, text in lines.lines if name.endswith(".mla_to_dsa") and "MlaToDsa(" in text]
    assert len(settings) == 1
    assert "tensor" not in settings[0]
    assert len(settings[0]) < 300
