"""What every door has in common: admit a request, submit its samples, stream their news, let go of what is left."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from llm_jax.inference.request import Delta, SamplingParams, Unavailable, Usage
from serving.access.guard import Guard
from serving.access.identity import Caller, Identity
from serving.admission import Admission, admitted
from serving.answering import Answer, Question, Write, raise_if_failed
from serving.asking import Asking
from serving.cache import ResponseCache
from serving.engine.front import front_of
from serving.filters import Filters
from serving.interactions import Interactions
from serving.mailbox import Closed, Gathered, Mailbox
from serving.metrics import Metrics
from serving.tracing import Traces


class Calls(Asking):
    """The running calls over one engine, whichever door they came through; lives in one event loop.

    Args:
      front: `serving.engine.front.Front`, or a `Service` of this process, or what behaves like one.
      guard: who may come in; None lets everybody in and writes nothing down.
      metrics: counts and times; None counts nothing.
      cache: answers of deterministic requests; None keeps none.
      filters: what prompts and answers go through; None changes nothing.
      interactions: the log of what was said; None keeps none.
      traces: where spans go; None makes none.

    Attributes:
      front, guard, metrics, cache: as given.
      accepting: whether new calls are taken; `refuse_new` ends that.
    """

    def __init__(self, front: Any, *, guard: Guard | None = None, metrics: Metrics | None = None,
                 cache: ResponseCache | None = None, filters: Filters | None = None,
                 interactions: Interactions | None = None, traces: Traces | None = None) -> None:
        super().__init__(front_of(front))
        self.guard = guard
        self.metrics = metrics
        self.cache = cache
        self.accepting = True
        self._filters = filters
        self._interactions = interactions
        self._traces = traces
        self._running: set[Mailbox] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_live(self) -> bool:
        """Whether a call that came now could be served."""
        return self.accepting and self.front.is_live

    def refuse_new(self) -> None:
        """From now on new calls end with UNAVAILABLE; the running ones go on."""
        self.accepting = False
        self.front.begin_drain()

    def cut(self) -> None:
        """Ends every running call with UNAVAILABLE."""
        for mailbox in self._running:
            mailbox.close()

    async def finished(self, timeout_s: float) -> bool:
        """Waits until no call runs; False if that took longer than `timeout_s`."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    @property
    def running(self) -> int:
        """Calls that are being answered."""
        return len(self._running)

    def admitted(self, caller: Caller, action: str, *, counted: bool = True) -> AbstractAsyncContextManager[Admission]:
        """A request from its arrival to its end: `async with calls.admitted(caller, "generate") as admission`.

        Asks the guard, counts the request by how it ends, and writes the audit line. What the block raises comes out
        as `Rejected`, but for the cancellation of its task and errors of gRPC's own, which come out as they are.

        Args:
          caller: as the door knows it.
          action: one of `access.identity.ACTIONS`.
          counted: whether it takes a place among the caller's requests; not so for a connection that brings requests,
            each of which is admitted by itself.

        Raises:
          Rejected: nobody is let in, or the block failed.
        """
        return admitted(caller, action, guard=self.guard, metrics=self.metrics, traces=self._traces, counted=counted)

    async def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        num_samples: int,
        priority: int,
        write: Write,
        *,
        admission: Admission,
        best_of: int = 0,
        deadline_s: float | None = None,
    ) -> None:
        """Runs `num_samples` samples of one prompt, handing their news to `write` until each has finished.

        However this ends (also by cancellation: the client left or its deadline passed), nothing of the call keeps
        running in the engine. An answer that a content filter ends has the finish_reason "content_filter".

        Args:
          prompt_ids: the prompt, beginning-of-sequence token included.
          sampling: what to do with it; `sample` is filled in here, and only the first tells of the prompt.
          num_samples: samples of the prompt; 0 means 1.
          priority: larger goes first among the requests that wait.
          write: given the merged delta of each sample with news, and the seconds to each sample's first token so far.
          admission: whose request it is; its usage is kept up.
          best_of: samples that are drawn; with more than num_samples, `write` is given the likeliest of them at the
            end, the best as number 0.
          deadline_s: seconds after which each sample ends with what it has.

        Raises:
          Rejected: with the reason for which the call should end.
          InvalidRequest, QueueFull, Unavailable: from the engine; `admitted` makes them `Rejected`.
        """
        arrived = time.monotonic()
        asked = prompt_ids
        with self._call() as (mailbox, unfinished):
            if self._filters is not None:
                prompt_ids = await self._filters.before(prompt_ids, self.front.tokenizer, _who(admission))
            wanted = num_samples or 1
            question = Question(prompt_ids, sampling, wanted, best_of or wanted, admission.priority(priority),
                                admission.tenant, deadline_s)
            admission.reserve(len(prompt_ids) + question.drawn * sampling.max_tokens)
            watch = None if self._filters is None else self._filters.watch(_who(admission), len(prompt_ids))
            told: list[Gathered] = [Gathered() for _ in range(wanted)] if self._interactions is not None else []

            async def tell(news: dict[int, Delta], first_token: dict[int, float]) -> set[int]:
                stopped: set[int] = set()
                if watch is not None:
                    news, stopped = await watch.seen(news)
                if told:
                    for sample, delta in news.items():
                        told[sample].add(delta)
                if news:
                    await write(news, first_token)
                return stopped

            try:
                await self._answered(question, admission, tell, mailbox, unfinished)
            finally:
                if self._interactions is not None and any(one.token_ids or one.last for one in told):
                    self._interactions.add(admission, asked, sampling, [one.joined() for one in told],
                                           self.front.tokenizer)
        if self.metrics is not None:
            self.metrics.end_to_end(time.monotonic() - arrived)

    async def _answered(self, question: Question, admission: Admission, tell: Any, mailbox: Mailbox,
                        unfinished: dict[int, int]) -> None:
        """Answers from the cache or the engine."""
        began = time.monotonic()
        key = None if self.cache is None else self.cache.key(question, self.front.weights_version)
        if self.cache is not None and key is not None:
            found = self.cache.get(key)
            if self.metrics is not None:
                self.metrics.cache(found is not None)
            if found is not None:
                admission.add_usage(Usage(len(question.prompt_ids), sum(len(d.token_ids) for d in found)))
                await tell(dict(enumerate(found)), dict.fromkeys(range(len(found)), time.monotonic() - began))
                return
        whole = [Gathered() for _ in range(question.wanted if key is not None else 0)]

        async def keep(news: dict[int, Delta], first_token: dict[int, float]) -> set[int]:
            for sample, delta in news.items():
                whole[sample].add(delta)
            return await tell(news, first_token)

        answer = Answer(question, self.front, mailbox, unfinished, admission.span.first_token)
        try:
            await answer.run(keep if whole else tell)
        finally:
            admission.add_usage(answer.usage())
            if self.metrics is not None:
                answer.report(self.metrics)
        if self.cache is not None and key is not None:
            self.cache.put(key, [one.joined() for one in whole])

    async def collect(self, prompt_ids: Sequence[int], sampling: SamplingParams, num_samples: int, priority: int, *,
                      admission: Admission, best_of: int = 0, deadline_s: float | None = None) -> list[Delta]:
        """The same in one piece: each sample's deltas joined. Arguments and errors as of `stream`."""
        found = [Gathered() for _ in range(num_samples or 1)]

        async def write(news: dict[int, Delta], _first_token: dict[int, float]) -> None:
            for sample, delta in news.items():
                found[sample].add(delta)

        await self.stream(prompt_ids, sampling, num_samples, priority, write, admission=admission, best_of=best_of,
                          deadline_s=deadline_s)
        return [one.joined() for one in found]

    async def embed(self, prompts: Sequence[Sequence[int]], pooling: str, priority: int, *,
                    admission: Admission) -> list[Delta]:
        """The embedding of each prompt, as the last delta of its request.

        Args:
          prompts: token ids.
          pooling, priority: see `Service.embed`.
          admission: whose request it is; its usage is kept up.

        Raises:
          as `stream`.
        """
        found: dict[int, Delta] = {}
        with self._call() as (mailbox, unfinished):
            if self._filters is not None:
                prompts = [await self._filters.before(p, self.front.tokenizer, _who(admission)) for p in prompts]
            admission.reserve(sum(map(len, prompts)))
            for i, prompt_ids in enumerate(prompts):
                unfinished[i] = await self.front.embed(prompt_ids, pooling, functools.partial(mailbox.push, i),
                                                       admission.priority(priority))
                admission.add_usage(Usage(len(prompt_ids), 0))
                await asyncio.sleep(0)  # each takes time with the prompt's length: other calls come in between
            while unfinished:
                for i, delta in (await mailbox.take()).items():
                    del unfinished[i]  # there is but one delta of each
                    raise_if_failed(delta, self.front.is_live)
                    found[i] = delta
        if self.metrics is not None:
            self.metrics.tokens(sum(map(len, prompts)), 0, 0)
        return [found[i] for i in range(len(prompts))]

    @contextlib.contextmanager
    def _call(self) -> Iterator[tuple[Mailbox, dict[int, int]]]:
        """A call while it runs: where its news arrive, and the ids of its requests, to be kept up by the caller."""
        if not self.accepting:
            raise Unavailable("the server is shutting down and takes no new requests")
        mailbox = Mailbox(asyncio.get_running_loop())
        unfinished: dict[int, int] = {}
        self._running.add(mailbox)
        self._idle.clear()
        try:
            yield mailbox, unfinished
        except Closed:
            raise Unavailable("the server shut down before this request was finished") from None
        finally:
            for request_id in unfinished.values():
                self.front.cancel(request_id)
            self._running.discard(mailbox)
            if not self._running:
                self._idle.set()


def _who(admission: Admission) -> Identity:
    return admission.identity or Identity(tenant=admission.tenant)
