"""The published `openai` package against the door: what it sends is taken, and what comes back is what it expects."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest

from llm_jax.inference.request import Delta, QueueFull
from tests.serving.access.keyring import Keyring
from tests.serving.doubles import BOS, wait_until
from tests.serving.http.conftest import MODEL, running_app
from tests.serving.http.test_app import request_bytes


def test_a_session(client):
    """What a program does: look for the model, complete, stream, embed."""
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == MODEL
    answer = client.completions.create(model=model.id, prompt="你好", max_tokens=4, n=2, seed=7, temperature=0.5,
                                       stop=["结束"], logprobs=1, user="me", presence_penalty=0.1, top_p=0.9,
                                       frequency_penalty=0.1, logit_bias={"7": 1}, best_of=2, echo=False)
    assert [choice.text for choice in answer.choices] == ["你好你好"] * 2
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].logprobs.tokens == ["你", "好", "你", "好"]
    assert answer.usage.total_tokens == 3 + 8 and answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer._request_id
    stream = client.completions.create(model=model.id, prompt="你好", max_tokens=4, stream=True,
                                       stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "你好你好"
    assert chunks[-1].usage.completion_tokens == 4 and not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason == "length"
    vectors = client.embeddings.create(model=model.id, input=["你", "ab"])  # asks for base64 by itself
    expected = np.array([BOS, ord("你") + 3], np.float32)
    assert vectors.data[0].embedding == pytest.approx(expected / np.linalg.norm(expected))
    plain = client.embeddings.create(model=model.id, input=["你", "ab"], encoding_format="float")
    assert [one.embedding for one in plain.data] == [one.embedding for one in vectors.data]
    assert vectors.usage.total_tokens == 5


def test_the_engines_own_fields_go_in_the_extra_body(app, client):
    client.completions.create(model=MODEL, prompt=[1, 2], max_tokens=5, extra_body={
        "top_k": 5, "min_p": 0.1, "guided_regex": "[ab]+", "stop_token_ids": [7], "ignore_eos": True, "min_tokens": 2})
    params = app.service.submitted[0][1]
    assert (params.top_k, params.min_p, params.constraint.text, params.stop_ids, params.ignore_eos, params.min_tokens
            ) == (5, 0.1, "[ab]+", (7,), True, 2)


def test_several_at_once_from_asyncio(app):
    async def session() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none") as client:
            async def one(text: str) -> str:
                stream = await client.completions.create(model=MODEL, prompt=text, max_tokens=20, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(f"{i:02}") for i in range(20)))

    assert asyncio.run(session()) == [f"{i:02}" * 10 for i in range(20)]


def test_leaving_a_stream_ends_it_on_the_server(app, client):
    with client.completions.create(model=MODEL, prompt="ab", max_tokens=9000, stream=True) as stream:
        next(iter(stream))
    assert wait_until(lambda: app.service.cancelled == [0])


def test_a_timeout_of_the_clients_ends_the_request_on_the_server(app, client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(model=MODEL, prompt="ab", max_tokens=9000)
    assert wait_until(lambda: app.service.cancelled == [0])


@pytest.mark.parametrize(("sent", "kind", "param"), [
    ({"model": "gpt-4"}, openai.NotFoundError, "model"), ({"n": 65}, openai.BadRequestError, "n"),
    ({"extra_body": {"foo": 1}}, openai.BadRequestError, "foo"),
    ({"prompt": "x" * 10_000}, openai.BadRequestError, "prompt"), ({"suffix": "x"}, openai.BadRequestError, "suffix")])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_raise_its_own_errors(client, sent, kind, param, stream):
    with pytest.raises(kind) as raised:
        client.completions.create(**{"model": MODEL, "prompt": "ab", "stream": stream} | sent)
    assert raised.value.param == param and raised.value.type == "invalid_request_error"
    assert raised.value.code and raised.value.request_id


def test_what_may_go_well_next_time_is_tried_again_by_itself(app, client):
    app.service.faults["ab"] = QueueFull("too many requests are waiting")
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt="ab")
    threading.Timer(0.3, app.service.faults.clear).start()
    began = time.monotonic()
    answer = client.with_options(max_retries=2).completions.create(model=MODEL, prompt="ab", max_tokens=2)
    assert answer.choices[0].text == "ab" and time.monotonic() - began >= 0.9  # as retry-after says


def test_a_draining_server_is_told_from_a_broken_one(app, client):
    app.calls.refuse_new()
    with pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(model=MODEL, prompt="ab")
    assert (raised.value.status_code, raised.value.code) == (503, "unavailable")


def test_a_stream_that_breaks_raises(app, client):
    app.service.faults["ab"] = [[Delta(text="a", token_ids=(5,), logprobs=(-1.0,)),
                                 Delta(finish_reason="error", error="the step failed")]]
    app.service._step_s = 0.1
    stream = client.completions.create(model=MODEL, prompt="ab", stream=True)
    assert next(stream).choices[0].text == "a"
    with pytest.raises(openai.APIError, match="the step failed"):
        next(stream)


def test_keys(tmp_path, caplog):
    """As the client sends them; every case on every interface is in tests/serving/access/test_matrix.py."""
    keyring = Keyring(tmp_path)
    good, reader = keyring.add(), keyring.add("read-only")
    with running_app(guard=keyring.guard()) as app:
        def client(key: str) -> openai.OpenAI:
            return openai.OpenAI(base_url=f"{app.url}/v1", api_key=key, max_retries=0)

        for key, kind in (("sk-wrong", openai.AuthenticationError), (reader, openai.PermissionDeniedError)):
            with pytest.raises(kind) as raised:
                client(key).completions.create(model=MODEL, prompt="ab")
            challenge = raised.value.response.headers.get("www-authenticate")
            assert challenge == ("Bearer" if kind is openai.AuthenticationError else None)
        assert client(reader).models.list().data[0].id == MODEL
        assert client(good).completions.create(model=MODEL, prompt="ab", max_tokens=2).choices[0].text == "ab"
        assert httpx.get(f"{app.url}/v1/models", headers={"x-api-key": reader}).status_code == 200
        found = [httpx.get(f"{app.url}/{path}").status_code for path in ("healthz", "readyz", "metrics", "v1/models")]
        assert found == [200, 200, 401, 401]
    assert good not in caplog.text and reader not in caplog.text


def test_who_may_not_is_refused_before_the_body_is_read_and_a_bad_body_counts(tmp_path):
    keyring = Keyring(tmp_path)
    good = keyring.add(requests_per_minute=1)
    with running_app(guard=keyring.guard()) as app, socket.create_connection(("127.0.0.1", app.port), 10) as stranger:
        stranger.sendall(request_bytes(b"{", length=1000))
        assert b" 401 " in stranger.recv(1 << 16)
        headers = {"content-type": "application/json", "authorization": f"Bearer {good}"}
        found = [httpx.post(f"{app.url}/v1/completions", content=content, headers=headers).status_code
                 for content in (b"{ no JSON", b'{"prompt": "ab"}')]
        assert found == [400, 429]
    assert [line["status"] for line in keyring.audited()] == ["unauthenticated", "invalid", "rate_limited"]
