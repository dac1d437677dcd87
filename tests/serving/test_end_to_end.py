"""A real engine behind the door: a small model of random weights, over real sockets."""

from __future__ import annotations

import concurrent.futures
import re
import threading
import time

import grpc
import jax
import numpy as np
import pytest

from llm_jax.inference.constraints import ConstraintFailed
from llm_jax.inference.generation import complete, embed
from llm_jax.inference.request import Constraint, SamplingParams
from serving.client import Client, RequestFailed
from tests.serving.conftest import MAX_CONTEXT, MAX_QUEUE, MAX_ROWS
from tests.serving.doubles import ForeignStub, wait_until

PROMPTS = ["def main(", "", "你好，世界", "import os\nimport sys\n" * 8, "🙂", "x = 1", "class A:", "return None"]


@pytest.fixture
def server(real_server):
    return real_server


@pytest.fixture
def slow_steps(service, monkeypatch):
    """Makes each step take a tenth of a second, so that a test can tell them apart; gives the steps begun so far."""
    run, begun = service.engine.dispatch, []

    def slow(step):
        begun.append(step)
        time.sleep(0.1)
        return run(step)

    monkeypatch.setattr(service.engine, "dispatch", slow)
    return begun


def _expected(service, prompt, **fields):
    ids = service.encode(prompt) if isinstance(prompt, str) else prompt
    answer, = complete(service, [ids], [SamplingParams(**fields)])
    return answer


def _collect(responses):
    samples = [r.stream_content.samples[0] for r in responses]  # raises for a message without samples
    return "".join(s.text for s in samples), tuple(i for s in samples for i in s.token_ids)


def test_a_foreign_stub_completes_a_decode(service, stub):
    assert stub.is_live()
    for prompt in PROMPTS:
        expected = _expected(service, prompt, max_tokens=24)
        text, token_ids = _collect(stub.Decode(stub.text_request(prompt, max_tokens=24)))
        assert (text, token_ids) == (expected.text, expected.token_ids)
        assert text == service.tokenizer.decode(token_ids)  # however it was cut up: no character was split
        text, token_ids = _collect(stub.Decode(stub.token_request(service.encode(prompt, add_bos=False),
                                                                  max_tokens=24)))
        assert (text, token_ids) == ("", expected.token_ids)


def test_requests_sent_together_answer_as_alone(service, real_server, stub):
    expected = [_expected(service, prompt, max_tokens=10 + 3 * i) for i, prompt in enumerate(PROMPTS[:MAX_ROWS])]
    with concurrent.futures.ThreadPoolExecutor(MAX_ROWS) as pool:
        answers = list(pool.map(lambda i: _collect(stub.Decode(stub.text_request(PROMPTS[i], max_tokens=10 + 3 * i))),
                                range(MAX_ROWS)))
    assert answers == [(e.text, e.token_ids) for e in expected]


def test_sampled_requests_answer_as_in_process(service, real_server):
    fields = {"max_tokens": 20, "temperature": 0.9, "top_k": 30, "top_p": 0.8, "seed": 11, "ignore_eos": True}
    with Client(real_server.address) as client:
        chunks = list(client.generate("def main(", num_samples=3, logprobs=True, **fields))
    for sample in range(3):
        mine = [c for c in chunks if c.sample == sample]
        expected = _expected(service, "def main(", sample=sample, **fields)
        assert tuple(i for c in mine for i in c.token_ids) == expected.token_ids
        assert "".join(c.text for c in mine) == expected.text
        assert [p for c in mine for p in c.logprobs] == pytest.approx(expected.logprobs, abs=1e-5)
        assert (mine[-1].finish_reason, mine[-1].completion_tokens) == ("length", 20)


@pytest.mark.parametrize("fields", [
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": {40: 6.0}},
    {"temperature": 1.5, "min_p": 0.2, "seed": 3, "logit_bias": {300: -100.0}},
    {"stop_ids": tuple(range(0, 320, 7)), "min_tokens": 5},
    {"temperature": 1.0, "seed": 4, "constraint": Constraint("regex", "(红|[a-f]){6}")},
])
def test_what_a_request_may_ask_for_is_obeyed(service, real_server, fields):
    fields = {"max_tokens": 12, "ignore_eos": True, **fields}
    expected = _expected(service, "def main(", logprobs=3, prompt_logprobs=2, **fields)
    with Client(real_server.address) as client:
        chunks = list(client.generate("def main(", top_logprobs=3, prompt_logprobs=2, **fields))
    assert tuple(i for c in chunks for i in c.token_ids) == expected.token_ids != ()
    assert (chunks[-1].finish_reason, chunks[-1].completion_tokens) == (expected.finish_reason, len(expected.token_ids))
    top, wanted = [t for c in chunks for t in c.top_logprobs], expected.top_logprobs
    assert [[i for i, _ in one] for one in top] == [[i for i, _ in one] for one in wanted]
    assert [v for one in top for _, v in one] == pytest.approx([v for one in wanted for _, v in one], abs=1e-5)
    told = [p for c in chunks for p in c.prompt_logprobs]
    assert [p.token_id for p in told] == service.encode("def main(")[1:]
    assert [p.logprob for p in told] == pytest.approx([p.logprob for p in expected.prompt_logprobs], abs=1e-5)
    if "constraint" in fields:
        assert re.fullmatch(fields["constraint"].text, "".join(c.text for c in chunks))


