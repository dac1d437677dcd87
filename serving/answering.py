"""One prompt's samples, from the engine to whoever tells them."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Awaitable, Callable, Sequence

from llm_jax.inference.request import Delta, SamplingParams, Unavailable, Usage
from serving.engine.front import Front
from serving.errors import RETRY_S, Reason, Rejected
from serving.mailbox import Gathered, Mailbox
from serving.metrics import Metrics

# Given the merged news of each sample that has any, and the seconds to each sample's first token so far.
Write = Callable[[dict[int, Delta], dict[int, float]], Awaitable[None]]
# Calls what hands a part to the engine, once there is room for it, and gives back what that returned.
Enter = Callable[[Callable[[], Awaitable[list[int]]]], Awaitable[list[int]]]
TOO_LATE = "the request's deadline, or the longest wait that the server allows, passed before its first token"


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of the engine.

    Attributes:
      prompt_ids: the prompt, beginning-of-sequence token included.
      sampling: what to do with it; `sample` is filled in by `params`, and only the first tells of the prompt.
      wanted: samples that are told.
      drawn: samples that are drawn; of more than `wanted` the likeliest are told, when all have finished.
      priority, tenant: see `Service.submit`.
      due: when it ends with what there is, on `time.monotonic`; None is never.
    """

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    wanted: int = 1
    drawn: int = 1
    priority: int = 0
    tenant: str = ""
    due: float | None = None

    @property
    def left_s(self) -> float | None:
        """Seconds until it is due.

        Raises:
          Rejected: DEADLINE; there are none.
        """
        left_s = None if self.due is None else self.due - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise Rejected(Reason.DEADLINE, TOO_LATE)
        return left_s

    def params(self) -> list[SamplingParams]:
        """Of each sample."""
        return [dataclasses.replace(self.sampling, sample=i,
                                    prompt_logprobs=None if i else self.sampling.prompt_logprobs)
                for i in range(self.drawn)]


class Answer:
    """A question that the engine works on.

    Args:
      question: what is asked.
      front: the engine.
      mailbox: where its news arrive.
      unfinished: ids of the engine's requests by sample; kept up here, and cancelled by whoever made it.
      on_first_token: called once.
      enter: waits for room.
    """

    def __init__(self, question: Question, front: Front, mailbox: Mailbox, unfinished: dict[int, int],
                 on_first_token: Callable[[], None], enter: Enter) -> None:
        self._question = question
        self._front = front
        self._mailbox = mailbox
        self._unfinished = unfinished
        self._on_first_token = on_first_token
        self._enter = enter
        self._arrived = time.monotonic()
        self._taken = False
        self._tokens = [0] * question.drawn
        self._usages: dict[int, Usage] = {}
        self._first_token: dict[int, float] = {}

    async def run(self, tell: Callable[[dict[int, Delta], dict[int, float]], Awaitable[set[int]]]) -> None:
        """Hands the samples' news to `tell` until each has finished.

        Args:
          tell: gives the samples that are to end here, though the engine would go on.

        Raises:
          Rejected: a sample failed.
          InvalidRequest, QueueFull, Unavailable: from the front.
        """
        q, unfinished = self._question, self._unfinished
        listeners = [functools.partial(self._mailbox.push, i) for i in range(q.drawn)]
        params = q.params()
        ids = await self._enter(lambda: self._front.submit_samples(
            q.prompt_ids, params, listeners, q.priority, tenant=q.tenant, deadline_s=q.left_s))
        unfinished.update(enumerate(ids))
        self._taken = True
        held = [Gathered() for _ in range(q.drawn if q.drawn > q.wanted else 0)]
        while unfinished:
            news = {i: delta for i, delta in (await self._mailbox.take()).items() if i in unfinished}
            for sample, delta in news.items():
                self._note(sample, delta)
                if held:
                    held[sample].add(delta)
            if news and not held:
                for sample in await tell(news, self._first_token):
                    if (request_id := unfinished.pop(sample, None)) is not None:
                        self._front.cancel(request_id)
        if held:
            await tell(*self._best([gathered.joined() for gathered in held]))

    def usage(self) -> Usage:
        """Tokens of all samples so far; the prompt's once, for it is computed once, and none if it was refused."""
        if not self._taken:
            return Usage(0, 0)
        ended = self._usages.values()
        return Usage(len(self._question.prompt_ids), sum(self._tokens),
                     max((u.cached_tokens for u in ended), default=0),
                     max((u.queue_seconds for u in ended), default=0.0))

    def report(self, metrics: Metrics) -> None:
        """Counts the tokens and times of the samples that have finished, or were ended here."""
        mailbox, usage = self._mailbox, self.usage()
        for seconds in self._first_token.values():
            metrics.first_token(seconds)
        for sample, first_at in mailbox.first_at.items():
            metrics.token_gap(mailbox.last_at[sample] - first_at, self._tokens[sample] - 1)
        if self._usages:
            metrics.queue_time(usage.queue_seconds)
            metrics.tokens(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

    def _note(self, sample: int, delta: Delta) -> None:
        self._tokens[sample] += len(delta.token_ids)
        if delta.token_ids and sample not in self._first_token:
            if not self._first_token:
                self._on_first_token()
            self._first_token[sample] = self._mailbox.first_at[sample] - self._arrived
        if delta.usage is not None:
            self._usages[sample] = delta.usage
        if delta.finish_reason is not None:
            del self._unfinished[sample]
            raise_if_failed(delta, self._front.is_live, began=sample in self._first_token)

    def _best(self, found: Sequence[Delta]) -> tuple[dict[int, Delta], dict[int, float]]:
        """The likeliest samples under their ranks, and the seconds to their first tokens."""
        best = sorted(range(len(found)), key=lambda i: -_mean_logprob(found[i]))[:self._question.wanted]
        ranked = {rank: dataclasses.replace(found[i], prompt_logprobs=() if rank else found[0].prompt_logprobs)
                  for rank, i in enumerate(best)}
        return ranked, {rank: self._first_token[i] for rank, i in enumerate(best) if i in self._first_token}


def raise_if_failed(delta: Delta, is_live: bool, began: bool = False) -> None:
    """Rejected, if that is how a sample ended.

    Args:
      delta: its last.
      is_live: whether the engine takes new requests; one that does not may have cut this one short.
      began: whether it has any token.
    """
    if delta.finish_reason == "error":  # a failed step, or a constraint that its tokens can't follow to the end
        raise Rejected(Reason.INTERNAL, delta.error or "the engine failed on this request")
    if delta.finish_reason == "deadline" and not began:
        raise Rejected(Reason.DEADLINE, TOO_LATE)
    if delta.finish_reason == "cancelled":
        if delta.error or not is_live:  # a process that ended may have said why before it is known to be gone
            raise Unavailable(delta.error or "the server shut down before this request was finished")
        raise Rejected(Reason.CANCELLED, "the request was cancelled by the server", retry_after_s=RETRY_S)


def _mean_logprob(delta: Delta) -> float:
    return math.fsum(delta.logprobs) / len(delta.logprobs) if delta.logprobs else -math.inf
