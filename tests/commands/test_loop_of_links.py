"""An output that is a loop of links: one line from every command, and the link stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import TINY, mla2dsa


@pytest.mark.parametrize(
    "command",
    [
        ("convert", TINY, "LOOP", "--index-topk", 64),
        ("convert", TINY, "LOOP", "--index-topk", 64, "--dry-run"),
        ("convert", TINY, "LOOP/out", "--index-topk", 64),
        ("export", TINY, "LOOP"),
        ("build", TINY, "LOOP", "--sm", 80),
        ("deploy", TINY, "LOOP", "--index-topk", 64, "--sm", 80),
        ("strip", TINY, "LOOP"),
        ("plan", TINY, "--index-topk", 64, "--dump-graphs", "LOOP"),
    ],
    ids=lambda command: "-".join(map(str, command[:1] + command[2:])),
)
def test_output_is_a_loop_of_links(command: tuple[object, ...], tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    done = mla2dsa(*(str(it).replace("LOOP", str(loop)) for it in command))
    assert done.code in (1, 2)
    assert (done.out, loop.is_symlink()) == ("", True)
    assert str(loop) in done.err or "no mla2dsa.json" in done.err or "dense" in done.err
    assert "internal error" not in done.err
    assert "Traceback" not in done.err
