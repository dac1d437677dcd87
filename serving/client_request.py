"""What the client sends and gets: its arguments as a message, messages as chunks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import numbers
import operator
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

from llm_jax.errors import UserError
from llm_jax.inference.request import Constraint, PromptLogprob, TopLogprobs
from serving import messages


class Asked(TypedDict, total=False):
    """How to go on with a prompt; what is left out is as the served model came configured, or off.

    Attributes:
      max_tokens: new tokens of each sample, at most; 0 is as many as fit.
      temperature, top_k, top_p, min_p, repetition_penalty, min_tokens: as in
        `llm_jax.inference.request.SamplingParams`; as the served model came configured where they are None.
      seed, presence_penalty, frequency_penalty, logit_bias, stop_ids, ignore_eos, constraint: as there.
      stop: strings before the first of which the text ends; one may be given as it is.
      logprobs: whether chunks carry log-probabilities.
      top_logprobs: those of how many of the likeliest tokens beside each.
      prompt_logprobs: the same for the prompt's tokens; None is not even their own.
      num_samples: samples of the one prompt.
      best_of: draw so many, and send the likeliest when all have finished; 0 is num_samples.
      priority: larger goes first among the requests that wait.
      tenant: whose request it is, if the server has no API keys to know it by; computed prompts are used again within
        a tenant alone.
      deadline_seconds: end with what there is after so long.
    """

    max_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str]
    stop_ids: Sequence[int]
    min_tokens: int | None
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: int | None
    constraint: Constraint | None
    num_samples: int
    best_of: int
    priority: int
    tenant: str
    deadline_seconds: float | None


_OF_THE_REQUEST = ("priority", "tenant", "deadline_seconds")


class WrongType(UserError, TypeError):
    """An argument is of a type that its field has no room for."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_list(value: Any, of: Any) -> bool:
    """Bytes are a sequence of whole numbers, and a text one of texts; neither is meant by it."""
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping) or not hasattr(value, "__iter__"):
        return False
    return hasattr(value, "__len__") and all(map(of, value))


# What an argument may be, in words, and whether a value is that; by the annotation, None left out.
_KINDS: dict[Any, tuple[str, Any]] = {
    str: ("text", lambda value: isinstance(value, str)),
    int: ("a whole number", _is_whole),
    float: ("a number", _is_number),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    Constraint: ("a Constraint", lambda value: isinstance(value, Constraint)),
    Sequence[int]: ("a list of whole numbers", lambda value: _is_list(value, _is_whole)),
    Mapping[int, float]: ("a dict of numbers by token id", lambda value: isinstance(value, Mapping) and all(
        _is_whole(token) and _is_number(amount) for token, amount in value.items())),
    str | Sequence[str]: ("text or a list of texts", lambda value: isinstance(value, str) or _is_list(
        value, lambda one: isinstance(one, str))),
    str | Sequence[int]: ("text or a list of token ids", lambda value: isinstance(value, str) or _is_list(
        value, _is_whole)),
    Sequence[str | Sequence[int]]: ("a list, each of text or of token ids", lambda value: _is_list(
        value, _KINDS[str | Sequence[int]][1])),
}


def check_type(name: str, value: Any, kind: Any) -> None:
    """Whether a value may stand in an argument.

    Args:
      name: of the argument.
      value: None is checked like any other.
      kind: its annotation; one of `_KINDS`.

    Raises:
      WrongType: it may not.
    """
    words, fits = _KINDS[kind]
    if not fits(value):
        raise WrongType(f"{name} must be {words}, not {value!r:.80}")


@functools.cache
def _asked_kinds() -> dict[str, Any]:
    """The annotations of `Asked`, None left out: that is as good as absent."""
    found = {}
    for name, hint in typing.get_type_hints(Asked).items():
        parts = [one for one in typing.get_args(hint) if one is not types.NoneType]
        is_union = isinstance(hint, types.UnionType)
        found[name] = functools.reduce(operator.or_, parts) if is_union else hint
    return found


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of one sample, as it arrives.

    Attributes:
      sample: which sample, from 0.
      text: whole characters.
      token_ids: tokens since the last chunk; their text may come later.
      logprobs: of each of token_ids, if asked for.
      top_logprobs: for each of them, if asked for, the likeliest tokens as (id, log-probability), the best first.
      prompt_logprobs: in the first chunks of sample 0, if asked for: the prompt's tokens from the second on.
      finish_reason: in the last chunk "stop", "length", "deadline" or "content_filter"; the JetStream protocol has
        none, so None there.
      prompt_tokens, completion_tokens, cached_tokens: in the last chunk; None in the JetStream protocol.
    """

    sample: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[PromptLogprob, ...] = ()


def generate_request(prompt: str | Sequence[int], asked: Asked) -> Any:
    """The message that asks for it.

    Raises:
      WrongType: the prompt or an argument is of another type.
      UserError: an argument is unknown, or does not fit its field.
    """
    check_type("prompt", prompt, str | Sequence[int])
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    unknown = given.keys() - Asked.__annotations__.keys()
    if unknown:
        raise UserError(f"{min(unknown)} is no argument; there are {', '.join(Asked.__annotations__)}")
    for name, value in given.items():
        check_type(name, value, _asked_kinds()[name])
    constraint = given.pop("constraint", None)
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    with checked():
        outside = {name: given.pop(name) for name in _OF_THE_REQUEST if name in given}
        request = messages.GenerateRequest(sampling=messages.Sampling(**given), **outside)
        if constraint is not None:
            setattr(request.sampling, constraint.kind, constraint.text)
        set_prompt(request, prompt)
    return request


def chunk(response: Any) -> Chunk:
    """A `GenerateResponse` as a chunk."""
    ended = response.HasField("usage")
    return Chunk(
        sample=response.sample, text=response.text, token_ids=tuple(response.token_ids),
        logprobs=tuple(response.logprobs), finish_reason=messages.finish_reason_name(response.finish_reason),
        prompt_tokens=response.usage.prompt_tokens if ended else None,
        completion_tokens=response.usage.completion_tokens if ended else None,
        cached_tokens=response.usage.cached_tokens if ended else None,
        top_logprobs=tuple(map(_pairs, response.top_logprobs)),
        prompt_logprobs=tuple(PromptLogprob(p.token_id, p.logprob, _pairs(p.top)) for p in response.prompt_logprobs))


def set_prompt(holder: Any, prompt: str | Sequence[int]) -> None:
    """Puts text or token ids into a message's `prompt`."""
    if isinstance(prompt, str):
        holder.text = prompt
    else:
        holder.token_ids.ids.extend(prompt)
        holder.token_ids.SetInParent()


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """UserError for a value that its field of the message can't hold."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"the request can't be sent: {error}") from None


def _pairs(top: Any) -> TopLogprobs:
    return tuple(zip(top.token_ids, top.logprobs, strict=True))
