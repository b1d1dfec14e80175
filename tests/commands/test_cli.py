"""The command line itself: what goes to stdout and stderr, exit codes, flags and recipes, one line for every mistake."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents, dense_checkpoint
from command_line import (
    LAYERS,
    SMALL_TOPK,
    TINY,
    Done,
    assert_refused,
    mla2dsa,
    quick_capture,  # noqa: F401  (a fixture)
    small_conversion,
    small_flags,
    training_text,
)
from saved import saved

from mla2dsa.errors import UserError
from mla2dsa.files.finite import finite
from mla2dsa.optimizer.recipe import Recipe, read_recipe

pytestmark = pytest.mark.usefixtures("quick_capture")

EVERYTHING = """
indexer: distil
budget: 10m
random_share: 0.5
index_topk: 48
index_n_heads: 4
index_head_dim: 64
calibration: corpus.txt
tokens: 4096
sequence_length: 256
rows: 32
seed: 7
distil: {steps: 12, lr: 0.001}
verify: {max_loss_delta: 0.5, sequences: 3}
layout: own
mtp: drop
untie: true
target: [transformers]
layers: {"*.1.*": {distil: {steps: 5}}}
share: [2]
share_loss: 0.01
"""


def throw(error: BaseException) -> Callable[..., Any]:
    def action(*_: object, **__: object) -> None:
        raise error

    return action


# Output


def test_plan_says_what_will_happen() -> None:
    done = mla2dsa("plan", TINY, "--index-topk", 64)
    assert (done.code, done.err) == (0, "")
    for part in ("deepseek_v3, 4 MLA layers, context 1024", "top-k 64, 8 heads of 128", f"{LAYERS[0]} .. {LAYERS[3]}"):
        assert part in done.out
    assert "no checkpoint can be written" not in done.out


@pytest.mark.parametrize("context", [1024, 640])
def test_plan_counts_flops_at_lengths_that_fit(context: int, tmp_path: Path, copy: Callable[[int], Path]) -> None:
    done = mla2dsa("plan", copy(context), "--index-topk", 64, "--json")
    counted = done.json()["decode_attention_flops"]
    assert [int(length) for length in counted] == [context // 16, context // 4, context]
    heads, latent, rope = 8, 64, 16
    dense = 4 * 2 * heads * (2 * latent + rope) * context
    sparse = dense * 64 // context + 4 * 2 * 8 * 128 * context
    assert counted[str(context)] == {"dense": dense, "dsa": sparse}
    line = "1.1x at 1K" if context == 1024 else "1.0x at 640"
    assert line in mla2dsa("plan", copy(context), "--index-topk", 64).out


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[int], Path]:
    """The example with another context; its weights do not depend on it."""

    def make(context: int) -> Path:
        folder = tmp_path / str(context)
        folder.mkdir(exist_ok=True)
        if not (folder / "model.safetensors").exists():
            (folder / "model.safetensors").symlink_to(TINY / "model.safetensors")
        config = json.loads((TINY / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
        return folder

    return make


def test_json_is_one_object_from_every_command(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`Done.json` fails on anything before or after the object."""
    dsa = small_conversion(tmp_path_factory)
    converted = Done(0, (dsa.parent / "stdout.json").read_text(), "").json()
    assert converted == json.loads((dsa / "report.json").read_text())
    assert mla2dsa("plan", TINY, "--index-topk", 64, "--json").json()["model_type"] == "deepseek_v3"
    dry = mla2dsa("convert", TINY, tmp_path / "x", *small_flags(tmp_path_factory), "--dry-run", "--json").json()
    assert dry.pop("here").keys() == {"resident", "flops_per_second", "peak_memory", "seconds"}
    assert dry == converted["plan"]
    stripped = mla2dsa("strip", dsa, tmp_path / "dense", "--json").json()
    assert stripped == {"out": str(tmp_path / "dense"), "left_out": converted["left_out"]}
    assert mla2dsa("env", "--json").json()["packages"]["torch"] == torch.__version__


