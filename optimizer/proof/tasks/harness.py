"""A converted model for lm-evaluation-harness: its tasks run on our session.

pip install 'mla2dsa[harness]'

import lm_eval
from mla2dsa.optimizer.proof.tasks.harness import harness_model
print(lm_eval.simple_evaluate(harness_model("model-dsa"), tasks=["lambada_openai"])["results"])
print(lm_eval.simple_evaluate(harness_model("model-dsa", variant="dense"), tasks=["lambada_openai"])["results"])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ....errors import UsageError, UserError
from ....files.dtypes import torch_dtype
from ....files.model.stop_tokens import stop_tokens
from ....runtime.generation import Sampling
from ...model.cached_model import context_of
from ...model.checkpoint import Checkpoint
from ...model.text import load_tokenizer
from ..scorer import Scorer
from .examples import split
from .selections import VARIANTS
from .sessions import Variants

NEW_TOKENS = 256  # what lm-evaluation-harness takes where a task does not say
_KNOWN = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "seed"}


class TextModel:
    """Text in, figures out: what lm-evaluation-harness asks of a model, without it.

    variant: "dsa", or what stands beside it: "dense", "oracle", "window". max_length: tokens of a sequence, default the context;
    what is longer loses its beginning.
    """

    def __init__(
        self, folder: str | Path, variant: str = "dsa", max_length: int | None = None, dtype: str = "float32", device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        if variant not in VARIANTS:
            raise UsageError(f"variant {variant!r}: expected one of {', '.join(VARIANTS)}")
        context = context_of(Checkpoint.open(Path(folder)))
        length = context if max_length is None else max_length
        if not 1 < length <= context:
            raise UsageError(f"max_length {length}, expected 2 to the context of {context} tokens")
        variants = Variants(Path(folder), torch_dtype(dtype), device, every_logit=True)
        tokenizer: Any = load_tokenizer(Path(folder), trust_remote_code)
        ends = {*stop_tokens(Path(folder)), tokenizer.eos_token_id} - {None}
        self._use(variants.session(variant, 1, length), tokenizer, sorted(ends), str(folder))

    def _use(self, session: Any, tokenizer: Any, ends: Sequence[int], name: str) -> None:
        self.scorer, self.tokenizer, self._ends, self.name = Scorer(session), tokenizer, set(ends), name
        begin = tokenizer.bos_token_id
        self.prefix = begin if begin is not None else tokenizer.eos_token_id
        if self.prefix is None:
            raise UserError(
                f"{name}: the tokenizer has neither a first nor a last token, which rolling texts begin with"
            )

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Nats of the continuation, and whether a greedy answer would be it."""
        spaces = len(context) - len(context.rstrip())
        if spaces:  # a word's space belongs to its token
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if context:
            before, after = split(self.tokenizer, context, continuation)
        else:
            before = [self.prefix]
            after = self.tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]
        if not after:
            return 0.0, True
        ids = [*before, *after][-self.scorer.most - 1 :]
        return self.scorer.score(ids, max(1, len(ids) - len(after)))

    def rolling(self, text: str) -> float:
        """Nats of the whole text."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self.scorer.rolling(ids, self.prefix)

    def generate_until(self, context: str, how: Mapping[str, Any]) -> str:
        """How the text goes on, up to the first of `until`. Raises UsageError for settings that are not known here."""
        if unknown := sorted(how.keys() - _KNOWN):
            raise UsageError(f"generation setting {unknown[0]}: known here are {', '.join(sorted(_KNOWN))}")
        until = [how["until"]] if isinstance(how.get("until"), str) else list(how.get("until") or ())
        most = int(how.get("max_gen_toks", how.get("max_new_tokens", NEW_TOKENS)))
        sampled = bool(how.get("do_sample", False))
        sampling = Sampling(
            float(how.get("temperature", 1.0)) if sampled else 0.0,
            float(how.get("top_p", 1.0)),
            int(how.get("seed", 0)),
        )
        room = max(1, self.scorer.most - most + 1)
        ids = self.tokenizer(context, verbose=False)["input_ids"][-room:] or [self.prefix]

        def done(new: list[int]) -> bool:
            return new[-1] in self._ends or any(end in self.tokenizer.decode(new) for end in until)

        new = self.scorer.continued(ids, most, sampling, done)
        text: str = self.tokenizer.decode([token for token in new if token not in self._ends])
        return text[: min((text.index(end) for end in until if end in text), default=len(text))]


def harness_model(folder: str | Path, **options: Any) -> Any:
    """The `lm_eval.api.model.LM` of a DSA checkpoint. options: as for `TextModel`. Raises UserError without the package."""
    return wrapped(TextModel(folder, **options))


def wrapped(model: TextModel) -> Any:
    """`model` as lm-evaluation-harness has it."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError(f"lm-evaluation-harness cannot be loaded ({error}): pip install 'mla2dsa[harness]'") from error
    made = type("Adapter", (_Answers, LM), {})()
    made.model = model
    return made


class _Answers:
    """The part of an LM that is ours. Requests are answered in the order of their texts, so that those with one context follow one
    another."""

    model: TextModel
    cache_hook: Any  # an LM's

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return self._answered("loglikelihood", requests, self.model.loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return self._answered("loglikelihood_rolling", requests, self.model.rolling)

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self._answered("generate_until", requests, self.model.generate_until)

    def _answered(self, kind: str, requests: list[Any], answer: Callable[..., Any]) -> list[Any]:
        found: dict[int, Any] = {}
        for number in sorted(range(len(requests)), key=lambda number: str(requests[number].args[0])):
            arguments = requests[number].args
            found[number] = answer(*arguments)
            self.cache_hook.add_partial(kind, arguments, found[number])
        return [found[number] for number in range(len(requests))]

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        template = self.model.tokenizer.apply_chat_template
        going_on = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(template(chat_history, tokenize=False, **going_on))
