"""A plan of a hub id fetches config.json and headers, no weights; what goes wrong on the way is one line about the id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import save_dense
from hub_stand_in import Hub, hub_of

from mla2dsa.files.safetensors_index import read_index

SMALL = ["--index-topk", "64", "--index-head-dim", "32"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A model of several shards, much longer than their headers."""
    save_dense(tmp_path / "model", max_shard_size="400KB", intermediate_size=1024)
    with hub_of(tmp_path / "model") as found:
        yield found


def plan(hub: Hub, model: str, home: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return python(hub, home, "-m", "mla2dsa", "plan", model, *SMALL, *flags)


def python(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads where the hub is when it is imported."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "TMPDIR": str(home),
        "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": "",
    }  # fmt: skip
    home.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, "-P", *arguments], env=environment, capture_output=True, text=True)


def assert_headers_only(hub: Hub) -> None:
    shards = {place.file for place in read_index(hub.folder).values()}
    long = [file for file in shards if file.stat().st_size > 200_000]
    assert len(long) > 1
    assert {file.name for file in shards} <= hub.sent.keys()
    assert all(hub.sent[file.name] <= 100_001 for file in long)  # what huggingface_hub asks for at once


def test_a_plan_fetches_no_weights(hub: Hub, tmp_path: Path) -> None:
    done = plan(hub, "owner/name", tmp_path / "home", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert_headers_only(hub)
    here = plan(hub, str(hub.folder), tmp_path / "home", "--json")
    local = json.loads(here.stdout)
    assert found["model"] == "owner/name"
    assert {**found, "model": 0, "here": 0} == {**local, "model": 0, "here": 0}
    assert not list((tmp_path / "home").glob("mla2dsa-*"))


def test_a_plan_from_python_fetches_none_either(hub: Hub, tmp_path: Path) -> None:
    script = "import mla2dsa; print(mla2dsa.plan('owner/name', index_topk=64, index_head_dim=32).value.model)"
    done = python(hub, tmp_path / "home", "-c", script)
    assert (done.returncode, done.stdout) == (0, "owner/name\n"), done.stderr
    assert_headers_only(hub)


def test_what_is_wrong_is_said_of_the_id(hub: Hub, tmp_path: Path) -> None:
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": -1.5}))
    done = plan(hub, "owner/name", tmp_path / "home")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "mla2dsa: owner/name/config.json: num_attention_heads is -1.5, expected a number of at most 65536\n"
    )


def test_a_model_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    done = plan(hub, "nobody/nothing", tmp_path / "home")
    assert done.returncode == 1
    assert done.stderr.startswith("mla2dsa: nobody/nothing: no such folder, and not found on the hub")
    assert len(done.stderr.splitlines()) == 1


def test_a_hub_that_is_not_reached(hub: Hub, tmp_path: Path) -> None:
    hub.endpoint = "http://127.0.0.1:9"  # nobody listens there
    done = plan(hub, "owner/name", tmp_path / "home")
    assert done.returncode == 1
    assert "hub" in done.stderr
    assert len(done.stderr.splitlines()) == 1