def test_env_says_what_is_usable() -> None:
    done = mla2dsa("env")
    assert (done.code, done.err) == (0, "")
    assert "  plan, convert, verify, strip, inspect, " in done.out


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_json_is_strict(bad: float) -> None:
    value = {"a": [1.5, bad, {"b": (bad, "x", None, True)}]}
    assert json.loads(json.dumps(finite(value), allow_nan=False)) == {"a": [1.5, None, {"b": [None, "x", None, True]}]}


def test_progress_is_one_unbroken_line_a_layer(tmp_path_factory: pytest.TempPathFactory) -> None:
    lines = (small_conversion(tmp_path_factory).parent / "stderr.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == list(LAYERS)
    assert all(
        re.fullmatch(r".* captures [\d.]+ of .*, window [\d.]+\), (closed-form|distilled)", line) for line in lines
    )


# Families


@pytest.mark.parametrize(
    ("family", "layout", "reason"),
    [
        ("deepseek_v2", "deepseek_v32", "no DSA class fits deepseek_v2: its router takes a softmax"),
        ("mistral4", "glm_moe_dsa", "no DSA class fits mistral4"),
    ],
)
def test_a_layout_that_does_not_fit_is_planned_but_not_written(
    family: str, layout: str, reason: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, flags = saved(family, tmp_path_factory), ("--index-topk", 64, "--layout", layout)
    planned = mla2dsa("plan", model, *flags)
    assert planned.code == 0
    assert f"no checkpoint can be written: {model}: --layout {layout}: {reason}" in planned.out
    assert "2 MLA layers" in planned.out
    monkeypatch.setattr("mla2dsa.optimizer.plan.capture", throw(AssertionError("captured before it was refused")))
    for more in ((), ("--dry-run",)):
        done = mla2dsa("convert", model, tmp_path / "out", *flags, *more)
        assert_refused(done, 1, model, f"--layout {layout}: {reason}", "--layout own")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "layout"), [("youtu", "deepseek_v32"), ("deepseek_v3-halfsplit", "deepseek_v32"), ("deepseek_v2", "own")]
)
def test_the_plan_names_the_layout(family: str, layout: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = saved(family, tmp_path_factory)
    planned = mla2dsa("plan", model, "--index-topk", 64)
    assert planned.code == 0
    assert f"\nlayout: {layout} (" in planned.out
    assert mla2dsa("plan", model, "--index-topk", 64, "--json").json()["refusal"] is None


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_model_without_mla(llama: Path, tmp_path: Path) -> None:
    assert_refused(mla2dsa("plan", llama, "--index-topk", 64), 1, "no dense MLA attention", "model.layers.0.self_attn")
    assert_refused(mla2dsa("convert", llama, tmp_path / "x", "--index-topk", 64), 1, "no dense MLA attention")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_model_that_is_sparse_already(command: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    dsa = small_conversion(tmp_path_factory)
    out = [tmp_path / "x"] if command == "convert" else []
    assert_refused(mla2dsa(command, dsa, *out, "--index-topk", 64), 1, dsa, "already a DSA model")
    assert not list(tmp_path.iterdir())


# Flags


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--index-topk", "0"], ["--index-topk 0", "greater than or equal to 1"]),
        (["--index-topk", "-3"], ["--index-topk -3", "greater than or equal to 1"]),
        (["--index-topk", "many"], ["--index-topk", "invalid int value: 'many'", "plan --help"]),
        (["--index-topk", "1023"], ["index_topk 1023", "context of 1024", "at most 1022"]),
        (["--index-topk", "5000"], ["index_topk 5000", "context of 1024", "at most 1022"]),
        ([], ["index_topk 2048", "context of 1024", "--index-topk"]),
        (["--index-n-heads", "0"], ["--index-n-heads 0"]),
        (["--index-topk", "64", "--index-head-dim", "17"], ["index_head_dim 17", "at least 18", "qk_rope_head_dim 16"]),
        (["--index-topk", "64", "--index-head-dim", "4"], ["index_head_dim 4", "at least 18"]),
        (["--indexer", "magic"], ["--indexer 'magic'", "closed-form", "distil", "donor"]),
        (["--indexer", "donor:"], ["--indexer", "donor needs a path (donor:PATH)"]),
        (["--indexer", "donor"], ["--indexer", "donor needs a path (donor:PATH)"]),
        (["--recipe", "/nowhere.yaml"], ["/nowhere.yaml", "recipe cannot be read"]),
        (["--frobnicate"], ["unrecognized arguments: --frobnicate", "see mla2dsa plan --help"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and (not value or value[0].startswith("--")) else "",
)
def test_bad_flags_of_plan(flags: list[str], parts: list[str]) -> None:
    assert_refused(mla2dsa("plan", TINY, *flags), 2, *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["required: COMMAND"]),
        (["fly"], ["'fly'"]),
        (["plan"], ["required: MODEL"]),
        (["convert", TINY], ["required: OUT"]),
        (["convert", TINY, "x", "--resume", "--overwrite"], ["--overwrite", "not allowed with", "--resume"]),
        (["convert", TINY, "x", "--index-topk", "64", "--tokens", "0"], ["--tokens 0"]),
        (["convert", TINY, "x", "--index-topk", "64", "--device", "toaster"], ["--device toaster", "pass cpu or cuda"]),
        (["verify", TINY, TINY, "--sequences", "0"], ["--sequences 0", "at least 1"]),
        (["verify", TINY, TINY, "--max-loss-delta", "much"], ["--max-loss-delta", "'much'"]),
    ],
    ids=["nothing", "command", "model", "out", "resume-overwrite", "tokens", "device", "sequences", "max-loss-delta"],
)
def test_bad_calls(arguments: list[object], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(mla2dsa(*arguments), 2, *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that the test asks for in vain")
def test_absent_device(tmp_path: Path) -> None:
    done = mla2dsa("convert", TINY, tmp_path / "x", "--index-topk", 64, "--device", "cuda")
    assert_refused(done, 2, "--device cuda", "cannot use it here")


# Recipes


def recipe_file(tmp_path: Path, text: str) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return str(file)


def test_recipe_takes_every_field(tmp_path: Path) -> None:
    recipe = read_recipe(recipe_file(tmp_path, EVERYTHING), {})
    given = recipe.model_dump()
    defaults = Recipe().model_dump()
    assert given.pop("donor") is defaults.pop("donor") is None
    assert all(given[name] != value for name, value in defaults.items())
    assert (recipe.distil.steps, recipe.verify.max_loss_delta, recipe.seed) == (12, 0.5, 7)
    assert read_recipe(recipe_file(tmp_path, "# nothing\n"), {}) == Recipe()


def test_flags_override_the_recipe(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, EVERYTHING)
    recipe = read_recipe(file, {"index_topk": 16, "tokens": None, "indexer": "closed-form"})
    assert (recipe.index_topk, recipe.tokens, recipe.indexer) == (16, 4096, "closed-form")
    assert mla2dsa("plan", TINY, "--recipe", file, "--index-topk", 16, "--json").json()["indexer"]["index_topk"] == 16
    file = recipe_file(tmp_path, "indexer: donor\ndonor: /some/where\n")
    assert read_recipe(file, {}).donor == "/some/where"
    assert read_recipe(file, {"indexer": "donor:/else"}).donor == "/else"
    assert read_recipe(file, {"indexer": "distil"}).donor is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("index_topkk: 64", ["index_topkk: no such field", "known are indexer, donor"]),
        ("distil: {stepz: 3}", ["distil.stepz: no such field", "known are steps, lr"]),
        ("verify: {limit: 3}", ["verify.limit: no such field", "known are max_loss_delta, sequences"]),
        ("index_topk: 0", ["index_topk 0", "greater than or equal to 1"]),
        ("index_topk: 64.5", ["index_topk 64.5", "integer"]),
        ("index_topk: '64'", ["index_topk '64'", "integer"]),
        ("index_topk: true", ["index_topk True", "integer"]),
        ("seed: -1", ["seed -1"]),
        ("distil: {lr: .nan}", ["distil.lr nan"]),
        ("distil: 7", ["distil 7"]),
        ("donor: ./x", ["donor needs a path"]),
        ("1: 2", ["1"]),
        ("- index_topk", ["expected a mapping"]),
        ("index_topk: 64\nindexer: [", ["not YAML", "line 2"]),
    ],
)
def test_bad_recipes(text: str, parts: list[str], tmp_path: Path) -> None:
    file = recipe_file(tmp_path, text)
    assert_refused(mla2dsa("plan", TINY, "--recipe", file), 2, file, *parts)


def test_recipe_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    assert_refused(mla2dsa("plan", TINY, "--recipe", tmp_path / "r.yaml"), 2, tmp_path / "r.yaml", "cannot be read")


# Failures nobody foresaw


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (RuntimeError("first\nsecond"), ["internal error: RuntimeError: first", "MLA2DSA_DEBUG=1"]),
        (ValueError(), ["internal error: ValueError"]),
        (MemoryError(), ["out of memory", "fewer --tokens"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), ["out of memory"]),
        (PermissionError(errno.EACCES, "Permission denied", "/secret"), ["/secret: Permission denied"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left on device"]),
        (UserError("two\nlines"), ["mla2dsa: two lines"]),
        (KeyboardInterrupt(), ["interrupted; nothing was left half-written"]),
    ],
    ids=["runtime", "empty", "memory", "torch-memory", "permission", "disk", "user", "ctrl-c"],
)
def test_unforeseen_errors_are_one_line(
    error: BaseException, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mla2dsa.optimizer.environment.environment", throw(error))
    monkeypatch.delenv("MLA2DSA_DEBUG", raising=False)
    done = mla2dsa("env")
    assert (done.code, done.out) == (130 if isinstance(error, KeyboardInterrupt) else 1, "")
    assert len(done.err.splitlines()) == 1
    assert all(part in done.err for part in parts)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA2DSA_DEBUG", "1")
    done = mla2dsa("plan", TINY, "--index-topk", 0)
    assert done.code == 2
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("mla2dsa: --index-topk 0")


def test_closed_pipe_and_full_stdout() -> None:
    """`mla2dsa env | head -0` ends quietly; a full disk behind stdout is one line."""
    command = [sys.executable, "-P", "-m", "mla2dsa", "env"]
    environment = {**os.environ, "PYTHONPATH": ""}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert "No space left" in done.stderr


def test_dry_run_writes_nothing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = contents(TINY)
    done = mla2dsa("convert", TINY, tmp_path / "x", *small_flags(tmp_path_factory), "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert f"top-k {SMALL_TOPK}" in done.out
    assert not list(tmp_path.iterdir())
    assert contents(TINY) == before


def test_dry_run_makes_the_checks(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "cat.png").touch()
    done = mla2dsa("convert", TINY, tmp_path / "full", *small_flags(tmp_path_factory), "--dry-run")
    assert_refused(done, 2, tmp_path / "full", "not empty")
    text = training_text(tmp_path_factory, 2000)
    done = mla2dsa("convert", TINY, tmp_path / "x", "--index-topk", 900, "--calibration", text, "--dry-run")
    assert_refused(done, 1, text, "give more text")


def test_random_tokens_are_said_to_be_random(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A model without a tokenizer converts all the same, and stdout and report say what the figures are on."""
    model = dense_checkpoint("single", tmp_path_factory)
    flags = ("--index-topk", 32, "--tokens", 1024, "--skip-verification")
    done = mla2dsa("convert", model, tmp_path / "x", *flags)
    assert done.code == 0, done.err
    assert "no calibration text was given: second moments of random tokens were used" in done.out
    assert "NOT verified" in done.out
    report = json.loads((tmp_path / "x" / "report.json").read_text())
    assert (report["calibration"]["text"], report["verification"]) == ("random tokens", None)
    assert json.loads((tmp_path / "x" / "mla2dsa.json").read_text())["verified"] is False
