"""Bad input, bad timing, many at once: whatever a client does costs that client alone."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import socket
import threading
import time

import grpc
import pytest

from serving import messages
from tests.serving.doubles import ForeignStub, wait_until

CODE = grpc.StatusCode
DECODE, HEALTH = f"/{messages.ORCHESTRATOR}/Decode", f"/{messages.ORCHESTRATOR}/HealthCheck"
GENERATE, EMBED, MODEL, SESSION = (f"/{messages.INFERENCE}/{name}"
                                   for name in ("Generate", "Embed", "GetModel", "Session"))
CHECK, REFLECT = "/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
# What bad input may be answered with; the queue of this engine is short, so a good request may find it full.
FINE = {CODE.OK, CODE.DEADLINE_EXCEEDED, CODE.INVALID_ARGUMENT, CODE.RESOURCE_EXHAUSTED, CODE.CANCELLED}
INT32 = (-2**31, -1, 0, 1, 2, 3, 7, 319, 320, 2**31 - 1)
FLOATS = (-1.0, -0.0, 0.0, 1e-320, 1e-6, 0.5, 1.0, 1.0000001, 2.0, 100.0, 1e308, float("inf"), -float("inf"),
          float("nan"))
SEEDS = (None, 0, 1, 2**32, 2**63, 2**64 - 1)
TEXTS = ("", "a", "\0", "a\0b" * 9, "\u2581 \t\r\n", "é" * 300, "🙂" * 600, "def main(" * 20, "\x7f\x80\ufffe\uffff",
         "x" * 9000)
STOPS = ((), ("",), ("\0",), ("a", "你"), ("x" * 100_000,), ("é" * 1024,) * 16, ("s",) * 1000, ("\u2581", " "))


@pytest.fixture
def threads():
    """Afterwards, as many threads are left as there were before the server."""
    def names():  # gRPC keeps one thread of its own from the first server to the end of the process
        return [thread.name for thread in threading.enumerate() if "_poll_wrapper" not in thread.name]

    before = len(names())
    yield
    assert wait_until(lambda: len(names()) <= before), names()


@pytest.fixture
def server(service, threads, real_server, capfd, caplog):
    """A server over a real engine, which must still answer as before when the test is over."""
    with grpc.insecure_channel(real_server.address) as channel:
        stub = ForeignStub(channel)

        def answer():
            return [list(r.stream_content.samples[0].token_ids) for r in stub.Decode(
                stub.text_request("def main(", max_tokens=6), timeout=20)]

        expected = sum(answer(), [])
        yield real_server
        idle = ("pages_used", "running", "waiting")
        assert wait_until(lambda: not any(service.stats()[name] for name in idle)), service.stats()
        assert wait_until(lambda: real_server.server.calls.running == 0)
        assert stub.is_live()
        assert sum(answer(), []) == expected
        assert "Traceback" not in capfd.readouterr().err + caplog.text


def _status(call, most: int = 3) -> CODE:
    """How a stream ends that is cancelled after a few messages."""
    with contextlib.suppress(grpc.RpcError):
        for number, _ in enumerate(call, start=1):
            if number == most:
                call.cancel()
    return call.code()


def _mutated(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[at:] = b""
            case 1:
                changed[at:at] = rng.randbytes(rng.randint(1, 6))
            case 2:
                del changed[at:at + rng.randint(1, 3)]
            case _:
                changed[at:at + 1] = rng.randbytes(1)
    return bytes(changed)


def _sometimes(rng: random.Random, values, good):
    """Most fields keep a good value each time, or every request would fail for the first of several reasons."""
    return rng.choice(values) if rng.random() < 0.2 else good


def _decode_request(rng: random.Random):
    request = messages.DecodeRequest(
        max_tokens=_sometimes(rng, INT32, 3), num_samples=_sometimes(rng, INT32, 1), priority=_sometimes(rng, INT32, 5),
        has_bos=rng.random() < 0.5, session_cache=rng.choice(TEXTS), lora_adapter_id=_sometimes(rng, TEXTS, ""))
    request.metadata.start_time = rng.choice(FLOATS[:10])
    match rng.randrange(3):
        case 0:
            request.text_content.text = rng.choice(TEXTS)
        case 1:
            request.token_content.token_ids.extend(rng.choices(INT32[2:] if rng.random() < 0.5 else (1, 2, 3, 0, 9),
                                                               k=rng.choice((0, 1, 30, 511, 512, 5000))))
            request.token_content.SetInParent()
    return request


def _generate_request(rng: random.Random):
    sampling = messages.Sampling(
        max_tokens=_sometimes(rng, INT32, 3), temperature=_sometimes(rng, FLOATS, 0.7),
        top_k=_sometimes(rng, INT32, 0), top_p=_sometimes(rng, FLOATS, None), seed=_sometimes(rng, SEEDS, 5),
        stop=_sometimes(rng, STOPS, ()), ignore_eos=rng.random() < 0.5, logprobs=rng.random() < 0.5,
        num_samples=_sometimes(rng, INT32, 1), best_of=_sometimes(rng, INT32, 0), min_p=_sometimes(rng, FLOATS, None),
        repetition_penalty=_sometimes(rng, FLOATS, None), presence_penalty=_sometimes(rng, FLOATS, 0.5),
        frequency_penalty=_sometimes(rng, FLOATS, 0.0), min_tokens=_sometimes(rng, INT32, None),
        logit_bias=_sometimes(rng, ({-1: 1.0}, {320: 1.0}, {5: 1e308}, dict.fromkeys(range(310), 1.0)), {7: -1.0}),
        stop_ids=_sometimes(rng, ([-1], [320], [3] * 65), [2]), top_logprobs=_sometimes(rng, INT32, 2),
        prompt_logprobs=_sometimes(rng, INT32, None))
    if rng.random() < 0.1:  # few: each text that is new is tried in a process of its own
        setattr(sampling, rng.choice(("json_schema", "regex", "grammar")), rng.choice(("", "{", "{}", "(a|b)+", "\0")))
    request = messages.GenerateRequest(
        sampling=sampling, priority=_sometimes(rng, INT32, 5), tenant=_sometimes(rng, TEXTS, ""),
        deadline_seconds=_sometimes(rng, FLOATS, None))
    if rng.random() < 0.6:
        request.text = rng.choice(TEXTS)
    elif rng.random() < 0.9:
        request.token_ids.ids.extend(_sometimes(rng, ([], [-1], [320], [5] * 511, [5] * 512, [2**31 - 1]),
                                                [1, 9, 2, 0]))
        request.token_ids.SetInParent()
    return request


def _session_request(rng: random.Random):
    request = messages.SessionRequest(id=_sometimes(rng, TEXTS, str(rng.randrange(4))))
    if rng.random() < 0.8:
        request.start.CopyFrom(_generate_request(rng))
    elif rng.random() < 0.9:
        request.cancel.SetInParent()
    return request


def _embed_request(rng: random.Random):
    request = messages.EmbedRequest(pooling=_sometimes(rng, (-1, 1, 2, 3, 2**31 - 1), 0),
                                    priority=_sometimes(rng, INT32, 3))
    for _ in range(_sometimes(rng, (0, 2, 9, 65), 1)):
        one = request.inputs.add()
        if rng.random() < 0.7:
            one.text = rng.choice(TEXTS)
        elif rng.random() < 0.8:
            one.token_ids.ids.extend(_sometimes(rng, ([], [-1], [320], [5] * 511, [5] * 512), [1, 9]))
            one.token_ids.SetInParent()
    return request


def _run_all(address: str, work, number: int, workers: int = 8) -> list:
    """Calls `work(channel, rng)` that often from several threads, each with a connection of its own."""
    local = threading.local()
    channels = []

    def one(seed: int):
        if not hasattr(local, "channel"):
            local.channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
            channels.append(local.channel)
        return work(local.channel, random.Random(seed))

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(one, range(number)))
    for channel in channels:
        channel.close()
    return results


def test_random_bytes_are_refused_or_answered(server):
    def work(channel, rng):
        method = rng.choice((DECODE, DECODE, GENERATE, GENERATE, SESSION, EMBED, HEALTH, MODEL, CHECK, REFLECT))
        make = {DECODE: _decode_request, SESSION: _session_request, EMBED: _embed_request}.get(
            method, _generate_request)

        def random_bytes() -> bytes:
            if rng.random() < 0.4:
                return rng.randbytes(rng.choice((0, 1, 2, 9, 50, 2000)))
            return _mutated(rng, make(rng).SerializeToString())

        data = random_bytes()
        if method in (REFLECT, SESSION):
            sent = [data] if method == REFLECT else [data, *(random_bytes() for _ in range(rng.randrange(4)))]
            call = channel.stream_stream(method)(iter(sent), timeout=20)
        else:
            call = channel.unary_stream(method)(data, timeout=20)
        return method, _status(call), call.details(), data[:60]

    results = _run_all(server.address, work, 1500)
    assert not [r for r in results if r[1] not in FINE | ({CODE.NOT_FOUND} if r[0] == CHECK else set())]
    assert {CODE.OK, CODE.INVALID_ARGUMENT} <= {code for _, code, _, _ in results}


@pytest.mark.parametrize(("method", "make"), [(DECODE, _decode_request), (GENERATE, _generate_request),
                                               (EMBED, _embed_request)])
def test_field_values_at_their_edges_are_refused_or_answered(server, method, make):
    def work(channel, rng):
        request = make(rng)
        call = channel.unary_stream(method, type(request).SerializeToString)(request, timeout=20)
        return _status(call), call.details(), str(request)[:300]

    results = _run_all(server.address, work, 600)
    assert not [r for r in results if r[0] not in FINE]
    assert {CODE.OK, CODE.INVALID_ARGUMENT} <= {code for code, _, _ in results}


def test_what_goes_wrong_in_a_session_ends_that_request_alone(server):
    """Whatever else is sent, the good request among it is answered, and every answer names its request."""
    good = messages.SessionRequest(id="good", start=messages.GenerateRequest(
        text="def main(", sampling=messages.Sampling(max_tokens=3)))

    def work(channel, rng):
        sent = [_session_request(rng) for _ in range(rng.randrange(6))]
        sent.insert(rng.randrange(len(sent) + 1), good)
        call = channel.stream_stream(SESSION, messages.SessionRequest.SerializeToString,
                                     messages.SessionResponse.FromString)(iter(sent), timeout=30)
        heard = list(call)
        ends = [r for r in heard if r.id == "good" and r.WhichOneof("kind") != "response"]
        codes = {r.failure.code for r in heard if r.WhichOneof("kind") == "failure"}
        return call.code(), ends, codes, {r.id for r in heard} <= {"", *(one.id for one in sent)}

    results = _run_all(server.address, work, 200)
    assert not [r for r in results if r[0] != CODE.OK or len(r[1]) != 1 or not r[3]]
    assert {code for _, _, codes, _ in results for code in codes} <= {code.value[0] for code in FINE}
    full = CODE.RESOURCE_EXHAUSTED.value[0]  # the queue of this engine is short
    assert all(end.WhichOneof("kind") == "done" or end.failure.code == full for _, (end,), _, _ in results)
    assert sum(end.WhichOneof("kind") == "done" for _, (end,), _, _ in results) > 50


def test_clients_that_come_and_go_at_any_moment(server):
    """64 connections at once: some cancel, some drop, some never read, some never speak gRPC at all."""
    host, _, port = server.address.rpartition(":")
    request = messages.DecodeRequest(max_tokens=400, num_samples=1)
    request.text_content.text = "def main("
    held = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        manner = seed % 5
        if manner == 0:
            with socket.create_connection((host, int(port)), timeout=10) as raw:
                raw.sendall(rng.choice((b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                                        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(64))))
                time.sleep(rng.random() * 0.2)
            return
        channel = grpc.insecure_channel(server.address, options=[
            ("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16)])
        call = channel.unary_stream(DECODE, type(request).SerializeToString)(request, timeout=30)
        if manner == 1:  # never reads, until the others are gone
            held.append(channel)
            return
        if manner == 2:
            with contextlib.suppress(grpc.RpcError):
                next(call)
        time.sleep(rng.random() * 0.3)
        if manner == 3:
            call.cancel()
        channel.close()

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        list(pool.map(work, range(128)))
    for channel in held:
        channel.close()


def test_long_messages_are_cheap_to_refuse(server):
    """While they come, another client's calls go on without a pause."""
    long = messages.DecodeRequest()
    long.text_content.text = "é" * (8 << 20)
    tokens = messages.GenerateRequest()
    tokens.token_ids.ids.extend([5] * (3 << 20))
    slowest = 0.0
    with grpc.insecure_channel(server.address) as channel, \
            grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as other, \
            concurrent.futures.ThreadPoolExecutor(2) as pool:
        stub = ForeignStub(other)
        data = [(DECODE, long.SerializeToString()), (GENERATE, tokens.SerializeToString())] * 2
        calls = [pool.submit(lambda m, d: (c := channel.unary_stream(m)(d, timeout=30), _status(c), c.details())[1:],
                             *one) for one in data]
        while not all(call.done() for call in calls):
            began = time.monotonic()
            assert stub.is_live()
            slowest = max(slowest, time.monotonic() - began)
    for call in calls:
        code, said = call.result()
        assert code == CODE.INVALID_ARGUMENT and "511" in said
    assert slowest < 2