def test_samples_compute_their_prompt_once_and_the_best_are_sent(service, real_server):
    prompt = "import os, sys\n" * 12
    fields = {"max_tokens": 6, "temperature": 1.5, "seed": 9, "ignore_eos": True}
    expected = sorted((_expected(service, prompt, sample=i, **fields) for i in range(4)), key=lambda c: -c.mean_logprob)
    tokens = len(service.encode(prompt))
    with Client(real_server.address) as client:
        for tenant, asked in (("a", {"num_samples": 4}), ("b", {"num_samples": 2, "best_of": 4})):
            before = service.stats()["prompt_tokens"]
            chunks = list(client.generate(prompt, tenant=tenant, **asked, **fields))
            assert tokens <= service.stats()["prompt_tokens"] - before < tokens + 4 * 16
    assert [c.text for c in chunks] == [c.text for c in expected[:2]]


def test_prompts_are_kept_for_their_tenant_alone(service, real_server):
    """The client's word is taken for who it is."""
    prompt = "class Tenant:\n" * 10

    def cached(**fields):
        return list(client.generate(prompt, max_tokens=1, **fields))[-1].cached_tokens

    with Client(real_server.address) as client:
        assert cached(tenant="x") == 0
        assert cached(tenant="x") == (len(service.encode(prompt)) - 1) // 8 * 8
        assert cached(tenant="y") == cached() == 0


def test_embeddings_over_the_wire(service, real_server):
    with Client(real_server.address) as client:
        for pooling in ("mean", "last"):
            expected = embed(service, [service.encode(prompt) for prompt in PROMPTS], pooling)
            np.testing.assert_allclose(client.embed(PROMPTS, pooling), expected, atol=1e-5)
        with pytest.raises(RequestFailed, match="511"):
            client.embed(["a", [5] * MAX_CONTEXT])


def test_deadlines(service, real_server, slow_steps):
    """One that runs ends with what it has; one that never began, with the status."""
    with Client(real_server.address) as client, concurrent.futures.ThreadPoolExecutor() as pool:
        running = [pool.submit(lambda: list(client.generate("import os", max_tokens=400, deadline_seconds=1.5,
                                                            ignore_eos=True))) for _ in range(MAX_ROWS)]
        assert wait_until(lambda: service.stats()["running"] == MAX_ROWS)
        with pytest.raises(RequestFailed, match="before its first token") as caught:
            list(client.generate("import os", max_tokens=4, deadline_seconds=0.3))
        assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
        for future in running:
            chunks = future.result()
            assert chunks[-1].finish_reason == "deadline" and chunks[0].token_ids
            assert chunks[-1].completion_tokens == sum(len(c.token_ids) for c in chunks) < 30


def test_a_constraint_that_can_not_be_followed(service, real_server, monkeypatch):
    from llm_jax.inference import constraints

    with Client(real_server.address) as client:
        for kind, text in (("regex", "("), ("json_schema", "[]"), ("grammar", "?")):
            with pytest.raises(RequestFailed, match="INVALID_ARGUMENT"):
                list(client.generate("a", constraint=Constraint(kind, text)))
        monkeypatch.setattr(constraints.Matcher, "accept", lambda self, token: _fail())
        with pytest.raises(RequestFailed, match="INTERNAL: the constraint became too complex"):
            list(client.generate("a", max_tokens=9, constraint=Constraint("regex", "[a-z]*")))


def _fail():
    raise ConstraintFailed("the constraint became too complex")


def test_stop_strings_end_the_text_before_them(service, real_server):
    whole = _expected(service, "def main(", max_tokens=40, ignore_eos=True).text
    stop = whole[12:15]
    with Client(real_server.address) as client:
        chunks = list(client.generate("def main(", max_tokens=40, ignore_eos=True, stop=[stop]))
    assert "".join(c.text for c in chunks) == whole[:whole.index(stop)]
    assert chunks[-1].finish_reason == "stop"


