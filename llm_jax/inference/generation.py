"""Completions from Python, through the same engine that serves."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

from llm_jax.inference.engine import EngineConfig
from llm_jax.inference.request import Delta, SamplingParams, Usage
from llm_jax.inference.service import Listener, Service

# The engine of a lone caller: one row, and larger chunks of the prompt, as nobody waits beside it.
ALONE = EngineConfig(max_rows=1, prefill_rows=1, chunk=128)


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request, all of it.

    Attributes:
      text: the completion, without prompt, end token or stop string.
      token_ids, logprobs: the generated tokens and their log-probabilities (natural, of the untruncated distribution).
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

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Completion:
        """The sum of a request's deltas."""
        last = deltas[-1]
        assert last.finish_reason is not None and last.usage is not None
        return cls("".join(d.text for d in deltas), tuple(t for d in deltas for t in d.token_ids),
                   tuple(p for d in deltas for p in d.logprobs), last.finish_reason, last.usage, last.error)


def complete(service: Service, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
    """Submits prompts (token ids) together, each with its parameters, and waits for all.

    An interrupt while waiting cancels them.
    """
    finished = threading.Semaphore(0)
    gathered: list[list[Delta]] = [[] for _ in prompts]

    def listener(into: list[Delta]) -> Listener:
        def listen(delta: Delta) -> None:
            into.append(delta)
            if delta.finish_reason is not None:
                finished.release()
        return listen

    ids = [service.submit(p, q, listener(into)) for p, q, into in zip(prompts, params, gathered, strict=True)]
    try:
        for _ in ids:
            finished.acquire()
    except BaseException:
        for request_id in ids:
            service.cancel(request_id)
        raise
    return [Completion.of(deltas) for deltas in gathered]
