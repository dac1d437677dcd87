"""The HTTP door apart from what is asked of it: ids, errors, limits, streams and those who leave them."""

from __future__ import annotations

import gzip
import json
import logging
import re
import socket
import threading
import time

import httpx
import pytest

from llm_jax.inference.request import DeadlineExceeded, Delta, QueueFull, Unavailable
from serving.http import middleware, sse
from serving.metrics import Metrics
from tests.serving.doubles import FakeService, wait_until
from tests.serving.http.conftest import MODEL, running_app

COMPLETIONS = "/v1/completions"


def complete(http: httpx.Client, **fields) -> httpx.Response:
    return http.post(COMPLETIONS, json={"prompt": "ab", "max_tokens": 2} | fields)


def events(text: str) -> list:
    """The data of a stream's events."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in found]


def error_of(response: httpx.Response) -> dict:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(("sent", "kept"), [("a-1/b:2", True), ("x" * 129, False), ("two words", False), ("é", False)])
def test_a_request_id_is_kept_if_it_is_sane(http, sent, kept):
    answer = http.get("/healthz", headers={"x-request-id": sent.encode()})
    assert (answer.headers["x-request-id"] == sent) == kept
    assert re.fullmatch(r"[\w./:-]+", answer.headers["x-request-id"])


def test_every_answer_has_a_request_id(http):
    answers = [http.get("/nowhere"), http.get(COMPLETIONS), complete(http), complete(http, stream=True),
               complete(http, n=0), http.post(COMPLETIONS, content=b"x" * 9_000_000)]
    assert [answer.status_code for answer in answers] == [404, 405, 200, 200, 400, 413]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


def test_the_log_has_a_line_for_each_request_with_its_id_and_no_key(http, caplog):
    key = "sk-0123456789abcdef"
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append((middleware.logs.request_id.get(), record.getMessage()))
    caplog.set_level(logging.INFO, logger=middleware.__name__)
    middleware.log.addHandler(handler)
    try:
        http.post(COMPLETIONS, json={"prompt": "ab", "max_tokens": 1},
                  headers={"x-request-id": "mine", "authorization": f"Bearer {key}"})
        http.get("/a%0d%0aINFO forged", headers={"x-request-id": "mine-2"})
        http.get("/healthz")
        assert wait_until(lambda: len(found) == 2)
    finally:
        middleware.log.removeHandler(handler)
    assert [request_id for request_id, _ in found] == ["mine", "mine-2"]
    assert re.fullmatch(rf"POST {COMPLETIONS} 200 \d\.\d+ s", found[0][1])
    assert "404" in found[1][1] and "\n" not in found[1][1] and "\r" not in found[1][1]
    assert key not in caplog.text


@pytest.mark.parametrize(("path", "status", "code", "named"), [
    ("GET /v1/nothing", 404, "not_found", "/v1/nothing"), ("PUT /v1/models", 405, "method_not_allowed", "GET"),
    ("GET /v1/completions", 405, "method_not_allowed", "POST"), ("GET /docs", 404, "not_found", "/docs"),
    ("POST /v1/completions/", 404, "not_found", "/v1/completions/")])
def test_paths_and_methods_that_are_not_there(http, path, status, code, named):
    answer = http.request(*path.split())
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["code"]) == (status, "invalid_request_error", code)
    assert named in error["message"]
    assert status != 405 or answer.headers["allow"] == named


@pytest.mark.parametrize(("content", "kind", "code"), [
    (b"", "application/json", "missing_required_parameter"), (b"{", "application/json", "invalid_json"),
    (b"\xff", "application/json", "invalid_json"), (b"[" * 100_000, "application/json", "invalid_json"),
    (b'{"prompt": "\\ud800"}', "application/json", "invalid_json"), (b"[1]", "application/json", "invalid_type"),
    (b'{"prompt": "a", "seed": NaN}', "application/json", "invalid_json"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json", "invalid_json"),
    (b'{"prompt": "a"}', "text/plain", "invalid_type"), (b'{"prompt": "a"}', "", "invalid_type")])
def test_bodies_that_are_no_json_object(http, content, kind, code):
    answer = http.post(COMPLETIONS, content=content, headers={"content-type": kind} if kind else {})
    assert (answer.status_code, error_of(answer)["code"]) == (400, code)


def test_a_compressed_body_is_told_what_is_wrong_with_it(http):
    answer = http.post(COMPLETIONS, content=gzip.compress(b'{"prompt": "a"}'),
                       headers={"content-type": "application/json", "content-encoding": "gzip"})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")
    assert "'gzip', and must not be compressed" in error_of(answer)["message"]


@pytest.mark.parametrize(("fault", "status", "code", "retries"), [
    (QueueFull("too many"), 429, "queue_full", True), (Unavailable("going down"), 503, "unavailable", True),
    (DeadlineExceeded("too late"), 504, "deadline_exceeded", False),
    (Delta(finish_reason="error", error="the step failed"), 500, "internal_error", False),
    (Delta(finish_reason="deadline"), 504, "deadline_exceeded", False)])
@pytest.mark.parametrize("stream", [False, True])
def test_how_requests_end_that_fail_before_their_first_token(app, http, fault, status, code, retries, stream):
    app.service.faults["ab"] = fault
    answer = complete(http, stream=stream)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert ("retry-after" in answer.headers) == retries
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("stream", [False, True])
def test_the_traceback_of_a_fault_of_ours_is_in_the_log_alone(app, http, caplog, stream):
    app.service.faults["ab"] = RuntimeError("some bug")
    answer = complete(http, stream=stream)
    assert answer.status_code == 500 and "Traceback" not in answer.text
    assert error_of(answer)["type"] == "server_error"
    assert complete(http, prompt="b").status_code == 200
    assert "RuntimeError: some bug" in caplog.text and "Traceback" in caplog.text


def test_a_fault_outside_of_any_handler_is_answered_too(app, http, caplog, monkeypatch):
    monkeypatch.setattr(type(app.calls), "is_live", property(lambda self: 1 / 0))
    answer = http.get("/readyz")
    assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
    assert answer.headers["x-request-id"] and "ZeroDivisionError" in caplog.text


def test_a_body_has_a_limit_whether_its_length_is_told_or_not(app, http):
    most = 2 * app.calls.max_message_bytes
    for content in (b" " * (most + 1), iter([b" " * (most // 4)] * 5)):
        answer = http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, error_of(answer)["code"]) == (413, "request_too_large")
        assert str(most) in error_of(answer)["message"]
    body = json.dumps({"prompt": "ab", "max_tokens": 2}).encode()
    answer = http.post(COMPLETIONS, content=body.ljust(most), headers={"content-type": "application/json"})
    assert answer.status_code == 200


def test_a_body_that_stops_coming_is_given_up(app, monkeypatch):
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.05)
    with socket.create_connection(("127.0.0.1", app.port), timeout=10) as connection:
        connection.sendall(request_bytes(b"{", length=100))
        assert b" 408 " in connection.recv(1 << 16)


def test_a_client_that_leaves_in_the_middle_of_its_body_costs_nothing(app, http, caplog):
    with socket.create_connection(("127.0.0.1", app.port), timeout=10) as connection:
        connection.sendall(request_bytes(b"{", length=100))
    assert complete(http).status_code == 200
    assert not app.service.submitted[1:] and "Traceback" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(app, stream):
    body = json.dumps({"prompt": "ab", "max_tokens": 9000, "n": 2, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", app.port), timeout=10) as connection:
        connection.sendall(request_bytes(body))
        assert wait_until(lambda: len(app.service.submitted) == 2)
        assert not stream or connection.recv(100)
    assert wait_until(lambda: sorted(app.service.cancelled) == [0, 1])
    assert wait_until(lambda: app.calls.running == 0)


def test_a_client_that_leaves_before_its_first_token_ends_its_request():
    with running_app(FakeService(step_s=0.5)) as app:
        with socket.create_connection(("127.0.0.1", app.port), timeout=10) as connection:
            connection.sendall(request_bytes(b'{"prompt": "ab", "stream": true}'))
            assert wait_until(lambda: app.service.submitted)
        assert wait_until(lambda: app.service.cancelled == [0] and app.calls.running == 0)


def test_a_slow_reader_delays_nobody_and_gets_everything_merged(app, http):
    """Some MB of events for one who does not read: they are merged behind a full socket, and others go on."""
    app.service.max_context = 100_000
    body = json.dumps({"prompt": "ab" * 500, "max_tokens": 9000, "stream": True, "n": 8}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", app.port))
        app.service._step_s = 0
        connection.sendall(request_bytes(body))
        assert wait_until(lambda: len(app.service.submitted) == 8)
        began = time.monotonic()
        assert complete(http).status_code == 200
        assert time.monotonic() - began < 2
        assert wait_until(lambda: not app.service._running)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(1 << 16)
    found = events(re.sub(rb"\r\n[0-9a-f]+\r\n", b"", received.partition(b"\r\n\r\n")[2]).decode()
                   .partition("data: ")[2].join(("data: ", "")))
    assert found[-1] == "[DONE]"
    texts = {i: "".join(c["text"] for e in found[:-1] for c in e["choices"] if c["index"] == i) for i in range(8)}
    assert set(texts.values()) == {"ab" * 4500}
    assert len(found) < 8 * 9000 / 4


def test_a_stream_that_fails_on_the_way_ends_with_the_error_and_not_with_done(app, http):
    app.service.faults["ab"] = [[Delta(text="你", token_ids=(7,), logprobs=(-1.0,)),
                                 Delta(finish_reason="error", error="the step failed")]]
    app.service._step_s = 0.1
    answer = complete(http, stream=True)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    first, last = events(answer.text)
    assert first["choices"][0]["text"] == "你"
    assert last == {"error": {"message": "the step failed", "type": "server_error", "param": None,
                              "code": "internal_error"}}


def test_a_silent_stream_is_kept_alive_and_may_fail_all_the_same(app, http, monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    app.service._step_s = 0.2
    answer = complete(http, stream=True)
    assert ": keep-alive\n\n" in answer.text and events(answer.text)[-1] == "[DONE]"
    app.service.faults["ab"] = Delta(finish_reason="error", error="the step failed")
    answer = complete(http, stream=True)
    assert answer.status_code == 200 and answer.text.startswith(": keep-alive\n\n")
    assert [event["error"]["message"] for event in events(answer.text)] == ["the step failed"]


def test_draining(app, http):
    """Alive but not ready; what runs goes on, what comes is told to try elsewhere."""
    app.service._step_s = 0.01
    found = {}
    stream = threading.Thread(target=lambda: found.update(text=complete(http, stream=True, max_tokens=100).text))
    stream.start()
    assert wait_until(lambda: app.service.submitted)
    ready = http.get("/readyz").json()
    assert http.get("/healthz").json() == {"status": "ok"} and ready["status"] == "ready"
    app.calls.refuse_new()
    answers = http.get("/healthz"), http.get("/readyz"), complete(http), complete(http, stream=True)
    assert [answer.status_code for answer in answers] == [200, 503, 503, 503]
    heads = http.head("/healthz"), http.head("/readyz")
    assert [(head.status_code, head.content) for head in heads] == [(200, b""), (503, b"")]
    assert answers[2].headers["retry-after"] and error_of(answers[2])["code"] == "unavailable"
    stream.join()
    assert "".join(e["choices"][0]["text"] for e in events(found["text"])[:-1]) == "ab" * 50


def test_metrics_count_requests_by_route_and_end(app):
    metrics = Metrics()
    with running_app(metrics=metrics) as app, httpx.Client(base_url=app.url) as http:
        complete(http)
        complete(http, n=0)
        complete(http, prompt="x" * 9_000_000)
        http.get(f"/v1/models/{MODEL}")
        http.get("/v1/models/other")
        text = http.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("llm_jax_requests_total")]
    counted = {(re.search('method="(.*?)"', line)[1], re.search('status="(.*?)"', line)[1]): line.split()[-1]
               for line in lines}
    assert counted == {("POST /v1/completions", "ok"): "1.0", ("POST /v1/completions", "invalid_value"): "1.0",
                       ("POST /v1/completions", "request_too_large"): "1.0",
                       ("GET /v1/models/{model_name:path}", "ok"): "1.0",
                       ("GET /v1/models/{model_name:path}", "not_found"): "1.0"}
    assert "llm_jax_num_requests_running 0" in text and "llm_jax_time_to_first_token_seconds_count 1" in text


def test_a_server_without_metrics_says_so(http):
    assert http.get("/metrics").status_code == 404


def test_the_openapi_document_names_every_field_and_both_ways_to_send_a_key(http):
    document = http.get("/openapi.json").json()
    fields = document["components"]["schemas"]["CompletionRequest"]
    assert fields["additionalProperties"] is False and fields["required"] == ["prompt"]
    assert {"prompt", "n", "best_of", "echo", "logprobs", "stop", "suffix", "guided_json"} <= set(fields["properties"])
    assert set(document["components"]["securitySchemes"]) == {"bearer", "header"}
    operations = [one for path in document["paths"].values() for one in path.values()]
    assert all({"4XX", "5XX"} <= set(one["responses"]) and "422" not in one["responses"] for one in operations)
    assert all(one.get("description") for one in operations)
    assert len({one["operationId"] for one in operations}) == len(operations)


def request_bytes(body: bytes, length: int | None = None) -> bytes:
    return (b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            % (COMPLETIONS.encode(), len(body) if length is None else length)) + body
