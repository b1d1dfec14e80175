"""-v and --dump-graphs of the real command line: what is logged and where, what is written and what is not replaced."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import (
    TINY,
    assert_refused,
    mla2dsa,
    quick_capture,  # noqa: F401  (a fixture)
    small_conversion,
    small_flags,
)
from dsa_checkpoints import dsa_checkpoint

from mla2dsa import cli
from mla2dsa.optimizer.graph_dumps import write_graph

pytestmark = pytest.mark.usefixtures("quick_capture")

PLAN = ("plan", TINY, "--index-topk", 32, "--json")
DSA = ["normalize", "find_mla", "functionalise", "mla_to_dsa"]
CACHED, TAPPED = [*DSA, "add_cache"], [*DSA[:3], "tap"]


def names(passes: list[str]) -> list[str]:
    """The files of these passes, in order."""
    return [f"{n:03d}-{name}-{when}.txt" for n, name in enumerate(passes, 1) for when in ("before", "after")]


def written(folder: Path) -> list[str]:
    return sorted((file.name for file in folder.iterdir()), key=lambda name: (name[:3], "after" in name))


def same_anywhere(out: str) -> dict[str, Any]:
    """A plan without what depends on how busy this machine is."""
    return {name: value for name, value in json.loads(out).items() if name != "here"}


# -v


def test_nothing_is_logged_unless_asked() -> None:
    done = mla2dsa(*PLAN)
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("flags", ["-v", "--verbose", "-vv", "-v -v"])
def test_passes_log_to_stderr(flags: str) -> None:
    quiet, done = mla2dsa(*PLAN), mla2dsa(*PLAN, *flags.split())
    assert done.code == 0
    assert same_anywhere(done.out) == same_anywhere(quiet.out)
    lines, details = done.err.splitlines(), flags in ("-vv", "-v -v")
    assert [line.split(": ")[0] for line in lines if " nodes before, " in line] == [
        f"mla2dsa.passes.{name}" for name in DSA
    ]
    assert (
        "mla2dsa.passes.find_mla: 4 MLA attentions found, model.layers.0.self_attn to model.layers.3.self_attn" in lines
    )
    assert any(line.startswith("mla2dsa.passes.mla_to_dsa: 4 layers rewritten") for line in lines)
    assert any("model.layers.2.self_attn: anchor core" in line for line in lines) == details
    assert any("MlaToDsa(config=" in line for line in lines) == details


def test_the_log_ends_with_the_command() -> None:
    logger = logging.getLogger("mla2dsa")
    before = (list(logger.handlers), logger.level, logger.propagate)
    mla2dsa(*PLAN, "-vv")
    assert (logger.handlers, logger.level, logger.propagate) == before
    assert mla2dsa(*PLAN).err == ""


def test_misses_are_logged_with_reason_and_node(tmp_path: Path) -> None:
    """A model without any MLA: the log says why of each attention, then the command fails as it does without."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=256)).save_pretrained(tmp_path)
    done = mla2dsa("plan", tmp_path, "--index-topk", 64, "-v")
    *log, last = done.err.splitlines()
    assert (done.code, last.startswith("mla2dsa: no dense MLA attention in this model")) == (1, True)
    misses = [line for line in log if line.startswith("mla2dsa.passes.find_mla: could not: match model.layers.")]
    assert len(misses) == 2
    assert all(re.search(r"self_attn: .+ \(node \w+\)$", line) for line in misses)


def test_every_command_takes_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    helps = {}
    for command in (
        "plan",
        "convert",
        "verify",
        "strip",
        "export",
        "generate",
        "inspect",
        "env",
        "build",
        "deploy",
        "bench",
    ):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        helps[command] = capsys.readouterr().out
    assert all("--verbose" in text for text in helps.values())
    graphs = {command for command, text in helps.items() if "--dump-graphs" in text}
    assert graphs == {"plan", "convert", "verify", "export", "generate", "build", "deploy"}


# --dump-graphs


