"""What every door has in common: admit a request, submit its samples, stream their news, let go of what is left."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

from llm_jax.inference.request import Delta, SamplingParams, Unavailable, Usage
from serving.access.guard import SPENDING, Guard
from serving.access.identity import Caller, Identity
from serving.admission import Admission, admitted
from serving.answering import TOO_LATE, Answer, Question, Write, raise_if_failed
from serving.asking import Asking
from serving.cache import ResponseCache
from serving.engine.front import front_of
from serving.errors import Reason, Rejected
from serving.filters import Filters
from serving.interactions import Interactions
from serving.mailbox import Closed, Gathered, Mailbox
from serving.metrics import Metrics
from serving.room import Room
from serving.tracing import Traces

DRAINING = "the server is shutting down and takes no new requests"
CUT = "the server shut down before this request was finished"
Submitted = TypeVar("Submitted")


class Calls(Asking):
    """The running calls over one engine, whichever door they came through; lives in one event loop.

    A request is what is admitted; it may have several parts (prompts), each of which is a call of `stream`, `collect`
    or `embed`. Its first part is refused if the engine's queue is full; those behind it wait for room (`Room`). When
    the server is told to stop, requests that were admitted before go on to their last part, and others are refused.

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
      accepting: whether new requests are taken; `refuse_new` ends that.
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
        self._room = Room()
        self._requests: set[Admission] = set()  # those that were taken, and have not ended
        self._running: set[Mailbox] = set()  # of their parts that run now
        self._cut = False
        self._idle = asyncio.Event()  # while there is no request
        self._idle.set()

    @property
    def is_live(self) -> bool:
        """Whether a request that came now could be served."""
        return self.accepting and self.front.is_live

    def refuse_new(self) -> None:
        """From now on new requests end with UNAVAILABLE; those that run go on, also with parts not begun yet.

        The engine is told when the last of them has ended: it can't tell their parts from new requests.
        """
        self.accepting = False
        self._drain_if_idle()

    def cut(self) -> None:
        """Ends every request that runs with UNAVAILABLE."""
        self._cut = True
        for mailbox in self._running:
            mailbox.close()
        self.front.begin_drain()

    async def finished(self, timeout_s: float) -> bool:
        """Waits until no request runs; False if that took longer than `timeout_s`."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._requests)

    @contextlib.asynccontextmanager
    async def admitted(self, caller: Caller, action: str, *, counted: bool = True) -> AsyncIterator[Admission]:
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
        async with admitted(caller, action, guard=self.guard, metrics=self.metrics, traces=self._traces,
                            counted=counted) as admission:
            if not self.accepting or not counted or action not in SPENDING:
                yield admission
                return
            self._requests.add(admission)
            self._idle.clear()
            try:
                yield admission
            finally:
                self._requests.discard(admission)
                self._drain_if_idle()

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

        This is a request, or one part of it.

        However this ends (also by cancellation: the client left or its deadline passed), nothing of the call keeps
        running in the engine. An answer that a content filter ends has the finish_reason "content_filter".

        Args:
          prompt_ids: the prompt, beginning-of-sequence token included.
          sampling: what to do with it; `sample` is filled in here, and only the first tells of the prompt.
          num_samples: samples of the prompt; 0 means 1.
          priority: larger goes first among the requests that wait; within `Admission.priority`'s limits.
          write: given the merged delta of each sample with news, and the seconds to each sample's first token so far.
          admission: whose request it is; its usage is kept up.
          best_of: samples that are drawn; with more than num_samples, `write` is given the likeliest of them at the
            end, the best as number 0.
          deadline_s: seconds from the request's arrival after which each sample ends with what it has.

        Raises:
          Rejected: with the reason for which the call should end.
          InvalidRequest, QueueFull, Unavailable: from the engine; `admitted` makes them `Rejected`.
        """
        arrived = time.monotonic()
        asked = prompt_ids
        with self._call(admission) as (mailbox, unfinished):
            priority = admission.priority(priority)
            if self._filters is not None:
                async with mailbox.open():
                    prompt_ids = await self._filters.before(prompt_ids, self.front.tokenizer, _who(admission))
            wanted = num_samples or 1
            question = Question(prompt_ids, sampling, wanted, best_of or wanted, priority, admission.tenant,
                                None if deadline_s is None else admission.began + deadline_s)
            admission.reserve(self.most_tokens(prompt_ids, question.drawn, sampling.max_tokens))
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
                admission.entrant.begun = True  # and is not refused any more: some of it is told
                admission.add_usage(found.usage)
                await tell(dict(enumerate(found.samples)),
                           dict.fromkeys(range(len(found.samples)), time.monotonic() - began))
                return
        whole = [Gathered() for _ in range(question.wanted if key is not None else 0)]

        async def keep(news: dict[int, Delta], first_token: dict[int, float]) -> set[int]:
            for sample, delta in news.items():
                whole[sample].add(delta)
            return await tell(news, first_token)

        enter = functools.partial(self._entered, admission, mailbox, question.priority, question.due)
        answer = Answer(question, self.front, mailbox, unfinished, admission.span.first_token, enter)
        try:
            await answer.run(keep if whole else tell)
        finally:
            admission.add_usage(answer.usage())
            if self.metrics is not None:
                answer.report(self.metrics)
        if self.cache is not None and key is not None:
            self.cache.put(key, [one.joined() for one in whole], answer.usage())

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
        with self._call(admission) as (mailbox, unfinished):
            priority = admission.priority(priority)
            if self._filters is not None:
                async with mailbox.open():
                    prompts = [await self._filters.before(p, self.front.tokenizer, _who(admission)) for p in prompts]
            admission.reserve(sum(map(len, prompts)))
            for i, prompt_ids in enumerate(prompts):
                submit = functools.partial(self.front.embed, prompt_ids, pooling, functools.partial(mailbox.push, i),
                                           priority)
                unfinished[i] = await self._entered(admission, mailbox, priority, None, submit)
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

    async def _entered(self, admission: Admission, mailbox: Mailbox, priority: int, due: float | None,
                       submit: Callable[[], Awaitable[Submitted]]) -> Submitted:
        """What `submit` returns, once the engine's queue had room; a deadline and the server's end count meanwhile."""
        limit = asyncio.timeout(None if due is None else due - time.monotonic())
        try:
            async with limit, mailbox.open():
                return await self._room.enter(admission.entrant, priority, submit)
        except TimeoutError:
            if not limit.expired():
                raise
            raise Rejected(Reason.DEADLINE, TOO_LATE) from None

    @contextlib.contextmanager
    def _call(self, admission: Admission) -> Iterator[tuple[Mailbox, dict[int, int]]]:
        """A call while it runs: where its news arrive, and the ids of its requests, to be kept up by the caller."""
        if not self.accepting and (self._cut or admission not in self._requests):
            raise Unavailable(CUT if admission in self._requests else DRAINING)
        mailbox = Mailbox(asyncio.get_running_loop(), self._room.freed)
        unfinished: dict[int, int] = {}
        self._running.add(mailbox)
        try:
            yield mailbox, unfinished
        except Closed:
            raise Unavailable(CUT) from None
        finally:
            for request_id in unfinished.values():
                self.front.cancel(request_id)
            self._running.discard(mailbox)
            self._room.freed()

    def _drain_if_idle(self) -> None:
        if not self._requests:
            self._idle.set()
            if not self.accepting:
                self.front.begin_drain()


def _who(admission: Admission) -> Identity:
    return admission.identity or Identity(tenant=admission.tenant)
