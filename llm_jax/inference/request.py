"""What is asked of the engine and what it answers; plain values, no JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from llm_jax.errors import UserError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024  # of one stop string: each token's text is compared with every beginning of it
MAX_SEED = 2**64 - 1


class InvalidRequest(UserError):
    """The request can never be served as it is."""


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for one new token."""


class QueueFull(UserError):
    """As many requests are waiting as are allowed; try again later."""


class Unavailable(UserError):
    """The service is draining or stopped."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one completion is drawn.

    Attributes:
      max_tokens: most tokens to generate; what the context leaves is used when that is less.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draw among the k most likely tokens; 0 is off.
      top_p: draw among the fewest tokens whose probabilities (after temperature and top_k) sum to at least this
        (Holtzman et al. 2019, arXiv:1904.09751); 1 is off.
      seed: with the same seed, sample and logits a position draws the same token, whatever else is in the batch. None
        takes a fresh seed.
      sample: which of several completions of one request this is.
      stop: strings at which the completion ends (one may be given as it is); they are not part of the text.
      ignore_eos: go on after the end token, to max_tokens.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    sample: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def check(name: str, good: bool, want: str) -> None:
            if not good:
                raise InvalidRequest(f"{name} must be {want}, not {getattr(self, name)!r}")

        def whole(name: str, least: int, most: int, want: str) -> None:
            value = getattr(self, name)
            check(name, isinstance(value, int) and not isinstance(value, bool) and least <= value <= most, want)

        def real(name: str, good: Callable[[float], bool], want: str) -> None:
            value = getattr(self, name)
            check(name, isinstance(value, (int, float)) and math.isfinite(value) and good(value), want)

        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        whole("max_tokens", 1, 2**31 - 1, "a whole number, at least 1")
        real("temperature", lambda t: 0 <= t <= 100, "between 0 and 100")
        whole("top_k", 0, 2**31 - 1, "0 (off) or a positive whole number")
        real("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1")
        if self.seed is not None:
            whole("seed", 0, MAX_SEED, "a whole number between 0 and 2^64 - 1")
        whole("sample", 0, 2**31 - 1, "0 or a positive whole number")
        if len(self.stop) > MAX_STOP_STRINGS or not all(
                isinstance(s, str) and 1 <= len(s) <= MAX_STOP_CHARACTERS for s in self.stop):
            raise InvalidRequest(f"stop must be at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARACTERS} "
                                 "characters each")


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a finished request; the end token is not counted."""

    prompt_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Delta:
    """News of a request.

    Attributes:
      text: characters that are final: never half a character, never the beginning of a stop string.
      token_ids: tokens generated since the last delta; their text may come later.
      logprobs: natural log-probability of each of them under the model (before temperature and truncation).
      finish_reason: None while it runs; "stop" (end token or stop string), "length", "cancelled" or "error".
      usage: on the last delta.
      error: with "error", what happened.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str | None = None
