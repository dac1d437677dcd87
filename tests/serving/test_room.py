"""Requests of several parts: refused at once or run to their end, also while the queue is full or the server drains."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from llm_jax.inference.generation_config import SamplingDefaults
from llm_jax.inference.request import Delta, QueueFull, SamplingParams, Unavailable, Usage
from serving.access.identity import Caller
from serving.cache import ResponseCache
from serving.calls import Calls
from serving.errors import Reason, Rejected
from serving.room import Entrant, Room
from tests.serving.doubles import CharacterTokenizer

TEXT = SamplingParams(max_tokens=1)


class Desk:
    """A front whose requests end when the test says so.

    Attributes:
      open: listeners of what runs and waits, by id; at most `most` of them.
      came: the prompts that were taken, in order.
      hold: `submit_samples` waits for it, as for a grammar that is compiled.
    """

    tokenizer = CharacterTokenizer()
    defaults = SamplingDefaults()
    max_context, max_prompt_tokens, weights_version = 1000, 999, 0

    def __init__(self, most: int) -> None:
        self.max_requests = most
        self.open: dict[int, Callable[[Delta], None]] = {}
        self.came: list[Sequence[int]] = []
        self.is_live = True
        self.hold = asyncio.Event()
        self.hold.set()
        self._changed = asyncio.Condition()

    async def submit_samples(self, prompt_ids: Sequence[int], params: Sequence[SamplingParams], listeners: Any,
                             priority: int = 0, *, tenant: str = "", deadline_s: float | None = None) -> list[int]:
        await self.hold.wait()
        if not self.is_live:
            raise Unavailable("the engine takes nothing")
        if len(self.open) + len(listeners) > self.max_requests:
            raise QueueFull("full")
        ids = [len(self.came) + i for i in range(len(listeners))]
        self.came += [prompt_ids] * len(listeners)
        self.open |= zip(ids, listeners, strict=True)
        return ids

    async def embed(self, prompt_ids: Sequence[int], pooling: str, listener: Any, priority: int = 0) -> int:
        return (await self.submit_samples(prompt_ids, [TEXT], [listener]))[0]

    def cancel(self, request_id: int) -> None:
        self.open.pop(request_id, None)

    def begin_drain(self) -> None:
        self.is_live = False

    def end(self, count: int = 1, **fields: Any) -> None:
        """Ends the oldest so many."""
        for request_id in list(self.open)[:count]:
            self.open.pop(request_id)(Delta(**{
                "text": "x", "token_ids": (5,), "logprobs": (-1.0,), "finish_reason": "stop", "usage": Usage(1, 1),
                "embedding": np.zeros(2)} | fields))


async def settled() -> None:
    """Everything that can go on without news has gone on."""
    for _ in range(50):
        await asyncio.sleep(0)


async def ask(calls: Calls, prompts: Sequence[int], *, samples: int = 1, priority: int = 0,
              deadline_s: float | None = None, sampling: SamplingParams = TEXT) -> int:
    """A request with a part for each prompt, all at once; the completions that came."""
    async with calls.admitted(Caller("http", "test", "1"), "generate") as admission:
        try:
            async with asyncio.TaskGroup() as group:
                parts = [group.create_task(calls.collect([prompt], sampling, samples, priority, admission=admission,
                                                         deadline_s=deadline_s)) for prompt in prompts]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return sum(len(part.result()) for part in parts)


async def embed(calls: Calls, *parts: Sequence[int]) -> int:
    """A request whose parts follow one another; the vectors that came."""
    async with calls.admitted(Caller("http", "test", "1"), "embed") as admission:
        return sum([len(await calls.embed([[prompt] for prompt in part], "mean", 0, admission=admission))
                    for part in parts])


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))


async def refused(task: Awaitable[Any]) -> Reason:
    with pytest.raises(Rejected) as caught:
        await task
    return caught.value.reason


def test_two_requests_that_fill_the_queue_both_run_to_their_end():
    async def work() -> None:
        desk = Desk(4)
        calls = Calls(desk)
        first = asyncio.create_task(ask(calls, range(6)))
        await settled()
        assert len(desk.open) == 4  # two parts of it wait
        desk.end()
        await settled()
        assert len(desk.open) == 4
        desk.end(2)
        await settled()
        second = asyncio.create_task(ask(calls, range(10, 14)))  # one of it finds room; the others wait
        await settled()
        while not (first.done() and second.done()):
            desk.end()
            await settled()
        assert (first.result(), second.result()) == (6, 4) and not desk.open

    run(work)


def test_a_request_is_refused_before_anything_of_it_runs():
    async def work() -> None:
        desk = Desk(2)
        calls = Calls(desk)
        others = [asyncio.create_task(ask(calls, [i])) for i in range(2)]
        await settled()
        assert await refused(ask(calls, [7, 8, 9])) is Reason.QUEUE_FULL
        assert await refused(embed(calls, [7, 8, 9])) is Reason.QUEUE_FULL
        assert len(desk.came) == 2
        desk.end(2)
        assert await asyncio.gather(*others) == [1, 1]

    run(work)


def test_a_request_of_which_the_cache_has_told_some_is_not_refused():
    async def work() -> None:
        desk = Desk(1)
        calls = Calls(desk, cache=ResponseCache())
        known = asyncio.create_task(ask(calls, [1]))
        await settled()
        desk.end()
        assert await known == 1
        other = asyncio.create_task(ask(calls, [2]))
        await settled()
        asked = asyncio.create_task(ask(calls, [1, 3]))
        await settled()
        desk.end()
        await settled()
        desk.end()
        assert (await other, await asked) == (1, 2) and desk.came == [[1], [2], [3]]

    run(work)


def test_embeddings_wait_for_room_behind_their_first():
    async def work() -> None:
        desk = Desk(2)
        calls = Calls(desk)
        asked = asyncio.create_task(embed(calls, range(5)))
        for _ in range(5):
            await settled()
            assert len(desk.open) <= 2
            desk.end()
        assert await asked == 5

    run(work)


def test_a_part_of_many_samples_is_not_passed_by_small_requests():
    async def work() -> None:
        desk = Desk(3)
        calls = Calls(desk)
        large = asyncio.create_task(ask(calls, [1, 2], samples=2))
        await settled()
        assert desk.came == [[1], [1]]
        assert await refused(ask(calls, [3])) is Reason.QUEUE_FULL  # there is a place, but somebody waits for two
        urgent = asyncio.create_task(ask(calls, [4], priority=1))
        await settled()
        assert desk.came[2:] == [[4]]
        desk.end(1)
        await settled()
        assert len(desk.came) == 3
        desk.end(1)
        await settled()
        assert desk.came[3:] == [[2], [2]]
        desk.end(3)
        assert (await large, await urgent) == (4, 1)

    run(work)


def test_parts_wait_by_priority_and_then_in_the_order_they_came():
    async def work() -> None:
        room, entrant, places, order = Room(), Entrant(), 0, []
        entrant.begun = True

        async def part(name: str, priority: int) -> None:
            async def submit() -> None:
                nonlocal places
                await asyncio.sleep(0)
                if not places:
                    raise QueueFull("full")
                places -= 1
                order.append(name)

            await room.enter(entrant, priority, submit)

        async with asyncio.TaskGroup() as group:
            for name, priority in (("a", 0), ("b", 0), ("urgent", 2), ("late", -1), ("c", 0)):
                group.create_task(part(name, priority))
                await settled()
            for count in range(1, 6):
                places = 1
                room.freed()
                await settled()
                assert len(order) == count
        assert order == ["urgent", "a", "b", "c", "late"]

    run(work)


def test_a_deadline_counts_while_a_part_waits():
    async def work() -> None:
        desk = Desk(1)
        calls = Calls(desk)
        assert await refused(ask(calls, [1, 2], deadline_s=0.05)) is Reason.DEADLINE
        assert desk.came == [[1]] and not desk.open and calls.running == 0

    run(work)


def test_a_deadline_counts_from_the_requests_arrival():
    async def work() -> None:
        desk = Desk(4)
        calls = Calls(desk)
        async with calls.admitted(Caller("http", "test", "1"), "generate") as admission:
            admission.began -= 60  # as if reading its prompts had taken so long
            with pytest.raises(Rejected) as caught:
                await calls.collect([1], TEXT, 1, 0, admission=admission, deadline_s=60)
        assert caught.value.reason is Reason.DEADLINE and not desk.came

    run(work)


def test_a_client_that_leaves_while_a_part_waits_lets_others_pass():
    async def work() -> None:
        desk = Desk(2)
        calls = Calls(desk)
        leaving = asyncio.create_task(ask(calls, [1, 2], samples=2))
        await settled()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert not desk.open and calls.running == 0
        other = asyncio.create_task(ask(calls, [3]))
        await settled()
        desk.end()
        assert await other == 1 and desk.came == [[1], [1], [3]]

    run(work)


def test_room_that_others_made_is_found(monkeypatch):
    """An engine in this process may be asked by others than the doors."""
    monkeypatch.setattr("serving.room.AGAIN_S", 0.01)

    async def work() -> None:
        room, entrant, full = Room(), Entrant(), False

        async def submit() -> int:
            if full:
                raise QueueFull("full")
            return 7

        assert await room.enter(entrant, 0, submit) == 7
        full = True
        waiting = asyncio.create_task(room.enter(entrant, 0, submit))
        await settled()
        full = False
        assert await waiting == 7

    run(work)


def test_a_drain_finishes_requests_with_parts_that_have_not_begun():
    async def work() -> None:
        desk = Desk(2)
        calls = Calls(desk)
        asked = [asyncio.create_task(ask(calls, range(5))), asyncio.create_task(embed(calls, [1], [2], [3]))]
        await settled()
        calls.refuse_new()
        assert not calls.is_live and desk.is_live and calls.running == 2
        assert await refused(ask(calls, [9])) is Reason.UNAVAILABLE
        assert await refused(embed(calls, [9])) is Reason.UNAVAILABLE
        finished = asyncio.create_task(calls.finished(60))
        for _ in range(8):
            assert not finished.done() and desk.is_live
            desk.end()
            await settled()
        assert [await one for one in asked] == [5, 3] and await finished
        assert not desk.is_live and calls.running == 0  # now it is told to drain, too
        assert [9] not in desk.came

    run(work)


def test_a_drain_finishes_a_request_that_nothing_of_had_begun():
    async def work() -> None:
        desk = Desk(2)
        calls = Calls(desk)
        admitted = asyncio.Event()

        async def asked() -> list[Delta]:
            async with calls.admitted(Caller("grpc", "test", "1"), "generate") as admission:
                admitted.set()
                await settled()  # a long prompt is tokenized
                return await calls.collect([1], TEXT, 1, 0, admission=admission)

        task = asyncio.create_task(asked())
        await admitted.wait()
        calls.refuse_new()
        await settled()
        await settled()
        desk.end()
        assert [delta.text for delta in await task] == ["x"] and await calls.finished(1)

    run(work)


def test_a_connection_does_not_hold_up_a_drain():
    async def work() -> None:
        desk = Desk(2)
        calls = Calls(desk)
        async with calls.admitted(Caller("websocket", "test", "1"), "generate", counted=False):
            calls.refuse_new()
            assert await calls.finished(1) and not desk.is_live

    run(work)


@pytest.mark.parametrize("waits_for", ["room", "grammar", "filter", "tokens"])
def test_what_outlasts_a_drain_is_cut_whatever_it_waits_for(waits_for):
    async def work() -> None:
        desk = Desk(1)

        class Filters:
            async def before(self, prompt_ids: Any, *_: Any) -> Any:
                if waits_for == "filter":
                    await asyncio.Event().wait()
                return prompt_ids

            def watch(self, *_: Any) -> None:
                return None

        calls = Calls(desk, filters=Filters())
        if waits_for == "grammar":
            desk.hold.clear()
        task = asyncio.create_task(ask(calls, [1, 2] if waits_for == "room" else [1]))
        await settled()
        calls.refuse_new()
        calls.cut()
        assert await refused(task) is Reason.UNAVAILABLE
        assert await calls.finished(1) and not desk.open and not desk.is_live

    run(work)


def test_parts_that_come_after_the_cut_are_refused():
    async def work() -> None:
        calls = Calls(Desk(1))
        async with calls.admitted(Caller("http", "test", "1"), "generate") as admission:
            calls.refuse_new()
            calls.cut()
            with pytest.raises(Unavailable, match="before this request was finished"):
                await calls.collect([1], TEXT, 1, 0, admission=admission)

    run(work)


def test_an_engine_that_is_lost_ends_parts_that_wait():
    async def work() -> None:
        desk = Desk(1)
        calls = Calls(desk)
        task = asyncio.create_task(ask(calls, [1, 2]))
        await settled()
        desk.is_live = False
        desk.end(finish_reason="cancelled", error="the engine has ended")
        assert await refused(task) is Reason.UNAVAILABLE and calls.running == 0

    run(work)
