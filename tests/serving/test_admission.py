"""A request from its arrival to its end: what is counted, charged and written down, however it ends."""

from __future__ import annotations

import asyncio
import datetime
import logging

import httpx
import pytest

from llm_jax.errors import UserError
from llm_jax.inference.request import (
    DeadlineExceeded,
    Delta,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    Unavailable,
    Usage,
)
from serving import logs
from serving.access.guard import Guard
from serving.access.identity import Caller, sane_request_id
from serving.calls import Calls
from serving.errors import Reason, Rejected
from serving.metrics import Metrics
from tests.serving.access.keyring import NOW, Keyring
from tests.serving.doubles import FakeService, wait_until
from tests.serving.http.conftest import running_app


@pytest.fixture
def service():
    service = FakeService()
    yield service
    service.close()


@pytest.fixture
def keyring(tmp_path):
    return Keyring(tmp_path)


@pytest.fixture
def calls(service, keyring):
    calls = Calls(service, guard=keyring.guard(), metrics=Metrics())
    yield calls
    calls.guard.close()


def _caller(credential: str | None = None, **fields) -> Caller:
    return Caller(**{"interface": "http", "method": "POST /v1/completions", "request_id": "req-1",
                     "credential": credential, "peer": "10.0.0.7"} | fields)


async def _collect(calls: Calls, caller: Caller, text: str = "你好", num_samples: int = 1, **fields) -> list[Delta]:
    async with calls.admitted(caller, "generate") as admission:
        ids = await calls.encode(text)
        sampling = calls.sampling(ids, num_samples=num_samples, **{"max_tokens": 4} | fields)
        return await calls.collect(ids, sampling, num_samples, 0, admission=admission)


def _value(metrics: Metrics | None, name: str) -> float:
    assert metrics is not None
    for line in metrics.render().decode().splitlines():
        if line.startswith(f"llm_jax_{name} "):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def test_a_request_is_counted_charged_and_written_down(calls, service, keyring):
    key = keyring.add(tenant="网站", tokens_per_day=100)
    found = asyncio.run(_collect(calls, _caller(key), num_samples=2))
    assert [delta.text for delta in found] == ["你好你好"] * 2
    line, = keyring.audited()
    assert {name: line[name] for name in ("request_id", "key_id", "tenant", "role", "interface", "method", "status",
                                          "prompt_tokens", "completion_tokens", "tokens", "peer")} == {
        "request_id": "req-1", "key_id": "key-0", "tenant": "网站", "role": "user", "interface": "http",
        "method": "POST /v1/completions", "status": "ok", "prompt_tokens": 3, "completion_tokens": 8, "tokens": 11,
        "peer": "10.0.0.7"}
    assert service.terms == [("网站", None)]  # the engine's prefixes are the tenant's
    metrics = calls.metrics
    labels = '{interface="http",method="POST /v1/completions",status="ok"}'
    assert _value(metrics, f"requests_total{labels}") == 1
    assert _value(metrics, 'requests_in_progress{interface="http"}') == 0
    assert (_value(metrics, "prompt_tokens_total"), _value(metrics, "prompt_tokens_cached_total"),
            _value(metrics, "generation_tokens_total")) == (3, 2, 8)
    for name, count in (("time_to_first_token_seconds", 2), ("time_per_output_token_seconds", 6),
                        ("e2e_request_latency_seconds", 1), ("request_queue_time_seconds", 1)):
        assert _value(metrics, f"{name}_count") == count, name
    with pytest.raises(Rejected) as caught:  # 89 tokens are left
        asyncio.run(_collect(calls, _caller(key), max_tokens=90))
    assert caught.value.reason is Reason.OVER_QUOTA and len(service.submitted) == 2


def test_what_a_client_that_leaves_has_used_is_charged(calls, service, keyring):
    key = keyring.add(tokens_per_day=10_000)

    async def leave() -> None:
        begun = asyncio.Event()

        async def write(_news, _first_token) -> None:
            begun.set()

        async def ask() -> None:
            async with calls.admitted(_caller(key), "generate") as admission:
                ids = await calls.encode("你好")
                await calls.stream(ids, SamplingParams(max_tokens=9000), 1, 0, write, admission=admission)

        running = asyncio.create_task(ask())
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(leave())
    line, = keyring.audited()
    assert line["status"] == "cancelled" and 3 < line["tokens"] < 9000
    assert wait_until(lambda: service.cancelled == [0]) and calls.running == 0
    with pytest.raises(Rejected) as caught:
        asyncio.run(_collect(calls, _caller(key), max_tokens=9_996))  # with the prompt 9,999 of 10,000
    assert caught.value.reason is Reason.OVER_QUOTA
    assert _value(calls.metrics, 'rejections_total{reason="cancelled"}') == 0  # the server refused nothing


