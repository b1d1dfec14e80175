"""Dense and sparse side by side on questions about long texts: the greedy answer, and how likely the right one is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...runtime.execute import PieceRunner
from ...runtime.shelf import Shelf
from .checked import Check
from .evaluate import program_inputs
from .pair import Pair
from .questions import KINDS, Asker, Question, questions

REMEDY = "calibrate on longer sequences (sequence_length in the recipe), or take a larger --index-topk"


# Fixed by what is usual for needles: both ends, and the quarters.
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class LongTasks:
    """What is asked. lengths: tokens (empty: the model's context, and a quarter of it); questions: of each kind at each length;
    most_lost: points of accuracy that DSA may lose against dense (None: any)."""

    kinds: tuple[str, ...] = tuple(KINDS)
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = DEPTHS
    questions: int = 20  # fixed by time: each is a prefill of four models; a point of accuracy needs a hundred
    most_lost: float | None = 2.0  # fixed by what RULER calls the same: two points
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """accuracy: share of questions whose every token of the answer is the likeliest, which is what greedy decoding would say.
    log_probability: of the right answer, nats, mean."""

    accuracy: float
    log_probability: float


@dataclass(frozen=True)
class TaskScore:
    """by_model: "dense", "dsa", "oracle", "window", on the same questions. by_depth: their accuracy, by depth."""

    kind: str
    length: int
    questions: int
    by_model: dict[str, Score]
    by_depth: dict[str, dict[float, float]]


def answered(
    dense: PieceRunner,
    selections: Mapping[str, PieceRunner],
    asked: Sequence[Question],
    device: str = "cpu",
    on_question: Callable[[int, int], None] | None = None,
) -> TaskScore:
    """Scores of questions of one kind and length. All programs are streamed in step; no more than one question's logits of one
    program are in memory at a time."""
    inputs = [program_inputs(question.ids, device) for question in asked]
    streams = {"dense": dense.outputs_of(inputs), **{n: runner.outputs_of(inputs) for n, runner in selections.items()}}
    answers: dict[str, list[tuple[bool, float]]] = {name: [] for name in streams}
    for number, question in enumerate(asked):
        for name, stream in streams.items():
            answers[name].append(_answer(next(stream)[0], question))
        if on_question is not None:
            on_question(number + 1, len(asked))
    by_model = {
        name: Score(sum(right for right, _ in found) / len(found), sum(log for _, log in found) / len(found))
        for name, found in answers.items()
    }
    depths = {name: _by_depth(asked, [right for right, _ in found]) for name, found in answers.items()}
    return TaskScore(asked[0].kind, len(asked[0].ids), len(asked), by_model, depths)


def _answer(logits: Tensor, question: Question) -> tuple[bool, float]:
    """(answered greedily, log-probability). logits: [1, L, vocab]."""
    told = torch.log_softmax(logits[0, -question.answer - 1 : -1].float(), -1)
    wanted = question.ids[-question.answer :].to(told.device)
    return bool((told.argmax(-1) == wanted).all()), float(told.gather(-1, wanted[:, None]).sum())


def _by_depth(asked: Sequence[Question], right: Sequence[bool]) -> dict[float, float]:
    found: dict[float, list[bool]] = {}
    for question, correct in zip(asked, right, strict=True):
        found.setdefault(question.depth, []).append(correct)
    return {depth: sum(values) / len(values) for depth, values in sorted(found.items())}


def check(task: TaskScore, most_lost: float) -> Check:
    """most_lost: points of accuracy that DSA may lose against dense."""
    dense, dsa = task.by_model["dense"].accuracy, task.by_model["dsa"].accuracy
    lost = round(100 * (dense - dsa), 6)  # accuracies are ratios of counts
    name = f"{task.kind} at {task.length} tokens, points of accuracy lost"
    return Check(name, lost <= most_lost, lost, most_lost, f"dense {dense:.0%}, DSA {dsa:.0%}", REMEDY)


def long_tasks(
    pair: Pair,
    tokenizer: Any,
    text: Tensor | None,
    wanted: LongTasks,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[TaskScore], list[Check]]:
    """Ask everything, the limits held against it. text: [N] ids to hide things in (None: plain sentences).

    Raises UsageError for lengths that the model has no context for, or where every key is selected anyhow.
    """
    topk, context, device = pair.config.index_topk, pair.dense.capture.max_length, pair.dense.device
    lengths = wanted.lengths or tuple(length for length in (context // 4, context) if length > topk)
    for length in lengths:
        if not topk < length <= context:
            raise UsageError(
                f"--lengths {length}, expected more than index_topk {topk} and at most the context of {context} tokens"
            )
    scores = []
    for length in lengths:
        asker = Asker(tokenizer, length, wanted.seed, text)
        for kind in wanted.kinds:
            asked = questions(asker, kind, wanted.depths, wanted.questions)
            dense, selections = pair.runners(Shelf())

            def tell(done: int, total: int, stage: str = f"{kind} at {length}") -> None:
                if on_progress is not None:
                    on_progress(stage, done, total)

            scores.append(answered(dense, selections, asked, device, tell))
    limit = wanted.most_lost
    return scores, [] if limit is None else [check(score, limit) for score in scores]
