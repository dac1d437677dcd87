"""Spans on their way: sent over OTLP (HTTP, protobuf) to a collector on this machine, which reads what came."""

from __future__ import annotations

import gzip
import http.server
import threading

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from serving.client import Client
from serving.options import ServerOptions
from tests.serving.access.keyring import Keyring
from tests.serving.doubles import running_server

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "红桃皇后 heard this"  # nothing of it may be told


class Collector(http.server.ThreadingHTTPServer):
    """Takes exports in.

    Attributes:
      sent: the bodies, as they came.
      paths: where they came to.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.sent: list[bytes] = []
        self.paths: list[str] = []

    def spans(self) -> list[tuple[dict, Span]]:
        """Each span with its resource's attributes."""
        found = []
        for body in self.sent:
            for resource in otlp.ExportTraceServiceRequest.FromString(body).resource_spans:
                assert [scope.scope.name for scope in resource.scope_spans] == ["llm_jax.serving"]
                found += [(attributes(resource.resource), span) for scope in resource.scope_spans
                          for span in scope.spans]
        return found


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert self.headers["content-type"] == "application/x-protobuf"
        self.server.sent.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
        self.server.paths.append(self.path)
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.end_headers()
        self.wfile.write(otlp.ExportTraceServiceResponse().SerializeToString())

    def log_message(self, *args: object) -> None:
        pass


def attributes(holder) -> dict:
    """Keys and plain values."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in holder.attributes}


@pytest.fixture
def collector(monkeypatch):
    made = Collector()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "here")
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # a proxy for the internet does not know this machine's own ports
    yield made
    made.shutdown()
    made.server_close()


def test_a_request_s_span_arrives_over_the_network(collector, tmp_path):
    """By the caller's trace, with the names that the conventions have, and nothing that was said or shown."""
    keyring = Keyring(tmp_path)
    key = keyring.add("user", tenant="乙")
    options = ServerOptions(model_name="tiny", http_port=0, keys_file=str(keyring.path), traces=True)
    with running_server(options=options) as running:
        with httpx.Client(base_url=running.server.http_address, headers={"authorization": f"Bearer {key}"}) as web:
            sent = web.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 5}, headers={
                "traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine-1"})
            assert sent.status_code == 200
            assert web.post("/v1/completions", json={"prompt": SECRET, "max_tokens": -1}).status_code == 400
        with Client(running.address, api_key=key) as client:
            assert client.embed([SECRET])
    # Stopping the server has sent what was left.
    assert set(collector.paths) == {"/v1/traces"}
    answered, refused, embedded = (span for _, span in sorted(collector.spans(), key=lambda one: (
        one[1].start_time_unix_nano)))
    assert {resource["service.name"] for resource, _ in collector.spans()} == {"here"}

    assert (answered.name, answered.kind) == ("text_completion tiny", Span.SPAN_KIND_SERVER)
    assert (answered.trace_id.hex(), answered.parent_span_id.hex()) == (TRACE, PARENT)
    found = attributes(answered)
    assert 0 <= found.pop("gen_ai.server.time_to_first_token") <= (
        answered.end_time_unix_nano - answered.start_time_unix_nano) / 1e9
    assert found == {
        "gen_ai.operation.name": "text_completion", "gen_ai.request.model": "tiny", "gen_ai.system": "llm_jax",
        "gen_ai.usage.input_tokens": len(SECRET) + 1, "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": found["gen_ai.usage.cache_read.input_tokens"],
        "llm_jax.interface": "http", "llm_jax.method": "POST /v1/completions", "llm_jax.request_id": "mine-1",
        "llm_jax.queue_seconds": found["llm_jax.queue_seconds"], "llm_jax.status": "ok"}
    assert [event.name for event in answered.events] == ["first_token"]
    assert answered.status.code == Status.STATUS_CODE_UNSET

    assert (refused.parent_span_id, refused.status.code) == (b"", Status.STATUS_CODE_ERROR)
    assert attributes(refused)["error.type"] == attributes(refused)["llm_jax.status"] == "invalid_value"
    assert embedded.name == "embeddings tiny" and embedded.trace_id not in (answered.trace_id, refused.trace_id)
    assert attributes(embedded)["llm_jax.interface"] == "grpc"

    told = b"".join(collector.sent)
    for kept in (SECRET, SECRET[:4], "heard", key, key[-20:], "乙"):
        assert kept.encode() not in told