@pytest.mark.parametrize(("error", "reason", "field", "retries"), [
    (InvalidRequest("top_p must be", "top_p"), Reason.INVALID, "top_p", False),
    (PromptTooLong("the prompt has"), Reason.INVALID, "prompt", False),
    (UserError("not valid Unicode"), Reason.INVALID, None, False),
    (QueueFull("too many"), Reason.QUEUE_FULL, None, True),
    (DeadlineExceeded("too late"), Reason.DEADLINE, None, False),
    (Unavailable("stopped"), Reason.UNAVAILABLE, None, True),
    (Rejected(Reason.NOT_FOUND, "no such file", field="id"), Reason.NOT_FOUND, "id", False),
    (ZeroDivisionError("secret detail"), Reason.INTERNAL, None, False),
])
def test_every_error_has_a_reason(calls, service, keyring, error, reason, field, retries, caplog):
    key = keyring.add()
    service.faults["坏"] = error
    with pytest.raises(Rejected) as caught:
        asyncio.run(_collect(calls, _caller(key), "坏"))
    assert (caught.value.reason, caught.value.field, caught.value.retry_after_s is not None) == (reason, field, retries)
    assert keyring.audited()[-1]["status"] == reason.name.lower()
    assert _value(calls.metrics, f'rejections_total{{reason="{reason.name.lower()}"}}') == 1
    assert ("ZeroDivisionError: secret detail" in caplog.text) == (reason is Reason.INTERNAL)
    if reason is Reason.INTERNAL:  # what went wrong is for the log, by whose id it is found
        assert "secret" not in caught.value.message and "req-1" in caught.value.message
    else:
        assert caught.value.message == str(error)


def test_fields_at_fault_are_named(calls, keyring):
    key = keyring.add()
    for fields, field in (({"top_p": 2.0}, "top_p"), ({"stop": ("",)}, "stop"), ({"num_samples": 65}, "num_samples"),
                          ({"max_tokens": -1}, "max_tokens"), ({"best_of": 65}, "best_of"), ({"text": "x" * 10_000},
                          "prompt"), ({"logit_bias": {3: 1000.0}}, "logit_bias")):
        with pytest.raises(Rejected) as caught:
            asyncio.run(_collect(calls, _caller(key), **fields))
        assert (caught.value.reason, caught.value.field) == (Reason.INVALID, field)
    with pytest.raises(Rejected) as caught:
        asyncio.run(_collect(calls, _caller(key, tenant="x" * 257)))
    assert caught.value.field == "tenant"


def test_who_is_not_let_in_costs_the_engine_nothing(calls, service, keyring):
    expired = keyring.add(expires=NOW - datetime.timedelta(days=1))
    for caller, reason, key_id in ((_caller(), Reason.UNAUTHENTICATED, ""),
                                   (_caller("wrong"), Reason.UNAUTHENTICATED, ""),
                                   (_caller(expired), Reason.UNAUTHENTICATED, "key-0"),
                                   (_caller(keyring.add("read-only")), Reason.FORBIDDEN, "key-1")):
        with pytest.raises(Rejected) as caught:
            asyncio.run(_collect(calls, caller))
        assert caught.value.reason is reason
        line = keyring.audited()[-1]
        assert (line["status"], line["key_id"], line["tokens"]) == (reason.name.lower(), key_id, 0)
    assert not service.submitted


def test_a_connection_takes_no_place_among_the_requests_it_brings(calls, keyring):
    key = keyring.add(concurrent=1, requests_per_minute=2)

    async def connected() -> None:
        async with calls.admitted(_caller(key), "generate", counted=False):
            for _ in range(2):
                await _collect(calls, _caller(key))
            with pytest.raises(Rejected, match="2 requests a minute"):
                await _collect(calls, _caller(key))

    asyncio.run(connected())
    assert [line["status"] for line in keyring.audited()] == ["ok", "ok", "rate_limited", "ok"]


