"""Answers of deterministic requests, kept for a while: the same question gets the same answer without the engine."""

from __future__ import annotations

import array
import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Sequence

import cachetools

from llm_jax.inference.request import Delta, Usage
from serving.answering import Question

MAX_BYTES = 256 << 20  # of all answers together
_PER_TOKEN = 128  # bytes that an answer holds for each of its tokens, about: an id, a log-probability, four characters
_PER_LIKELIEST = 128  # for each of the likeliest that is told beside it: a pair, an id, a log-probability
_COMPLETE = ("stop", "length")


@dataclasses.dataclass(frozen=True)
class Kept:
    """An answer.

    Attributes:
      samples: those that were told, whole.
      usage: of all that were drawn, as the first caller was told it; the waiting is not kept.
    """

    samples: tuple[Delta, ...]
    usage: Usage


class ResponseCache:
    """What was answered lately; lives in one event loop.

    A request is deterministic if it takes the likeliest token each time or names its seed. Its answer is kept under the
    tenant, the model, the weights it is served with, the prompt and every field of its sampling: none of them tells
    another's answer. What was cut short (by a deadline, a filter, its client) is not kept.

    Args:
      model: the model's name.
      entries: answers, at most; the least recently used goes first, also when they are larger than `MAX_BYTES`.
      seconds: how long an answer is kept.
      clock: seconds.
    """

    def __init__(self, model: str = "", entries: int = 1024, seconds: float = 300.0,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        # One measure for both bounds: an answer counts as its bytes, or as its share if it has fewer.
        share = MAX_BYTES / entries
        self._kept: cachetools.TTLCache[bytes, Kept] = cachetools.TTLCache(
            MAX_BYTES, seconds, clock, lambda kept: max(share, sum(map(_size, kept.samples))))

    def __len__(self) -> int:
        return len(self._kept)

    def key(self, question: Question, weights: object = 0) -> bytes | None:
        """What the answer is kept under; None if another time there may be another answer.

        Args:
          question: what is asked.
          weights: tells those that are served now from those before them.
        """
        sampling = question.sampling
        if sampling.temperature > 0 and sampling.seed is None:
            return None
        # Priority and deadline change when an answer comes and whether it is complete, but not a complete one.
        asked = repr((question.tenant, self._model, weights, sampling, question.wanted, question.drawn))
        digest = hashlib.sha256(asked.encode("utf-8", "surrogatepass"))
        digest.update(array.array("q", question.prompt_ids).tobytes())
        return digest.digest()

    def get(self, key: bytes) -> Kept | None:
        """The answer; None if there is none."""
        return self._kept.get(key)

    def put(self, key: bytes, samples: Sequence[Delta], usage: Usage) -> None:
        """Keeps an answer if it is complete, and leaves room for others."""
        if all(sample.finish_reason in _COMPLETE for sample in samples):
            try:
                self._kept[key] = Kept(tuple(samples), dataclasses.replace(usage, queue_seconds=0.0))
            except ValueError:  # larger than everything that may be kept
                pass


def _size(delta: Delta) -> int:
    """Bytes that it holds, about."""
    likeliest = sum(map(len, delta.top_logprobs)) + sum(1 + len(one.top) for one in delta.prompt_logprobs)
    return sys.getsizeof(delta.text) + _PER_TOKEN * len(delta.token_ids) + _PER_LIKELIEST * likeliest