def test_nothing_compiles_after_ready(service, real_server, stub):
    compiles = []

    def listen(event: str, _seconds: float, **_rest) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 17)(3)
    assert compiles, "the counter counts"
    compiles.clear()
    with Client(real_server.address) as client:
        for fields in ({}, {"temperature": 1.0}, {"temperature": 0.5, "top_k": 3}, {"temperature": 0.5, "top_p": 0.3},
                       {"seed": 5, "temperature": 2.0}, {"stop": ["zz"]}, {"ignore_eos": True}, {"logprobs": True},
                       {"repetition_penalty": 1.2},
                       {"top_logprobs": 2, "temperature": 0.5}, {"prompt_logprobs": 1}, {"min_tokens": 3},
                       {"constraint": Constraint("regex", "[a-z]*")}, {"num_samples": 3, "tenant": "new"}):
            for prompt in PROMPTS:
                list(client.generate(prompt, max_tokens=5, **fields))
        client.embed(PROMPTS)
    _collect(stub.Decode(stub.text_request("ab", max_tokens=5, num_samples=MAX_ROWS)))
    assert not compiles


@pytest.mark.parametrize("leave", ["cancel", "deadline", "disconnect"])
def test_a_client_that_goes_away_frees_its_pages_before_the_second_step(service, real_server, slow_steps, leave):
    channel = grpc.insecure_channel(real_server.address)
    stub = ForeignStub(channel)
    call = stub.Decode(stub.text_request("import os", max_tokens=400, num_samples=2),
                       timeout=1.55 if leave == "deadline" else None)
    next(call)
    assert service.stats()["pages_used"] > 0
    if leave == "deadline":
        with pytest.raises(grpc.RpcError):
            list(call)
    elif leave == "cancel":
        call.cancel()
    else:
        channel.close()
    begun = len(slow_steps)
    assert wait_until(lambda: service.stats()["pages_used"] == 0)
    assert len(slow_steps) - begun <= 1
    channel.close()


def test_the_others_go_on_when_a_client_goes_away(service, stub):
    expected = _expected(service, "你好", max_tokens=200).token_ids
    leaving = stub.Decode(stub.text_request("import os", max_tokens=400))
    staying = stub.Decode(stub.text_request("你好", max_tokens=200))
    next(leaving)
    leaving.cancel()
    assert _collect(staying)[1] == expected


def test_a_full_queue_is_resource_exhausted(service, stub, slow_steps):
    calls = [stub.Decode(stub.text_request("import os", max_tokens=400)) for _ in range(MAX_ROWS)]
    assert wait_until(lambda: service.stats()["running"] == MAX_ROWS)
    calls += [stub.Decode(stub.text_request("import os", max_tokens=400)) for _ in range(MAX_QUEUE)]
    assert wait_until(lambda: service.stats()["waiting"] == MAX_QUEUE)
    with pytest.raises(grpc.RpcError) as caught:
        next(stub.Decode(stub.text_request("import os", max_tokens=400)))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    for call in calls:
        call.cancel()
    assert wait_until(lambda: service.stats()["pages_used"] == service.stats()["waiting"] == 0)
    assert _collect(stub.Decode(stub.text_request("import os", max_tokens=2)))[1]


def test_a_prompt_that_cannot_fit_is_refused_with_the_limit(service, stub):
    for request in (stub.text_request("é🙂" * MAX_CONTEXT, max_tokens=1), stub.text_request("é" * 20_000),
                    stub.token_request([5] * MAX_CONTEXT, has_bos=True, max_tokens=1)):
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Decode(request))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert str(MAX_CONTEXT - 1) in caught.value.details()
    assert _collect(stub.Decode(stub.token_request([5] * (MAX_CONTEXT - 1), has_bos=True)))[1]


def test_tokens_outside_the_vocabulary_are_refused(service, stub):
    for bad in (-1, service.tokenizer.vocab_size, 2**31 - 1):
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Decode(stub.token_request([5, bad], max_tokens=1)))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert str(bad) in caught.value.details()


def test_a_failed_step_ends_its_requests_and_nothing_else(service, stub, monkeypatch):
    run, fail = service.engine.dispatch, threading.Event()

    def faulty(step):
        if fail.is_set():
            fail.clear()
            raise RuntimeError("the device stumbled")
        return run(step)

    monkeypatch.setattr(service.engine, "dispatch", faulty)
    expected = _expected(service, "x = 1", max_tokens=12).token_ids
    fail.set()
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Decode(stub.text_request("x = 1", max_tokens=12)))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "the device stumbled" in caught.value.details()
    assert stub.is_live()
    assert _collect(stub.Decode(stub.text_request("x = 1", max_tokens=12)))[1] == expected


def test_more_samples_than_can_ever_wait_are_refused_for_good(service, stub):
    most = service.max_requests
    assert most == MAX_ROWS + MAX_QUEUE
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Decode(stub.text_request("x = 1", max_tokens=2, num_samples=most + 1)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"num_samples={most + 1} must lie between 1 and {most}" in caught.value.details()
