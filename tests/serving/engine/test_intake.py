"""What another thread takes in (a grammar that is compiled) counts against the queue, also while it waits for one."""

from __future__ import annotations

import asyncio
import functools
import time

import pytest

from llm_jax.inference.request import Constraint, DeadlineExceeded, QueueFull, SamplingParams
from serving.engine.front import MAX_PREPARING, InProcess
from serving.engine.process import Requests
from tests.serving.doubles import FakeService, wait_until

PROMPT = [1, 100]
SLOW, QUICK = SamplingParams(max_tokens=9000, constraint=Constraint("regex", "a")), SamplingParams(max_tokens=1)
MOST = FakeService.max_requests


@pytest.fixture
def service():
    service = FakeService()
    service.hold.clear()
    yield service
    service.hold.set()
    service.close()


class Outbox:
    """Keeps what would be sent."""

    def __init__(self) -> None:
        self.answers: list[tuple] = []
        self.news: list[int] = []

    def answer(self, *message) -> None:
        self.answers.append(message)

    def push(self, request_id, delta) -> None:
        self.news.append(request_id)

    def drop(self, request_id) -> None:
        pass


@pytest.fixture
def outbox():
    return Outbox()


@pytest.fixture
def requests(service, outbox):
    return Requests(service, outbox)


def test_the_engines_process_refuses_more_grammars_than_may_wait(requests, service, outbox):
    for i in range(MOST):
        requests.submit([i], PROMPT, [SLOW], 0, "", None)
    requests.submit([100, 101], PROMPT, [SLOW, SLOW], 0, "", None)
    requests.submit([102], PROMPT, [QUICK], 0, "", None)
    requests.embed(103, PROMPT, "mean", 0)
    assert [(kind, number) for kind, number, _ in outbox.answers] == [("refused", i) for i in (100, 102, 103)]
    assert all(isinstance(error, QueueFull) and f"of at most {MOST}" in str(error) for *_, error in outbox.answers)
    assert not service.submitted


def test_cancelled_grammars_keep_their_places_until_their_thread_is_done(requests, service, outbox):
    """Else whoever starts and cancels would fill the memory."""
    for i in range(MOST):
        requests.submit([i], PROMPT, [SLOW], 0, "", None)
    requests.cancel(range(MOST))
    requests.submit([100], PROMPT, [QUICK], 0, "", None)
    assert [kind for kind, *_ in outbox.answers] == ["refused"]
    service.hold.set()
    assert wait_until(lambda: not requests._given_up)
    requests.submit([101], PROMPT, [QUICK], 0, "", None)
    assert ("accepted", 101) in outbox.answers
    assert wait_until(lambda: 101 in outbox.news and len(service.cancelled) == len(service.submitted) - 1)
    assert len(service.submitted) <= MAX_PREPARING + 1  # those whose turn had not come never came


def test_a_place_is_free_when_its_request_has_ended(requests, service, outbox):
    service.hold.set()
    for i in range(MOST + 5):
        requests.submit([i], PROMPT, [QUICK], 0, "", None)
        assert wait_until(functools.partial(outbox.news.__contains__, i))
    assert [kind for kind, *_ in outbox.answers] == ["accepted"] * (MOST + 5)


def test_a_deadline_counts_while_a_request_waits_for_its_turn(requests, service, outbox, monkeypatch):
    for i in range(MAX_PREPARING):
        requests.submit([i], PROMPT, [SLOW], 0, "", None)
    requests.submit([7], PROMPT, [SLOW], 0, "", 30.0)
    now = time.monotonic()
    monkeypatch.setattr("serving.engine.process.time.monotonic", lambda: now + 31)
    service.hold.set()
    assert wait_until(lambda: any(answer[:2] == ("refused", 7) for answer in outbox.answers))
    error, = (answer[2] for answer in outbox.answers if answer[:2] == ("refused", 7))
    assert isinstance(error, DeadlineExceeded)


def ignore(delta) -> None:
    """A listener."""


def test_an_engine_in_this_process_refuses_them_too(service):
    async def work() -> None:
        front = InProcess(service)
        tasks = [asyncio.create_task(front.submit_samples(PROMPT, [SLOW], [ignore])) for _ in range(MOST)]
        await asyncio.sleep(0)
        for late in (front.submit_samples(PROMPT, [SLOW], [ignore]), front.submit_samples(PROMPT, [QUICK], [ignore]),
                     front.embed(PROMPT, "mean", ignore)):
            with pytest.raises(QueueFull, match=f"of at most {MOST}"):
                await late
        for task in tasks:
            task.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
        again = [asyncio.create_task(front.submit_samples(PROMPT, [SLOW], [ignore]))
                 for _ in range(MOST - MAX_PREPARING)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):  # threads can't be stopped: three are still busy
            await front.submit_samples(PROMPT, [SLOW], [ignore])
        for task in again:
            task.cancel()
        await asyncio.gather(*again, return_exceptions=True)
        service.hold.set()
        assert await asyncio.to_thread(wait_until, lambda: len(service.cancelled) == MAX_PREPARING)

    asyncio.run(work())
    assert len(service.submitted) == MAX_PREPARING
