"""Our session as lm-evaluation-harness asks for it: against logits of the program without caches, and by the real package."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import TINY, captured_once, small_conversion  # noqa: F401
from torch import Tensor

from mla2dsa.errors import UsageError, UserError
from mla2dsa.optimizer.generate import generate_text
from mla2dsa.optimizer.proof.evaluate import program_inputs
from mla2dsa.optimizer.proof.pair import open_pair
from mla2dsa.optimizer.proof.tasks import harness
from mla2dsa.optimizer.proof.tasks.harness import TextModel, harness_model, wrapped
from mla2dsa.runtime.generation import Sampling

CONTEXT = (TINY / "held_out" / "py_compile.py.txt").read_text()[:400]  # longer than index_topk


@pytest.fixture(scope="module")
def folder(captured_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return small_conversion(tmp_path_factory)


@pytest.fixture(scope="module")
def model(folder: Path) -> TextModel:
    return TextModel(folder, max_length=256)


@pytest.fixture(scope="module")
def logits(folder: Path) -> Any:
    """[T, vocab] of the converted program without caches."""
    runner = open_pair(TINY, folder).runners()[1]["dsa"]

    def run(ids: list[int]) -> Tensor:
        return torch.log_softmax(next(runner.outputs_of([program_inputs(torch.tensor(ids))]))[0][0], -1)

    return run


def test_loglikelihood(model: TextModel, logits: Any) -> None:
    for continuation in ("\n    return", "\n    raise ValueError"):
        text = model.tokenizer(CONTEXT + continuation)["input_ids"]
        first = len(model.tokenizer(CONTEXT)["input_ids"])
        wanted = logits(text[:-1])[first - 1 :].gather(-1, torch.tensor(text[first:])[:, None])
        found, greedy = model.loglikelihood(CONTEXT, continuation)
        assert found == pytest.approx(float(wanted.sum()), abs=1e-3)
        assert greedy is False


def test_what_is_greedy_is_said_to_be(model: TextModel) -> None:
    text = model.generate_until(CONTEXT, {"max_gen_toks": 3})
    assert model.loglikelihood(CONTEXT, text)[1]


def test_a_space_goes_to_the_word(model: TextModel) -> None:
    assert model.loglikelihood("import ", "os") == model.loglikelihood("import", " os")
    assert model.loglikelihood("", "import")[0] < 0
    assert model.loglikelihood("import", "") == (0.0, True)


def test_rolling(model: TextModel, logits: Any) -> None:
    """In one window; a longer text in several, which has no error but needs no more room."""
    ids = model.tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    wanted = logits([model.prefix, *ids[:-1]]).gather(-1, torch.tensor(ids)[:, None])
    assert model.rolling(CONTEXT) == pytest.approx(float(wanted.sum()), abs=1e-3)
    assert model.rolling(CONTEXT * 5) < model.rolling(CONTEXT)


def test_generate_until(model: TextModel, folder: Path) -> None:
    whole = "".join(generate_text(str(folder), CONTEXT, None, 12, Sampling()))
    assert model.generate_until(CONTEXT, {"max_gen_toks": 12, "do_sample": False}) == whole
    end = whole[4:6]
    assert model.generate_until(CONTEXT, {"max_gen_toks": 12, "until": [end]}) == whole[: whole.index(end)]
    assert model.generate_until(CONTEXT * 9, {"max_gen_toks": 2}) != ""  # what does not fit loses its beginning


@pytest.mark.parametrize(
    ("options", "part"),
    [({"variant": "x"}, "variant 'x'"), ({"max_length": 1}, "max_length 1"), ({"max_length": 4096}, "context of 1024")],
    ids=["variant", "short", "long"],
)
def test_bad_options(options: dict[str, Any], part: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=part):
        TextModel(folder, **options)


def test_unknown_settings(model: TextModel) -> None:
    with pytest.raises(UsageError, match="generation setting num_beams"):
        model.generate_until("a", {"num_beams": 4})


def test_without_the_package(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match="pip install 'mla2dsa"):
        wrapped(model)


def test_the_real_package(model: TextModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests come back in their own order."""
    instance = pytest.importorskip("lm_eval.api.instance", reason="lm-evaluation-harness is not installed").Instance
    base = pytest.importorskip("lm_eval.api.model").LM
    monkeypatch.setattr(harness, "TextModel", lambda *args, **options: SimpleNamespace(of=(args, options)))
    harness_model(folder, variant="dense")  # it goes to TextModel as it is
    of = wrapped(model)
    assert isinstance(of, base)

    def asked(kind: str, *arguments: tuple[Any, ...]) -> Any:
        return getattr(of, kind)([instance(kind, {}, args, number) for number, args in enumerate(arguments)])

    pairs = [("import", " os"), ("def f", "(x):"), ("import", " sys")]
    assert asked("loglikelihood", *pairs) == [model.loglikelihood(*pair) for pair in pairs]
    assert asked("loglikelihood_rolling", ("b = 1",), ("a = 2",)) == [model.rolling("b = 1"), model.rolling("a = 2")]
    how = {"max_gen_toks": 4, "until": ["\n\n"]}
    assert asked("generate_until", ("x", how), ("def", how)) == [model.generate_until(it, how) for it in ("x", "def")]
