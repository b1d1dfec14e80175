"""docs/comparing.md: its commands are run as they stand, and its client's lines against a server that its command starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chatty import open_once
from command_line import mla2dsa, small_conversion
from documents import calls_of
from places import ROOT, TINY
from reports import benchmark

PAGE = (ROOT / "docs" / "comparing.md").read_text()
CALLS = [call for call in calls_of("mla2dsa", PAGE) if call[0] in ("generate", "compare", "report") and len(call) > 2]
(SERVE,) = (call for call in calls_of("mla2dsa", PAGE) if call[0] == "serve" and len(call) > 2)
(CLIENT,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the page's names are: model, model-dsa, prompts.jsonl, bench.json."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(TINY, folder / "model")
    shutil.copytree(small_conversion(tmp_path_factory), folder / "model-dsa")
    (folder / "prompts.jsonl").write_text('{"prompt": "import os"}\n"class A:"\n')
    (folder / "bench.json").write_text(json.dumps(benchmark()))
    with pytest.MonkeyPatch.context() as patch:
        open_once(patch)
        patch.chdir(folder)
        yield folder


@pytest.mark.parametrize("call", CALLS, ids=shlex.join)
def test_a_command_does_what_it_says(place: Path, call: list[str]) -> None:
    done = mla2dsa(*call)
    assert (done.code, done.err) == (0, "")
    assert done.out.strip()
    if call[0] == "report":
        page = (place / call[2]).read_text()
        assert "KL to dense, nats, by position" in page
        assert ("prefill, measured" in page) == ("--bench" in call)
    if "--json" in call:
        assert len(json.loads(done.out)["prompts"]) == 2


@pytest.mark.usefixtures("hangup_is_heard")
def test_the_server_and_its_client(place: Path) -> None:
    """Port 0 in place of the page's, which may be taken. It ends by SIGHUP, for which uvicorn has no handler of its own."""
    call = [sys.executable, "-P", "-m", "mla2dsa", *SERVE]
    call[call.index("--port") + 1] = "0"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(call, cwd=place, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            (said,) = re.findall(r"^serving model, model-dsa at (http://127\.0\.0\.1:\d+) ", server.stderr.readline())
            code = CLIENT.replace("http://127.0.0.1:8000", said)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
            told = {line.split(" ")[0] for line in done.stdout.splitlines() if line.startswith("model")}
            assert told == {"model", "model-dsa"}
        finally:
            server.send_signal(signal.SIGHUP)
        assert server.stderr.read() == "mla2dsa: interrupted; nothing was left half-written\n"
    assert server.returncode == 129
