"""Sessions with caches against the same selections without; and the tasks through the command line."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import dense_checkpoint
from command_line import SMALL_TOPK, TINY, assert_refused, captured_once, mla2dsa, small_conversion  # noqa: F401
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.optimizer.model import free_memory
from mla2dsa.optimizer.model.text import load_tokenizer, read_tokens
from mla2dsa.optimizer.proof.evaluate import program_inputs
from mla2dsa.optimizer.proof.pair import open_pair
from mla2dsa.optimizer.proof.tasks.selections import VARIANTS
from mla2dsa.optimizer.proof.tasks.sessions import Variants
from mla2dsa.runtime.generation import prefill

LENGTH = 190
QUICK = ("--sequences", 1, "--sequence-length", 64, "--skip-transformers")
LONG = ("--long", "--lengths", 256, "--depths", "50", "--samples", 1, "--tasks", "single,variables", "--style", "code")

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def folder(captured_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return small_conversion(tmp_path_factory)


@pytest.fixture(scope="module")
def variants(folder: Path) -> Variants:
    return Variants(folder)


def fed(variants: Variants, variant: str, rows: list[Tensor]) -> Tensor:
    """Logits after rows of different lengths, prefilled together and then token by token."""
    session = variants.session(variant, len(rows), LENGTH)
    lengths = torch.tensor([len(ids) for ids in rows])
    prefill(session, [ids[:-2].tolist() for ids in rows], int(lengths.max()) - 2)
    zero = torch.zeros(len(rows), dtype=torch.int64)
    for back in (2, 1):
        at = (lengths - back)[:, None]
        logits = session.step(torch.stack([ids[-back] for ids in rows])[:, None], at, at, zero, zero)
    return logits


def test_a_session_chooses_as_the_program_without_caches_does(
    folder: Path, variants: Variants, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself, or with the oracle's keys, a window's or all of them; in tiles of queries, too."""
    ids = read_tokens(TINY / "held_out", load_tokenizer(TINY)).ids[:LENGTH]
    pair = open_pair(TINY, folder)
    dense, runners = pair.runners()
    monkeypatch.setattr("mla2dsa.optimizer.proof.baselines.QUERY_ROWS", 50)
    rows = [ids, ids[:150]]
    assert variants.index_topk == SMALL_TOPK
    seen = []
    for variant in VARIANTS:
        runner = dense if variant == "dense" else runners[variant]
        wanted = torch.stack([next(runner.outputs_of([program_inputs(row)]))[0][0, -1] for row in rows])
        found = fed(variants, variant, rows)
        assert float((found - wanted).abs().max()) < 1e-3
        seen.append(found)
    assert all(float((one - two).abs().max()) > 0.05 for one, two in pairwise(seen))


def test_weights_are_in_memory_once(variants: Variants, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = list[str](), variants._load
    monkeypatch.setattr(variants, "_held", {})
    monkeypatch.setattr(variants, "_load", lambda name: loaded.append(name) or load(name))
    for variant in ("dense", "dsa"):
        fed(variants, variant, [torch.arange(40)])
    assert loaded
    assert len(loaded) == len(set(loaded))


def test_a_model_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "free_memory", lambda: 1 << 20)
    with pytest.raises(UserError, match=r"the weights take \d+\.\d MiB in float32, 1\.0 MiB are free on cpu"):
        Variants(folder)


def test_verify_long(folder: Path) -> None:
    """Limits that no model misses and limits that all do, and one that says what the scores say."""
    gates = ("--gate", "needle=2", "--gate", "long-logprob=50", "--gate", "single-logprob=-50")
    done = mla2dsa("verify", TINY, folder, *QUICK, *LONG, *gates, "--json")
    result = done.json()
    held = {check["name"].split(" at ")[0]: check for check in result["checks"] if " at 256 tokens" in check["name"]}
    assert done.code == 1
    assert (held["long-logprob"]["passed"], held["single-logprob"]["passed"]) == (True, False)
    found = result["long"]
    dense, dsa = (
        next(s["accuracy"] for s in found["scores"] if (s["variant"], s["task"]) == (variant, "single"))
        for variant in ("dense", "dsa")
    )
    assert held["needle"]["value"] == dense - dsa
    assert held["needle"]["passed"] is (dense > 2 and dense - dsa <= 2)
    assert {score["variant"] for score in found["scores"]} == set(VARIANTS)
    assert {(score["task"], score["depth"]) for score in found["scores"]} == {("single", 50), ("variables", None)}
    assert all(score["logprob"] < 0 for score in found["scores"])
    assert (found["settings"]["lengths"], found["settings"]["seed"]) == ([256], 0)


def test_the_tables_of_verify_long(folder: Path) -> None:
    flags = ("--long", "--lengths", 200, "--depths", "0,100", "--samples", 1, "--tasks", "single", "--style", "code")
    done = mla2dsa("verify", TINY, folder, *QUICK, *flags, "--haystack", TINY / "corpus.py", "--batch", 2)
    assert (done.code, done.err) == (0, "")
    for part in (
        "long-context tasks, 1 prompts each, seed 0",
        "corpus.py; index_topk 32",
        "100% of the text before it",
    ):
        assert part in done.out


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--lengths", "4k"], 2, ["--lengths is of the long-context tasks", "--long"]),
        (["--long", "--lengths", "4k"], 2, ["--lengths 4096", "index_topk 32", "context of 1024"]),
        (["--long", "--lengths", "x"], 2, ["--lengths x", "4k,8k"]),
        (["--long", "--tasks", "x"], 2, ["--tasks x", "single"]),
        (["--long", "--haystack", "/nowhere"], 1, ["/nowhere", "no such file or folder"]),
        (["--gate", "needle=2"], 2, ["--gate needle=2", "no such figure"]),
    ],
    ids=["no-long", "too-long", "no-number", "no-task", "no-text", "gate-without"],
)
def test_bad_flags(flags: list[object], code: int, parts: list[str], folder: Path) -> None:
    assert_refused(mla2dsa("verify", TINY, folder, *QUICK, *flags), code, *parts)


def test_a_dense_checkpoint_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="a dense checkpoint"):
        Variants(dense_checkpoint("single", tmp_path_factory))
