"""Spans: what they say of a request, whose trace they belong to, and what they never say."""

from __future__ import annotations

import asyncio
import builtins

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llm_jax.errors import UserError
from llm_jax.inference.request import Usage
from serving.access.identity import Caller
from serving.calls import Calls
from serving.errors import Reason
from serving.http.app import make_app
from serving.http.deps import ModelInfo
from serving.tracing import Traces
from tests.serving.doubles import FakeService

CALLER = Caller("http", "/v1/completions", "req-1", credential="sk-secret")
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def traces(exporter, monkeypatch):
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    made = Traces("tiny", exporter)
    yield made
    made.close()


def ended(traces, exporter):
    traces._provider.force_flush()
    (span,) = exporter.get_finished_spans()
    return span


def test_an_answered_request(traces, exporter):
    span = traces.start(CALLER, "generate", f"00-{TRACE}-b7ad6b7169203331-01")
    span.first_token()
    span.first_token()  # of another sample
    span.used(Usage(10, 5, 8, queue_seconds=0.5))
    span.used(Usage(10, 7, 8, queue_seconds=0.25))
    span.end()
    found = ended(traces, exporter)
    assert found.name == "text_completion tiny" and f"{found.context.trace_id:032x}" == TRACE
    attributes = dict(found.attributes)
    assert 0 <= attributes.pop("gen_ai.server.time_to_first_token") < 1
    assert attributes == {
        "gen_ai.operation.name": "text_completion", "gen_ai.request.model": "tiny", "gen_ai.system": "llm_jax",
        "gen_ai.usage.input_tokens": 10, "gen_ai.usage.output_tokens": 12, "gen_ai.usage.cache_read.input_tokens": 8,
        "llm_jax.interface": "http", "llm_jax.method": "/v1/completions", "llm_jax.request_id": "req-1",
        "llm_jax.queue_seconds": 0.5, "llm_jax.status": "ok"}
    assert [event.name for event in found.events] == ["first_token"] and found.status.is_ok
    assert "sk-secret" not in found.to_json()
    assert found.resource.attributes["service.name"] == "llm_jax"
    assert found.resource.attributes["deployment.environment"] == "test"


@pytest.mark.parametrize("status, is_ok", [(Reason.INTERNAL.value.code, False), ("cancelled", True)])
def test_how_it_ended(traces, exporter, status, is_ok):
    traces.start(CALLER, "embed").end(status)
    found = ended(traces, exporter)
    assert found.status.is_ok is is_ok and found.attributes["llm_jax.status"] == status
    assert found.attributes.get("error.type") == (None if is_ok else status)


@pytest.mark.parametrize("sent", ["", "nonsense", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "\x00" * 9999])
def test_a_header_that_is_none_begins_a_trace(traces, exporter, sent):
    traces.start(CALLER, "generate", sent).end()
    assert ended(traces, exporter).parent is None


def test_a_request_over_http(traces, exporter):
    """From the door to the exporter: the caller's trace, the tokens, why one was refused; nothing of /metrics."""
    async def ask() -> None:
        calls = Calls(service := FakeService(), traces=traces)
        app = make_app(calls, ModelInfo.of(calls.front, "tiny"))
        try:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
                for prompt in ("abc", "a" * 20_000):
                    await client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 5},
                                      headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
                await client.get("/metrics")
        finally:
            service.close()

    asyncio.run(ask())
    traces._provider.force_flush()
    answered, refused = exporter.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in (answered, refused)} == {TRACE}
    assert answered.attributes["gen_ai.usage.input_tokens"] == 4  # the text's and the one in front
    assert answered.attributes["gen_ai.usage.output_tokens"] == 5
    assert answered.attributes["gen_ai.server.time_to_first_token"] > 0
    assert answered.attributes["llm_jax.method"] == "POST /v1/completions" and answered.status.is_ok
    assert refused.attributes["llm_jax.status"] == Reason.INVALID.value.code and not refused.status.is_ok


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("opentelemetry.sdk"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'llm_jax\[tracing\]'"):
        Traces("tiny")
