"""Long texts to be counted: how long they may be, and whom they may hold up."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest

from serving.access.identity import Caller, Identity
from serving.admission import Admission
from serving.errors import Reason, Rejected
from serving.http import long_work, tokenize
from serving.http.long_work import LongWork
from serving.tracing import Span
from tests.serving.doubles import CharacterTokenizer, FakeService
from tests.serving.http.chat_doubles import ChatService, ChatTokenizer
from tests.serving.http.conftest import running_app
from tests.serving.http.test_app import complete, error_of

LONG = "长" * 2000


class HeldTokenizer(CharacterTokenizer):
    """Tokenizes long texts when it is let go, and keeps which it has begun."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Semaphore(0)

    def encode(self, text, special=False):
        if len(text) > 1000:
            self.begun.release()
            assert self.go.wait(10)
        return super().encode(text, special)


def test_one_clients_long_texts_hold_up_no_other_client(monkeypatch):
    """Neither short ones, nor completions, nor the work of the default pool, nor another client's long text."""
    service = FakeService()
    service.tokenizer = held = HeldTokenizer()
    with running_app(service) as app, httpx.Client(base_url=app.url, timeout=30) as http:
        sent = [threading.Thread(target=http.post, args=("/tokenize",), kwargs={"json": {"prompt": LONG}})
                for _ in range(12)]
        for one in sent:
            one.start()
        assert held.begun.acquire(timeout=10)
        assert http.post("/tokenize", json={"prompt": "短"}).json()["count"] == 2
        assert http.post("/detokenize", json={"tokens": [100]}).json() == {"prompt": "a"}
        assert complete(http).status_code == 200
        assert app.run(asyncio.to_thread(lambda: "free")) == "free"
        assert not held.begun.acquire(blocking=False), "one at a time of a client"
        held.go.set()
        for one in sent:
            one.join()
        assert http.post("/tokenize", json={"prompt": LONG}).json()["count"] == 2001


def admission(key: str = "", peer: str = "10.0.0.1") -> Admission:
    found = Admission(Caller("http", "POST /tokenize", "req-1", peer=peer), Span())
    found.identity = Identity(key_id=key) if key else None
    return found


def test_a_client_is_a_key_or_else_an_address_and_has_one_thread():
    async def run() -> None:
        work, free = LongWork(), threading.Event()
        held = [asyncio.create_task(work.run(admission("key-1"), lambda: free.wait(10))) for _ in range(3)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(work.run(admission("key-2"), lambda: "other"), 10) == "other"
        assert await asyncio.wait_for(work.run(admission(), lambda: "nobody's"), 10) == "nobody's"
        free.set()
        assert await asyncio.gather(*held) == [True] * 3
        assert not work._turns and not work._count
        work.close()

    asyncio.run(run())


def test_so_much_of_one_client_may_wait(monkeypatch):
    monkeypatch.setattr(long_work, "MAX_WAITING", 2)

    async def run() -> None:
        work, free = LongWork(), threading.Event()
        held = [asyncio.create_task(work.run(admission(), lambda: free.wait(10))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Rejected) as refused:
            await work.run(admission(), lambda: None)
        assert refused.value.reason is Reason.QUEUE_FULL and refused.value.retry_after_s
        assert await work.run(admission(peer="10.0.0.2"), lambda: 5) == 5
        free.set()
        await asyncio.gather(*held)
        assert await work.run(admission(), lambda: 6) == 6
        work.close()

    asyncio.run(run())


def test_who_is_cancelled_keeps_the_place_until_its_thread_is_free():
    async def run() -> None:
        work, free, order = LongWork(), threading.Event(), []

        def first() -> None:
            assert free.wait(10)
            order.append(1)
            raise ValueError("nobody hears of it")

        one = asyncio.create_task(work.run(admission(), first))
        await asyncio.sleep(0)
        two = asyncio.create_task(work.run(admission(), lambda: order.append(2)))
        await asyncio.sleep(0)
        one.cancel()
        await asyncio.sleep(0)
        assert not one.done() and not order
        free.set()
        await asyncio.wait((one, two))
        assert one.cancelled() and order == [1, 2]
        with pytest.raises(ZeroDivisionError):
            await work.run(admission(), lambda: 1 / 0)
        work.close()

    asyncio.run(run())


@pytest.mark.parametrize("sent, field", [
    ({"prompt": "x" * 10_001}, "prompt"), ({"messages": [{"role": "user", "content": "x" * 10_001}]}, "messages"),
    ({"messages": [{"role": "user", "content": ""}], "tools": [{"type": "function", "function": {
        "name": "look", "description": "x" * 10_001}}]}, "messages")])
def test_a_text_has_a_limit(monkeypatch, sent, field):
    monkeypatch.setattr(tokenize, "MAX_CHARACTERS", 10_000)
    monkeypatch.setattr(tokenize, "CHARACTERS_PER_TOKEN", 0)
    with running_app(ChatService()) as app, httpx.Client(base_url=app.url) as http:
        refused = http.post("/tokenize", json=sent)
        assert (refused.status_code, error_of(refused)["param"]) == (400, field)
        assert "10000 characters" in error_of(refused)["message"]
        assert http.post("/tokenize", json={"prompt": "x" * 10_000}).json()["count"] == 10_001
        refused = http.post("/detokenize", json={"tokens": [100] * 10_001})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "tokens")


def test_a_larger_context_takes_longer_texts():
    service = FakeService()
    service.max_context = 30_000
    with running_app(service) as app, httpx.Client(base_url=app.url) as http:
        most = 30_000 * tokenize.CHARACTERS_PER_TOKEN
        assert most > tokenize.MAX_CHARACTERS
        assert http.post("/tokenize", json={"prompt": "x" * most}).status_code == 200
        assert http.post("/tokenize", json={"prompt": "x" * (most + 1)}).status_code == 400


def test_a_conversation_far_too_long_is_refused_unread(monkeypatch):
    with running_app(ChatService()) as app, httpx.Client(base_url=app.url) as http:
        monkeypatch.setattr(ChatTokenizer, "encode", lambda self, text, special=False: 1 / 0)
        for path, sent, field in (("chat/completions", {"messages": [{"role": "user", "content": "x" * 50_000}]},
                                   "messages"), ("responses", {"input": "x" * 50_000}, "input")):
            refused = http.post(f"/v1/{path}", json=sent)
            assert (refused.status_code, error_of(refused)["code"]) == (400, "context_length_exceeded")
            assert error_of(refused)["param"] == field and "at least" in error_of(refused)["message"]
