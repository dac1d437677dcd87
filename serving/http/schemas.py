"""What requests have in common: strict fields, how to sample, and the names that clients know them by."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from llm_jax.inference.request import (
    MAX_CONSTRAINT_CHARACTERS,
    MAX_LOGIT_BIAS,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOP_IDS,
    MAX_STOP_STRINGS,
    Constraint,
    InvalidRequest,
    SamplingParams,
    Usage,
)
from serving.asking import MAX_SAMPLES
from serving.calls import Calls
from serving.errors import Rejected, invalid
from serving.http.errors import Refused

INT32 = 2**31 - 1
MAX_USER_CHARACTERS = 512

TokenId = Annotated[int, Field(ge=0, le=INT32)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
ConstraintText = Annotated[str, Field(min_length=1, max_length=MAX_CONSTRAINT_CHARACTERS)]

# Fields of `SamplingParams` and what they are called here; the others have the same names.
RENAMED = {"stop_ids": "stop_token_ids", "num_samples": "n", "json_schema": "guided_json", "regex": "guided_regex",
           "grammar": "guided_grammar", "prompt_logprobs": "logprobs", "deadline_s": "deadline_seconds"}


def unsupported(why: str) -> pydantic.BeforeValidator:
    """For a field of OpenAI's that can only be absent or null: `Annotated[None, unsupported("…")]`."""

    def check(value: Any) -> None:
        if value is not None:
            raise PydanticCustomError("unsupported", "is not supported: {why}", {"why": why})

    return pydantic.BeforeValidator(check)


class Body(pydantic.BaseModel):
    """A request: a field that is not listed is refused by its name, and a number is not a string."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """Of a stream alone."""

    include_usage: bool | None = Field(None, description="Send the counts of tokens before the end, in an event of "
                                                         "their own without choices.")
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is added to hide lengths.")


class SamplingFields(Body):
    """What every request for text has: OpenAI's fields, and behind them the engine's own."""

    model: str | None = Field(None, description="The served model's name; absent is the served model.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="Completions of each prompt.")
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    logit_bias: dict[str, Bias] | None = Field(None, max_length=MAX_LOGIT_BIAS, description="By token id.")
    seed: int | None = Field(None, ge=-(2**63), le=MAX_SEED, description="The same seed draws the same text.")
    user: str | None = Field(None, max_length=MAX_USER_CHARACTERS, description="Accepted; changes nothing.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: int | None = Field(None, ge=-1, le=INT32, description="0 or -1 is off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: int | None = Field(None, ge=0, le=INT32)
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOP_IDS)
    guided_json: dict[str, Any] | ConstraintText | None = Field(None, description="A JSON schema for the text.")
    guided_regex: ConstraintText | None = Field(None, description="A regular expression for the whole text.")
    guided_grammar: ConstraintText | None = Field(None, description="A Lark grammar for the text.")
    priority: int | None = Field(None, ge=-INT32 - 1, le=INT32, description="Larger goes first among those that wait; "
                                 "from -1000 to 100 (admin, or no keys), 10 (developer) or 0 (user).")
    deadline_seconds: float | None = Field(None, gt=0, description="After this it ends with what there is.")

    @property
    def num_samples(self) -> int:
        """Completions of each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_stream(self) -> None:
        """Refuses options of a stream where there is none.

        Raises:
          Rejected: naming the field.
        """
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is for a stream: set stream to true, or leave it out", "stream_options")

    def constraint(self) -> Constraint | None:
        """What the text must be.

        Raises:
          Rejected: more than one is asked for.
        """
        schema = self.guided_json if isinstance(self.guided_json, str | None) else json.dumps(self.guided_json)
        asked = {"json_schema": schema, "regex": self.guided_regex, "grammar": self.guided_grammar}
        given = [(kind, text) for kind, text in asked.items() if text is not None]
        if len(given) > 1:
            names = " and ".join(RENAMED[kind] for kind, _ in given)
            raise invalid(f"{names} can't hold together: give one of them", RENAMED[given[1][0]])
        return Constraint(*given[0]) if given else None

    def sampling(self, calls: Calls, prompt_ids: Sequence[int], *, max_tokens: int, best_of: int = 0,
                 constraint: Constraint | None = None, **more: Any) -> SamplingParams:
        """The engine's form of this.

        Args:
          calls: the pipeline.
          prompt_ids: the prompt's tokens.
          max_tokens: 0 is as many as fit.
          best_of: as in `Calls.sampling`.
          constraint: instead of this request's own.
          **more: other fields of `SamplingParams`, `logprobs` among them.

        Raises:
          InvalidRequest, Rejected: naming the field; see `renamed`.
        """
        return calls.sampling(
            prompt_ids, max_tokens=max_tokens, num_samples=self.num_samples, best_of=best_of,
            temperature=self.temperature, top_k=None if self.top_k is None else max(0, self.top_k), top_p=self.top_p,
            min_p=self.min_p, repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, logit_bias=self._biases(),
            seed=None if self.seed is None else self.seed % 2**64,  # negative ones are as good
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()) or None,
            stop_ids=tuple(self.stop_token_ids or ()), min_tokens=self.min_tokens, ignore_eos=self.ignore_eos,
            constraint=constraint or self.constraint(), **more)

    def _biases(self) -> tuple[tuple[int, float], ...] | None:
        found = []
        for key, amount in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal() and int(key) <= INT32):
                raise invalid(f"logit_bias must have token ids for its keys, not {key!r:.80}", "logit_bias")
            found.append((int(key), amount))
        return tuple(found) or None


@contextlib.contextmanager
def renamed(names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Errors of the engine with the field's name as the client sent it.

    Args:
      names: by the engine's name; beside `RENAMED`.
    """
    known = RENAMED | dict(names or {})
    try:
        yield
    except (InvalidRequest, Rejected) as error:
        if error.field not in known:
            raise
        name, message = known[error.field], str(error)
        if message.startswith((f"{error.field} ", f"{error.field}=")):
            message = name + message[len(error.field):]
        if isinstance(error, InvalidRequest):
            raise invalid(message, name) from error
        if isinstance(error, Refused):
            raise Refused(error.reason, message, error.code, field=name) from error
        raise Rejected(error.reason, message, field=name, retry_after_s=error.retry_after_s) from error


class PromptDetails(pydantic.BaseModel):
    """More of the prompt's tokens."""

    cached_tokens: int


class CompletionUsage(pydantic.BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


def usage_body(usage: Usage) -> dict[str, Any]:
    """`CompletionUsage` as plain values."""
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}