def test_plan_writes_its_graphs(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "graphs"
    done = mla2dsa(*PLAN, "--dump-graphs", folder)
    assert (done.code, done.err) == (0, "")
    assert written(folder) == names(DSA)
    before = (folder / "004-mla_to_dsa-before.txt").read_text()
    after = (folder / "004-mla_to_dsa-after.txt").read_text()
    assert before.startswith("# before mla_to_dsa\n# ")
    assert after.startswith("# after mla_to_dsa\n# ")
    assert "# 4 layers rewritten, model.layers.0.self_attn to model.layers.3.self_attn\n" in after
    assert (before.count("ops.mla2dsa.dense_attention"), after.count("ops.mla2dsa.dense_attention")) == (4, 0)
    assert (before.count("ops.mla2dsa.sparse_mla"), after.count("ops.mla2dsa.sparse_mla")) == (0, 4)
    assert ': "f32[' in before  # values have their sizes


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert mla2dsa(*PLAN, "--dump-graphs", tmp_path).code == 0
    assert written(tmp_path) == names(DSA)


def test_a_conversion_goes_on_counting(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    out, folder = tmp_path / "dsa", tmp_path / "graphs"
    flags = small_flags(tmp_path_factory)
    done = mla2dsa("convert", TINY, out, *flags, "--skip-transformers", "--dump-graphs", folder, "--json")
    assert done.code == 0, done.err
    files = written(folder)
    assert files == names(
        [*DSA, *TAPPED, *DSA, *TAPPED]
    )  # plan, calibration, verification: both graphs, then the layers
    assert not list(out.glob("*.txt"))


@pytest.mark.parametrize("command", ["verify", "export", "generate", "deploy"])
def test_other_commands_write_theirs(command: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    made, folder = small_conversion(tmp_path_factory), tmp_path / "graphs"
    arguments: dict[str, tuple[object, ...]] = {
        "verify": (TINY, made, "--sequences", 1, "--sequence-length", 64, "--skip-transformers", "--max-loss-delta", 9),
        "export": (made, tmp_path / "out"),
        "generate": (made, "def", "--max-new-tokens", 2),
        "deploy": (TINY, tmp_path / "out", "--index-topk", 32, "--backend", "tensorrt-rtx", "--dry-run"),
    }
    done = mla2dsa(command, *arguments[command], "--dump-graphs", folder, "-v")
    passes = DSA if command in ("verify", "deploy") else CACHED
    assert written(folder)[: 2 * len(passes)] == names(passes), done.err
    assert "mla2dsa.passes.mla_to_dsa: 4 layers rewritten" in done.err


@pytest.mark.parametrize("what", ["full", "file", "out", "inside", "around"])
def test_a_folder_in_use_is_refused_before_any_work(what: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = {
        "full": tmp_path / "full",
        "file": tmp_path / "file",
        "out": out,
        "inside": out / "graphs",
        "around": tmp_path,
    }[what]
    kept = tmp_path / "full" / "kept.txt"
    if what == "full":
        kept.parent.mkdir()
        kept.write_text("mine")
    if what == "file":
        folder.write_text("mine")
    done = mla2dsa("convert", TINY, out, "--index-topk", 32, "--dump-graphs", folder)
    expected = {"full": "not empty", "file": "is a file"}.get(what, "overlaps the output")
    assert_refused(done, 2, "--dump-graphs", folder, expected)
    assert not out.exists()
    assert what != "full" or (written(kept.parent) == ["kept.txt"] and kept.read_text() == "mine")


@pytest.mark.parametrize("where", ["the same", "inside", "around"])
def test_the_checkpoint_that_deploy_keeps_is_an_output_too(where: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept" / "dsa"
    folder = {"the same": kept, "inside": kept / "graphs", "around": kept.parent}[where]
    done = mla2dsa("deploy", TINY, tmp_path / "out", "--keep-checkpoint", kept, "--dry-run", "--dump-graphs", folder)
    assert_refused(done, 2, "--dump-graphs", folder, f"overlaps the output {kept}")
    assert not kept.parent.exists()


def test_a_command_that_made_no_graph_says_so(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    exported = tmp_path / "onnx"
    assert mla2dsa("export", dsa_checkpoint("tiny-mla", tmp_path_factory), exported).code == 0
    done = mla2dsa("generate", exported, "def", "--max-new-tokens", 2, "--dump-graphs", tmp_path / "graphs")
    assert done.code == 2
    assert "nothing was written, for no graph is made of what was given" in done.err
    assert not (tmp_path / "graphs").exists()


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    from mla2dsa.errors import UserError

    file = tmp_path / "a" / "b.txt"
    write_graph(file, "first")
    with pytest.raises(UserError, match=r"b\.txt: is there already, and is not replaced"):
        write_graph(file, "second")
    assert file.read_text() == "first"
