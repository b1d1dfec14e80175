"""The Python front door: lazy, typed, and the same as the command line."""

from __future__ import annotations

import inspect
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from command_line import LAYERS, TINY, mla2dsa, quick_capture, small_conversion, training_text  # noqa: F401  (a fixture)

import mla2dsa as package
from mla2dsa.errors import UsageError, UserError
from mla2dsa.optimizer.verify import FailedVerification

pytestmark = pytest.mark.usefixtures("quick_capture")
FUNCTIONS = [name for name in package.__all__ if not name.startswith("_")]


def test_nothing_is_loaded_before_it_is_asked_for(tmp_path: Path) -> None:
    script = (
        "import sys, mla2dsa; assert 'plan' in dir(mla2dsa); print('torch' in sys.modules, 'mla2dsa.api' in sys.modules); "
        "mla2dsa.plan; print('torch' in sys.modules, 'mla2dsa.api' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.split() == ["False", "False", "False", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'plann'"):
        package.plann  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_is_typed_and_documented(name: str) -> None:
    function = getattr(package, name)
    assert function.__doc__
    signature = inspect.signature(function)
    assert str(signature.return_annotation).startswith("Result[")
    assert all(one.annotation is not inspect.Parameter.empty for one in signature.parameters.values())


def test_plan_prints_as_the_command_does() -> None:
    found, done = package.plan(TINY, index_topk=64), mla2dsa("plan", TINY, "--index-topk", 64, "--json").json()
    assert found.data.keys() == done.keys()
    assert found.value.indexer.index_topk == 64
    assert f"{LAYERS[0]} .. {LAYERS[3]}" in repr(found)
    with pytest.raises(UsageError, match="index-topkk: no such field"):
        package.plan(TINY, index_topkk=64)


def test_what_is_wrong_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="things to mend"):
        package.verify(tmp_path / "a", tmp_path / "b")
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken"):
        package.export(TINY, tmp_path / "taken")


def test_convert_export_and_verify(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path / "dsa"
    settings = {"index_topk": 32, "sequence_length": 192, "tokens": 2304, "rows": 64, "indexer": "closed-form"}
    text = training_text(tmp_path_factory)
    done = package.convert(TINY, out, calibration=text, skip_verification=True, **settings)
    assert done.value.plan.indexer.index_topk == done.data["recipe"]["index_topk"] == 32
    assert repr(done).endswith(f"{out}: written, NOT verified")
    exported = package.export(out, tmp_path / "pt2", format="pt2")
    assert (repr(exported), exported.data["format"]) == (f"{tmp_path / 'pt2'}: pt2, float32", 1)
    check = partial(package.verify, TINY, out, text=text, sequences=1, sequence_length=64, skip_transformers=True)
    proved = check(max_loss_delta=10.0)
    assert proved.value.passed
    assert "dense = DSA up to index_topk" in repr(proved)
    with pytest.raises(FailedVerification, match=r"loss increase, .*, expected at most -10") as failed:
        check(gates={"loss": -10.0}, max_loss_delta=10.0)
    assert not failed.value.verification.passed
    with pytest.raises(UserError, match="no such"):
        package.build(tmp_path / "nowhere", tmp_path / "engine", backend="tensorrt-rtx")


def test_compare_is_what_the_command_prints(tmp_path_factory: pytest.TempPathFactory) -> None:
    dsa = small_conversion(tmp_path_factory)
    found = package.compare(TINY, dsa, "import os", max_new_tokens=3)
    done = mla2dsa("compare", TINY, dsa, "import os", "--max-new-tokens", 3)
    assert (done.code, repr(found)) == (0, done.out.rstrip())
    assert found.data == mla2dsa("compare", TINY, dsa, "import os", "--max-new-tokens", 3, "--json").json()
    assert [one.prompt for one in found.value] == ["import os"]
    several = package.compare(TINY, dsa, ["import os", "class A:"], max_new_tokens=1)
    assert [one["prompt"] for one in several.data["prompts"]] == ["import os", "class A:"]


def test_bench_times_one_model(tmp_path: Path) -> None:
    found = package.bench(TINY, [16], tokens=2, rounds=1)
    assert (found.value["results"][0]["context"], found.data["against"]) == (16, [])
    assert "medians of 1 round" in repr(found)
    with pytest.raises(UserError, match="nowhere"):
        package.bench([TINY, tmp_path / "nowhere"], [16])


def test_one_of_overwrite_and_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="overwrite and resume"):
        package.convert(TINY, tmp_path / "out", overwrite=True, resume=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "trt"}, "'trt': expected one of tensorrt, tensorrt-rtx"),
        ({"sms": "90"}, "--sm '90': expected at least one architecture"),
        ({"sms": [90], "most": {"nope": 3}}, "nope: no size of an engine; expected batch, seq, cache_length"),
    ],
    ids=["backend", "sms", "most"],
)
def test_options_of_an_engine(
    options: dict[str, object], said: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(UsageError, match=said):
        package.build(small_conversion(tmp_path_factory), tmp_path / "engine", **options)
