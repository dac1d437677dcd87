"""Several requests in one call: each is answered, cancelled and refused by itself."""

from __future__ import annotations

import queue

import grpc
import pytest

from llm_jax.errors import UserError
from llm_jax.inference.request import Delta, SamplingParams
from serving import messages, session
from serving.client import Client, RequestFailed
from tests.serving.doubles import Left, wait_until


@pytest.fixture
def client(server):
    with Client(server.address) as client:
        yield client


@pytest.fixture
def wire(channel):
    """The bare call: `send` a message or bytes, `hear` the next response."""
    method = f"/{messages.INFERENCE}/Session"
    call = channel.stream_stream(method, lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
                                 messages.SessionResponse.FromString)
    sent: queue.SimpleQueue = queue.SimpleQueue()
    running = call(iter(sent.get, None), timeout=20)
    running.send = sent.put
    yield running
    sent.put(None)
    running.cancel()


def _start(name: str, text: str, max_tokens: int = 3, **fields):
    return messages.SessionRequest(id=name, start=messages.GenerateRequest(
        text=text, sampling=messages.Sampling(max_tokens=max_tokens, **fields)))


def _text(chunks) -> str:
    return "".join(c.text for c in chunks)


def test_requests_run_together_and_are_told_apart(server, client):
    with client.session() as running:
        long = running.start("一直", max_tokens=9000)
        next(iter(long))
        texts = ["ab", "从前", "x", "🙂你"]
        assert [_text(one) for one in [running.start(text, max_tokens=20) for text in texts]] == [
            (text * 20)[:20] for text in texts]
        assert server.service.stats()["running"] == 1 and not server.service.cancelled
        long.cancel()


def test_a_session_can_do_what_generate_can(server, client):
    asked = {"max_tokens": 3, "temperature": 0.5, "seed": 7, "stop": "x", "num_samples": 2, "top_logprobs": 2,
             "prompt_logprobs": 1, "priority": 3, "tenant": "我", "deadline_seconds": 5.0}
    with client.session() as running:
        together = list(running.start("你好", **asked))
    apart = list(client.generate("你好", **asked))
    for sample in range(2):
        one, other = ([c for c in chunks if c.sample == sample] for chunks in (together, apart))
        assert _text(one) == _text(other) == "你好你"
        likeliest = [[likely for c in chunks for likely in c.top_logprobs] for chunks in (one, other)]
        assert likeliest[0] == likeliest[1] and len(likeliest[0]) == 3
        assert (one[-1].finish_reason, one[-1].completion_tokens) == ("length", 3)
    submitted = server.service.submitted
    assert submitted[:2] == submitted[2:] and server.service.terms == [("我", Left(5.0))] * 2


def test_one_is_cancelled_and_the_others_go_on(server, client):
    with client.session() as running:
        long, other = running.start("ab", max_tokens=9000), running.start("从前", max_tokens=300)
        next(iter(long))
        long.cancel()
        with pytest.raises(RequestFailed) as caught:
            list(long)
        assert caught.value.code == grpc.StatusCode.CANCELLED
        assert wait_until(lambda: server.service.cancelled == [0])
        assert _text(other) == "从前" * 150
        assert _text(running.start("cd", max_tokens=2)) == "cd"


def test_every_request_hears_of_its_end_however_soon_it_comes(channel):
    """Also when the client has sent its last by then, or cancels what has hardly begun."""
    method = channel.stream_stream(f"/{messages.INFERENCE}/Session", messages.SessionRequest.SerializeToString,
                                   messages.SessionResponse.FromString)
    for number in range(60):
        sent = []
        for name in map(str, range(number % 4 + 1)):
            sent.append(_start(name, "ab", 1 if number % 2 else -1))
            if number % 3 == 0:
                sent.append(messages.SessionRequest(id=name, cancel=messages.Cancel()))
        heard = list(method(iter(sent), timeout=20))
        ends = [r.id for r in heard if r.WhichOneof("kind") in ("done", "failure")]
        assert sorted(ends) == [one.id for one in sent if one.WhichOneof("kind") == "start"]


def test_one_fails_and_the_others_go_on(server, client):
    server.service.faults["fail"] = Delta(finish_reason="error", error="went wrong")
    with client.session() as running:
        other = running.start("从前", max_tokens=300)
        for prompt, fields, code, said in (("fail", {}, "INTERNAL", "went wrong"),
                                           ("ab", {"top_p": 2.0}, "INVALID_ARGUMENT", "top_p must be"),
                                           ([], {}, "INVALID_ARGUMENT", "the prompt has no tokens"),
                                           ([5] * 10_000, {}, "INVALID_ARGUMENT", "at most 9999"),
                                           ("ab", {"tenant": "x" * 257}, "INVALID_ARGUMENT", "tenant must")):
            with pytest.raises(RequestFailed, match=f"{code}.*{said}"):
                list(running.start(prompt, **fields))
        assert _text(other) == "从前" * 150
        with pytest.raises(UserError, match="temprature is no argument"):
            running.start("ab", temprature=1)


