"""benchmarks/clients.py: several clients at once get what each alone gets, and a wrong answer is noticed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from places import ROOT, TINY

SCRIPT = ROOT / "benchmarks" / "clients.py"


def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("clients", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "clients", module)  # dataclasses look there for their annotations
    spec.loader.exec_module(module)
    return module


def test_clients_of_a_real_server() -> None:
    command = [sys.executable, str(SCRIPT), str(TINY), "--clients", "3", "--seconds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "by tiny-mla answers of 24 tokens, 0 faults" in done.stdout
    assert "MiB at the end" in done.stdout


@pytest.mark.parametrize("fault", ["another-text", "an-error"])
def test_faults_are_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = script(monkeypatch)

    def ask(client: Any, model: str, prompt: str, stream: bool) -> str:
        if fault == "an-error":
            raise ConnectionError("gone")
        return "mixed" if stream else f"after {prompt}"

    monkeypatch.setattr(clients, "ask", ask)
    seen = clients.Seen()
    right = {("a", prompt): f"after {prompt}" for prompt in clients.PROMPTS}
    clients.one_client(0, "http://127.0.0.1:9", right, float("-inf"), seen)
    assert len(seen.faults) == 1
    assert ("gone" if fault == "an-error" else "mixed") in seen.faults[0]