def test_a_batchs_line_runs_under_the_key_that_left_it(calls, service, keyring):
    keyring.add(tenant="网站", concurrent=1, requests_per_minute=1)
    caller = _caller(interface="batch", key_id="key-0")
    for _ in range(3):  # behind everything else: it counts for no rate
        asyncio.run(_collect(calls, caller))
    assert {(line["tenant"], line["interface"]) for line in keyring.audited()} == {("网站", "batch")}
    with pytest.raises(Rejected):  # no client can name a key instead of having it
        asyncio.run(_collect(calls, _caller(key_id="key-0")))
    keyring.change("key-0", revoked=NOW)
    with pytest.raises(Rejected) as caught:
        asyncio.run(_collect(calls, caller))
    assert caught.value.reason is Reason.UNAUTHENTICATED


def test_without_keys_the_request_says_whose_it_is(service):
    for guard in (None, Guard.open()):
        asyncio.run(_collect(Calls(service, guard=guard), _caller(tenant="甲")))
    assert service.terms == [("甲", None)] * 2


def test_with_keys_the_key_says_whose_it_is(calls, service, keyring):
    asyncio.run(_collect(calls, _caller(keyring.add(tenant="乙"), tenant="甲")))
    assert service.terms == [("乙", None)]


def test_log_lines_of_a_request_carry_its_id(calls, keyring, service):
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(logs.TextFormatter().format(record))

    handler = Kept()
    logging.getLogger("serving").addHandler(handler)
    service.faults["坏"] = ZeroDivisionError()
    try:
        with pytest.raises(Rejected):
            asyncio.run(_collect(calls, _caller(keyring.add(), request_id="mine-7"), "坏"))
    finally:
        logging.getLogger("serving").removeHandler(handler)
    assert "[mine-7]" in lines[0]


def test_what_did_not_go_through_the_engine_can_be_charged_too(calls, keyring):
    key = keyring.add()

    async def read() -> None:
        async with calls.admitted(_caller(key), "read") as admission:
            admission.add_usage(Usage(7, 0))

    asyncio.run(read())
    assert keyring.audited()[0]["tokens"] == 7


@pytest.mark.parametrize(("sent", "kept"), [
    ("a-1_B.c:d/e+f=@", True), ("x" * 128, True), ("x" * 129, False), ("", False), (None, False), ("a b", False),
    ("a\nb", False), ("你", False), ('"', False), ("sk-lljx-Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6", False),
])
def test_a_clients_id_is_kept_if_it_can_stand_in_a_log(sent, kept):
    made = sane_request_id(sent)
    assert (made == sent) == kept and sane_request_id(made) == made
    assert kept or made != sane_request_id(sent)


def test_collected_is_what_was_streamed(service):
    """The same text, tokens and log-probabilities, whatever pieces they came in."""
    calls = Calls(service)
    pieces: list[Delta] = []

    async def both() -> Delta:
        async def write(news, first_token) -> None:
            assert first_token[0] >= 0
            pieces.append(news[0])

        ids = await calls.encode("你好🙂")
        sampling = SamplingParams(max_tokens=50, logprobs=2, prompt_logprobs=1)
        async with calls.admitted(_caller(), "generate") as admission:
            await calls.stream(ids, sampling, 1, 0, write, admission=admission)
            found, = await calls.collect(ids, sampling, 1, 0, admission=admission)
        return found

    found = asyncio.run(both())
    assert len(pieces) > 3
    for name in ("text", "token_ids", "logprobs", "top_logprobs", "prompt_logprobs"):
        whole = getattr(pieces[0], name)
        for piece in pieces[1:]:
            whole += getattr(piece, name)
        assert whole == getattr(found, name)
    assert (found.finish_reason, found.usage) == (pieces[-1].finish_reason, pieces[-1].usage)


@pytest.mark.parametrize(("path", "body", "tokens"), [
    ("/v1/completions", {"prompt": ["ab"] * 70, "max_tokens": 2}, 70 * 5),
    ("/v1/embeddings", {"input": ["ab"] * 70}, 70 * 3)])
@pytest.mark.parametrize("short", [0, 1])
def test_a_request_of_many_parts_finds_all_its_tokens_or_is_refused_before_any_runs(keyring, path, body, tokens, short):
    """Its last parts begin when the first have ended."""
    key = keyring.add(tokens_per_day=tokens - short)
    guard = keyring.guard()
    with running_app(guard=guard) as app:
        answer = httpx.post(app.url + path, json=body, headers={"x-api-key": key}, verify=False, timeout=30)
        if short:
            assert answer.status_code == 429 and answer.json()["error"]["code"] == "insufficient_quota"
            assert not app.service.submitted
        else:
            assert answer.status_code == 200 and keyring.audited()[0]["tokens"] == tokens
    guard.close()
