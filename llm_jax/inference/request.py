"""What is asked of the engine and what it answers; plain values, no JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.errors import UserError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024  # of one stop string: each token's text is compared with every beginning of it
MAX_STOP_IDS = 64
MAX_LOGIT_BIAS = 300
MAX_LOGPROBS = 20
MAX_CONSTRAINT_CHARACTERS = 100_000
MAX_SEED = 2**64 - 1
CONSTRAINTS = ("json_schema", "regex", "grammar")


class InvalidRequest(UserError):
    """The request can never be served as it is.

    Attributes:
      field: of the request, that is at fault; None if it is no single one.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for one new token."""

    def __init__(self, message: str, field: str | None = "prompt") -> None:
        super().__init__(message, field)


class QueueFull(UserError):
    """As many requests are waiting as are allowed; try again later."""


class DeadlineExceeded(UserError):
    """The request was still waiting when its deadline, or the longest wait allowed, had passed."""


class Unavailable(UserError):
    """The service is draining or stopped."""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A language that the completion must belong to.

    Attributes:
      kind: "json_schema" (JSON Schema as text; `{}` is any JSON), "regex" (the whole completion) or "grammar" (Lark).
      text: the schema, expression or grammar.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        if self.kind not in CONSTRAINTS:
            raise InvalidRequest(f"constraint must be one of {', '.join(CONSTRAINTS)}, not {self.kind!r}", "constraint")
        if not isinstance(self.text, str) or not 1 <= len(self.text) <= MAX_CONSTRAINT_CHARACTERS:
            raise InvalidRequest(f"a {self.kind} must have 1 to {MAX_CONSTRAINT_CHARACTERS} characters", self.kind)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one completion is drawn.

    Of what restricts the draw, penalties and logit_bias change the logits first, then the constraint and min_tokens
    forbid tokens, then temperature divides, and top_k, top_p and min_p cut, in this order.

    Attributes:
      max_tokens: most tokens to generate; what the context leaves is used when that is less.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draw among the k most likely tokens; 0 is off.
      top_p: draw among the fewest tokens whose probabilities (after temperature and top_k) sum to at least this
        (Holtzman et al. 2019, arXiv:1904.09751); 1 is off.
      min_p: draw among the tokens at least this times as likely as the likeliest, after temperature (Nguyen et al.
        2024, arXiv:2407.01082); 0 is off.
      repetition_penalty: divides positive and multiplies negative logits of tokens of the prompt or the completion
        (Keskar et al. 2019, arXiv:1909.05858); 1 is off.
      presence_penalty: taken from the logits of tokens that the completion has already; 0 is off.
      frequency_penalty: the same, for each time that it has them.
      logit_bias: (token id, amount) pairs; the amount is added to the token's logit. A mapping may be given.
      seed: with the same seed, sample and logits a position draws the same token, whatever else is in the batch. None
        takes a fresh seed.
      sample: which of several completions of one request this is.
      stop: strings at which the completion ends (one may be given as it is); they are not part of the text.
      stop_ids: tokens at which it ends, beside the model's end tokens; not part of the completion either.
      min_tokens: no end token and no stop id is drawn before so many tokens; stop strings end it all the same.
      ignore_eos: go on after the end token, to max_tokens; stop and stop_ids end it all the same.
      logprobs: how many of the likeliest tokens to report beside each token drawn; 0 is none.
      prompt_logprobs: the same for each token of the prompt but the first; None is not even its own.
      constraint: what the completion must be; None is anything.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    sample: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int = 0
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        def check(name: str, good: bool, want: str) -> None:
            if not good:
                raise InvalidRequest(f"{name} must be {want}, not {getattr(self, name)!r}", name)

        def whole(name: str, least: int, most: int, want: str) -> None:
            check(name, _is_whole(getattr(self, name), least, most), want)

        def real(name: str, good: Callable[[float], bool], want: str) -> None:
            value = getattr(self, name)
            check(name, isinstance(value, (int, float)) and math.isfinite(value) and good(value), want)

        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        whole("max_tokens", 1, 2**31 - 1, "a whole number, at least 1")
        real("temperature", lambda t: 0 <= t <= 100, "between 0 and 100")
        whole("top_k", 0, 2**31 - 1, "0 (off) or a positive whole number")
        real("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1")
        real("min_p", lambda p: 0 <= p <= 1, "between 0 (off) and 1")
        real("repetition_penalty", lambda p: 0 < p <= 100, "above 0 and at most 100")
        real("presence_penalty", lambda p: -100 <= p <= 100, "between -100 and 100")
        real("frequency_penalty", lambda p: -100 <= p <= 100, "between -100 and 100")
        if self.seed is not None:
            whole("seed", 0, MAX_SEED, "a whole number between 0 and 2^64 - 1")
        whole("sample", 0, 2**31 - 1, "0 or a positive whole number")
        whole("min_tokens", 0, self.max_tokens, f"between 0 and max_tokens ({self.max_tokens})")
        whole("logprobs", 0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
        if self.prompt_logprobs is not None:
            whole("prompt_logprobs", 0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
        if len(self.stop) > MAX_STOP_STRINGS or not all(
                isinstance(s, str) and 1 <= len(s) <= MAX_STOP_CHARACTERS for s in self.stop):
            raise InvalidRequest(f"stop must be at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARACTERS} "
                                 "characters each", "stop")
        check("stop_ids", len(self.stop_ids) <= MAX_STOP_IDS and all(_is_whole(i, 0, 2**31 - 1) for i in self.stop_ids),
              f"at most {MAX_STOP_IDS} token ids")
        check("logit_bias", len(self.logit_bias) <= MAX_LOGIT_BIAS and all(
            len(pair) == 2 and _is_whole(pair[0], 0, 2**31 - 1) and isinstance(pair[1], (int, float))
            and math.isfinite(pair[1]) and -100 <= pair[1] <= 100 for pair in self.logit_bias),
            f"at most {MAX_LOGIT_BIAS} token ids, each with an amount between -100 and 100")


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a finished request; the end token is not counted.

    Attributes:
      cached_tokens: those of the prompt whose keys and values were in the prefix cache.
      queue_seconds: from the request's arrival to the first step that it took part in, or to its end if there was none.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queue_seconds: float = dataclasses.field(default=0.0, compare=False)


TopLogprobs = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class PromptLogprob:
    """A token of the prompt: its natural log-probability after those before it, and the likeliest there."""

    token_id: int
    logprob: float
    top: TopLogprobs = ()


@dataclasses.dataclass(frozen=True)
class Delta:
    """News of a request.

    Attributes:
      text: characters that are final: never half a character, never the beginning of a stop string.
      token_ids: tokens generated since the last delta; their text may come later.
      logprobs: natural log-probability of each of them under the model (before temperature and truncation).
      top_logprobs: for each of them, if asked for, the likeliest tokens as (id, log-probability), the best first.
      prompt_logprobs: if asked for, with the first delta: the prompt's tokens from the second on.
      finish_reason: None while it runs; "stop" (end token, stop id or string), "length", "cancelled", "deadline" or
        "error".
      usage: on the last delta.
      error: with "error", what happened; with "cancelled", why nobody can answer any more, where that is so.
      embedding: of a request for one, float32 [D], with the only delta.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str | None = None
    embedding: Any = None
