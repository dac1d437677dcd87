"""Completions from Python, through the same engine that serves."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence

import numpy as np

from llm_jax.errors import UserError
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.request import Delta, InvalidRequest, PromptLogprob, SamplingParams, TopLogprobs, Usage
from llm_jax.inference.requests import Listener
from llm_jax.inference.service import Service

# The engine of a lone caller: one row, and larger chunks of the prompt, as nobody waits beside it.
ALONE = EngineConfig(max_rows=1, prefill_rows=1, chunk=128)


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request, all of it.

    Attributes:
      text: the completion, without prompt, end token or stop string.
      token_ids, logprobs: the generated tokens and their log-probabilities (natural, of the untruncated distribution).
      top_logprobs: if asked for, the likeliest tokens beside each, as (id, log-probability).
      prompt_logprobs: if asked for, of the prompt's tokens from the second on.
      finish_reason: "stop", "length", "cancelled" or "error".
      usage: token counts.
      error: with "error", what happened.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    usage: Usage
    error: str | None = None
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[PromptLogprob, ...] = ()

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Completion:
        """The sum of a request's deltas."""
        last = deltas[-1]
        assert last.finish_reason is not None and last.usage is not None
        return cls("".join(d.text for d in deltas), tuple(t for d in deltas for t in d.token_ids),
                   tuple(p for d in deltas for p in d.logprobs), last.finish_reason, last.usage, last.error,
                   tuple(t for d in deltas for t in d.top_logprobs),
                   tuple(p for d in deltas for p in d.prompt_logprobs))

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; what `best_of` ranks by. Minus infinity without tokens."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else -math.inf


def complete(service: Service, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
    """Submits prompts (token ids) together, each with its parameters, and waits for all.

    An interrupt while waiting cancels them.
    """
    def submit(i: int, listener: Listener) -> int:
        return service.submit(prompts[i], params[i], listener)

    return [Completion.of(deltas) for deltas in _wait(service, submit, len(prompts))]


def best_of(service: Service, prompt: Sequence[int], params: SamplingParams, n: int = 1,
            candidates: int | None = None) -> list[Completion]:
    """Several completions of one prompt, drawn apart, the best first.

    Args:
      service: the engine's.
      prompt: token ids.
      params: of each; candidate i is its sample number i.
      n: how many are returned.
      candidates: how many are drawn; default n. The n of the highest mean log-probability are returned.
    """
    count = candidates or n
    if not 1 <= n <= count:
        raise InvalidRequest(f"n={n} must be at least 1 and at most best_of={count}")

    gathered: list[list[Delta]] = [[] for _ in range(count)]
    finished = threading.Semaphore(0)
    ids = service.submit_samples(prompt, [dataclasses.replace(params, sample=i) for i in range(count)],
                                 [_gather(into, finished) for into in gathered])
    _await(service, ids, finished)
    completions = [Completion.of(deltas) for deltas in gathered]
    return sorted(completions, key=lambda c: c.mean_logprob, reverse=True)[:n] if count > n else completions


def embed(service: Service, prompts: Sequence[Sequence[int]], pooling: str = "mean") -> np.ndarray:
    """Embeddings of texts (token ids), float32 [n, D]: "mean" or "last" of the model's normalised hidden states."""
    def submit(i: int, listener: Listener) -> int:
        return service.embed(prompts[i], pooling, listener)

    ends = [deltas[-1] for deltas in _wait(service, submit, len(prompts))]
    for end in ends:
        if end.embedding is None:
            raise UserError(f"no embedding was made: {end.error or end.finish_reason}")
    return np.stack([end.embedding for end in ends])


def _gather(into: list[Delta], finished: threading.Semaphore) -> Listener:
    def listen(delta: Delta) -> None:
        into.append(delta)
        if delta.finish_reason is not None:
            finished.release()
    return listen


def _wait(service: Service, submit: Callable[[int, Listener], int], count: int) -> list[list[Delta]]:
    finished = threading.Semaphore(0)
    gathered: list[list[Delta]] = [[] for _ in range(count)]
    ids: list[int] = []
    try:
        for i, into in enumerate(gathered):
            ids.append(submit(i, _gather(into, finished)))
    except BaseException:
        for request_id in ids:
            service.cancel(request_id)
        raise
    _await(service, ids, finished)
    return gathered


def _await(service: Service, ids: Sequence[int], finished: threading.Semaphore) -> None:
    try:
        for _ in ids:
            finished.acquire()
    except BaseException:
        for request_id in ids:
            service.cancel(request_id)
        raise