def test_messages_that_cannot_be_understood_cost_nobody_anything(wire):
    wire.send(_start("long", "ab", 9000))
    assert next(wire).id == "long"
    for message, said in ((b"\xff\xff\xff", "not the message"), (messages.SessionRequest(id="x"), "neither start"),
                          (_start("", "ab"), "id must have 1 to 128"), (_start("你" * 129, "ab"), "id must have"),
                          (_start("long", "cd"), "still runs")):
        wire.send(message)
        failure = next(r for r in wire if r.id != "long").failure
        assert failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0] and said in failure.message
    wire.send(messages.SessionRequest(id="unknown", cancel=messages.Cancel()))
    wire.send(_start("你", "从前", 2, top_logprobs=99))
    response = next(r for r in wire if r.id != "long")
    assert (response.id, response.failure.field) == ("你", "top_logprobs")
    wire.send(_start("你", "从前", 2))
    mine = [next(r for r in wire if r.id == "你")]
    while mine[-1].WhichOneof("kind") != "done":
        mine.append(next(r for r in wire if r.id == "你"))
    assert "".join(r.response.text for r in mine) == "从前"


def test_what_a_client_calls_its_request_begins_no_line_of_the_log_and_puts_no_key_there(server, wire):
    key = "sk-lljx-Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6"
    server.service.faults["坏"] = RuntimeError("the disk of the engine")
    told = []
    for name in ("a\nb", key, "你"):
        wire.send(_start(name, "坏"))
        told.append(next(wire).failure.message)
    assert ["/'a\\nb')" in told[0], "/[key])" in told[1], "/你)" in told[2]] == [True] * 3


def test_a_client_that_sends_no_more_is_answered_to_the_end(server, wire):
    for name in ("1", "2"):
        wire.send(_start(name, "ab", 50))
    wire.send(None)
    heard = list(wire)
    assert wire.code() == grpc.StatusCode.OK and sum(r.WhichOneof("kind") == "done" for r in heard) == 2
    assert wait_until(lambda: server.server.calls.running == 0)
    assert dict(wire.initial_metadata())["x-request-id"]


def test_a_client_that_leaves_leaves_nothing_behind(server, wire):
    for name in ("1", "2", "3"):
        wire.send(_start(name, "ab", 9000))
    assert wait_until(lambda: len(server.service.submitted) == 3)
    wire.cancel()
    assert wait_until(lambda: sorted(server.service.cancelled) == [0, 1, 2])
    assert wait_until(lambda: server.server.calls.running == 0)


def test_a_session_holds_so_many_requests(wire, monkeypatch):
    monkeypatch.setattr(session, "MAX_REQUESTS", 2)
    for name in ("1", "2", "3"):
        wire.send(_start(name, "ab", 9000))
    refused = next(r for r in wire if r.WhichOneof("kind") == "failure")
    assert (refused.id, refused.failure.code) == ("3", grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    wire.send(messages.SessionRequest(id="1", cancel=messages.Cancel()))
    assert next(r for r in wire if r.WhichOneof("kind") == "failure").id == "1"
    wire.send(_start("3", "ab", 2))
    assert next(r for r in wire if r.WhichOneof("kind") == "done").id == "3"


def test_a_server_that_stops_lets_the_session_finish(server, client):
    with client.session() as running:
        begun = running.start("ab", max_tokens=1000)
        next(iter(begun))
        stopping = server.start_stopping(grace_seconds=30)
        assert wait_until(lambda: not server.server.calls.accepting)
        with pytest.raises(RequestFailed, match="UNAVAILABLE"):
            list(running.start("cd", max_tokens=2))
        assert len(_text(begun)) == 999
        assert stopping.result(timeout=10) is True
        with pytest.raises(RequestFailed):
            list(running.start("cd", max_tokens=2))


def test_a_generation_that_ended_says_so_again(server, client):
    with client.session() as running:
        one = running.start("ab", max_tokens=2)
        assert _text(one) == "ab" and list(one) == []
    assert server.service.submitted[0][1] == SamplingParams(max_tokens=2)
    with pytest.raises(UserError):
        running.start("ab")
