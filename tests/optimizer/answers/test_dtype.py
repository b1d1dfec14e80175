"""--dtype: what a checkpoint's weights and caches are in memory, in every command that runs models."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from command_line import TINY, assert_refused, mla2dsa, small_conversion

from mla2dsa import api
from mla2dsa.errors import UsageError, UserError
from mla2dsa.kernels import products
from mla2dsa.optimizer.answers.timing import Run, timed
from mla2dsa.optimizer.export import export
from mla2dsa.optimizer.model import free_memory
from mla2dsa.optimizer.model.cached_model import open_torch_session
from mla2dsa.runtime.generation import prefill

PROMPT = "def main():\n    import os\n"


@pytest.fixture(autouse=True)
def nothing_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """By sessions of other tests, which nobody may have collected yet."""
    monkeypatch.setattr(free_memory, "_PROMISED", WeakSet())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_conversion(tmp_path_factory)


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "onnx"
    export(folder, out)
    return out


@pytest.mark.parametrize("widened", [True, False], ids=["no instructions", "instructions"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "dsa"])
def test_a_session_in_half_precision_is_near_float32_s(
    folder: Path, kind: str, dtype: torch.dtype, widened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_slow", lambda kind: widened and kind != torch.float32)
    model, ids = TINY if kind == "dense" else folder, torch.arange(5, 105).tolist()
    exact, half = (open_torch_session(model, 1, 128, kind) for kind in (torch.float32, dtype))
    wanted, found = (prefill(session, [ids], len(ids)).softmax(-1) for session in (exact, half))
    assert {cache.dtype for cache in half._caches.tensors.values()} == {dtype}
    assert 0 < float((wanted - found).abs().max()) < 0.05


def test_generate_says_the_same_in_bfloat16(folder: Path) -> None:
    told = [
        mla2dsa("generate", folder, PROMPT, "--max-new-tokens", 6, "--temperature", 0, *dtype)
        for dtype in ((), ("--dtype", "float32"), ("--dtype", "bfloat16"))
    ]
    assert [done.code for done in told] == [0, 0, 0]
    assert told[0].out == told[1].out
    assert told[2].out.strip()


def test_compare_takes_it_for_both(folder: Path) -> None:
    done = mla2dsa("compare", TINY, folder, PROMPT, "--max-new-tokens", 4, "--dtype", "bfloat16", "--json")
    assert done.code == 0, done.err
    same = mla2dsa("compare", TINY, folder, PROMPT, "--max-new-tokens", 4, "--json")
    assert done.json() != same.json()  # other roundings


def test_bench_takes_it(folder: Path) -> None:
    run = timed(Run(str(folder), 1, 16, 2, dtype="bfloat16"))
    assert run["dtype"] == "bfloat16"
    assert timed(Run(str(folder), 1, 16, 2))["dtype"] == "float32"


@pytest.mark.parametrize("command", ["generate", "bench", "serve"])
def test_an_export_has_its_own(command: str, exported: Path) -> None:
    arguments = {"generate": (exported, PROMPT), "bench": (exported,), "serve": (exported, "--port", 0)}[command]
    done = mla2dsa(command, *arguments, "--dtype", "bfloat16")
    assert_refused(done, 2, str(exported), "an exported folder, which has its dtype; --dtype is of checkpoints")


def test_beside_an_export_it_is_the_checkpoint_s(folder: Path, exported: Path) -> None:
    """And each row says which it had."""
    done = mla2dsa(
        "bench", folder, exported, "--context", 16, "--tokens", 2, "--rounds", 1, "--dtype", "bfloat16", "--json"
    )
    assert [one["dtype"] for one in done.json()["results"]] == ["bfloat16", "float32"]
    done = mla2dsa("compare", TINY, exported, PROMPT, "--max-new-tokens", 2, "--dtype", "bfloat16", "--json")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float32, "pass --dtype bfloat16, which takes half, or use"),
        (torch.bfloat16, "all of them: use a machine"),
    ],
    ids=["float32", "bfloat16"],
)
def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    folder: Path, dtype: torch.dtype, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_memory, "free_memory", lambda: 1 << 20)
    with pytest.raises(
        UserError, match=rf"dsa: the weights take .* MiB in {str(dtype)[6:]}, 1\.0 MiB are free on cpu"
    ) as told:
        open_torch_session(folder, 1, 128, dtype)
    assert advice in str(told.value)


def test_from_python(folder: Path, exported: Path) -> None:
    found = api.compare(TINY, folder, PROMPT, max_new_tokens=4, dtype="bfloat16")
    assert found.data != api.compare(TINY, folder, PROMPT, max_new_tokens=4).data
    with pytest.raises(UsageError, match=r"dtype 'fp8', expected float32 or float16 or bfloat16"):
        api.bench(folder, (16,), dtype="fp8")
    with pytest.raises(UsageError, match="an exported folder, which has its dtype"):
        api.bench(exported, (16,), dtype="bfloat16")


def test_weights_that_two_sessions_will_load_are_counted_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is loaded when it is first asked for: until then the memory looks free."""
    monkeypatch.setattr(free_memory, "free_memory", lambda: 12 << 20)
    first = open_torch_session(TINY, 1, 128)
    with pytest.raises(UserError, match=r"the weights take 9\.\d MiB in float32, 4\.\d MiB are free"):
        open_torch_session(folder, 1, 128)
    prefill(first, [[5, 6, 7]], 3)  # loaded: what is free is so now
    second = open_torch_session(folder, 1, 128)
    prefill(second, [[5, 6, 7]], 3)
    assert [promised.left for promised in free_memory._PROMISED] == [0] * len(free_memory._PROMISED)


def test_tied_weights_are_counted_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_torch_session(folder, 1, 128)
    [needed] = [one.left for one in free_memory._PROMISED if one.left]
    prefill(session, [[5, 6, 7]], 3)
    assert not any(one.left for one in free_memory._PROMISED)
    monkeypatch.setattr(free_memory, "free_memory", lambda: needed)
    open_torch_session(folder, 1, 128)
    monkeypatch.setattr(free_memory, "free_memory", lambda: needed - 1)
    with pytest.raises(UserError, match="the weights take"):
        open_torch_session(folder, 1, 128)
