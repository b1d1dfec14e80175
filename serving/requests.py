"""What may be asked: the bodies of /v1/completions and /v1/chat/completions, and OpenAI's words for what is wrong with one.

A field that is not known, or that asks for what is not done here, is an error: an answer that ignored it would be compared.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..errors import short


def _false(value: bool) -> bool:
    if value:
        raise ValueError("Input should be false")
    return value


MOST_STOPS, MOST_STOP_LENGTH, MOST_MESSAGES = 4, 256, 1024
Text = Annotated[str, Field(min_length=1, max_length=MOST_STOP_LENGTH)]
Number = Annotated[float, Field(allow_inf_nan=False)]
One = Annotated[int, Field(ge=1, le=1)]  # Literal[1] takes true and 1.0, too: to Python they are equal
Never = Annotated[bool, AfterValidator(_false)]
_KINDS = {"str", "int", "constrained-str"}  # of a union, as pydantic calls them


class ApiError(Exception):
    """An answer in OpenAI's error format. retry_after: seconds until it may be worth while."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. content: a string, or parts that are text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(BaseModel):
    """include_usage: a last chunk counts the tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Format(BaseModel):
    """Of an answer: any text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class Asked(BaseModel):
    """What both kinds of request have. Fields of one value are there because clients send them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: Annotated[str, Field(max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: One | None = None
    presence_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


Kind = TypeVar("Kind", bound=Asked)


class CompletionAsked(Asked):
    """A text to continue, or its tokens."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] | Annotated[list[int], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Never | None = None
    best_of: One | None = None
    suffix: None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class ChatAsked(Asked):
    """A conversation to go on with."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def read_request(kind: type[Kind], body: bytes) -> Kind:
    """Raises ApiError 400 for what is no JSON object of this kind."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", "invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {type(value).__name__}, expected an object", "invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _told(error) from None


def _told(error: ValidationError) -> ApiError:
    """The first fault, by the field's name; of a field's value no more than what pydantic says was expected."""
    faults = error.errors(include_url=False, include_context=False)
    first = faults[0]
    field = str(first["loc"][0]) if first["loc"] else None
    if isinstance(first["input"], list):  # that it is no string is the least of what is wrong with a list
        first = next((it for it in faults if it["loc"][:1] == first["loc"][:1] and it["type"] != "string_type"), first)
    place = short(_place(first["loc"]))
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{place} is not taken by this server; leave it out", "unknown_parameter", field)
    if first["type"] == "missing":
        return ApiError(400, f"{place} is missing", "missing_required_parameter", field)
    return ApiError(400, f"{place}: {short(first['msg'].removeprefix('Value error, '), 200)}", "invalid_value", field)


def _place(loc: tuple[int | str, ...]) -> str:
    """messages[0].content, without the names that pydantic gives the kinds of a union."""
    *inner, last = loc or ("the body",)
    names = [it for it in inner if isinstance(it, int) or (it.isidentifier() and it not in _KINDS)]
    if isinstance(last, int) or (last not in _KINDS and "[" not in last):
        names.append(last)
    parts = (f"[{it}]" if isinstance(it, int) else f".{it}" for it in names)
    return "".join(parts).removeprefix(".")
