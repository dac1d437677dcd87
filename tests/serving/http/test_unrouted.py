"""Requests that end before anybody has admitted them have an audit line and a count like any other."""

from __future__ import annotations

import http.client
import json
import socket

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from serving.http import middleware
from serving.metrics import Metrics
from serving.state import State
from tests.serving.access.keyring import Keyring
from tests.serving.doubles import wait_until
from tests.serving.http.conftest import running_app
from tests.serving.http.test_app import error_of, request_bytes


@pytest.fixture
def guarded(tmp_path):
    ring = Keyring(tmp_path)
    with running_app(guard=ring.guard(), metrics=Metrics()) as app:
        yield app, ring


def line_of(ring: Keyring) -> dict:
    """The one audit line."""
    assert wait_until(lambda: ring.audit_path.read_text().endswith("\n"))
    line, = ring.audited()
    return line


@pytest.mark.parametrize(("asked", "status", "code", "method"), [
    ("GET /v1/a-secret-in-a-path", 404, "not_found", "GET unknown"),
    ("POST /v1/completions/", 404, "not_found", "POST unknown"),
    ("PUT /v1/models", 405, "method_not_allowed", "PUT /v1/models")])
@pytest.mark.parametrize("known", [True, False])
def test_what_is_not_there_is_written_down(guarded, asked, status, code, method, known):
    app, ring = guarded
    key = ring.add(tenant="网站")
    verb, path = asked.split()
    answer = httpx.request(verb, app.url + path, headers={"x-api-key": key if known else "wrong"}, content=b"{}")
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    line = line_of(ring)
    assert (line["interface"], line["method"], line["status"], line["peer"]) == ("http", method, code, "127.0.0.1")
    assert line["request_id"] == answer.headers["x-request-id"] and line["tokens"] == 0
    assert (line["key_id"], line["tenant"], line["role"]) == (("key-0", "网站", "user") if known else ("", "", ""))
    assert "secret" not in ring.audit_path.read_text() and key not in ring.audit_path.read_text()
    assert f'llm_jax_requests_total{{interface="http",method="unknown",status="{code}"}} 1.0' in (
        app.calls.metrics.render(None, live=True).decode())


def test_a_websocket_at_another_path_is_written_down(guarded):
    app, ring = guarded
    with pytest.raises(InvalidStatus):
        connect(f"{app.url.replace('http', 'ws')}/v1/nowhere", proxy=None)
    line = line_of(ring)
    assert (line["interface"], line["method"], line["status"]) == ("websocket", "unknown", "not_found")


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_body_that_does_not_come_is_written_down(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.05)
    ring, state = Keyring(tmp_path), State(tmp_path / "state")
    path = "/v1/completions" if "json" in kind else "/v1/files"
    with running_app(guard=ring.guard(), options={"state": state}) as app:
        with socket.create_connection(("127.0.0.1", app.port), timeout=10) as connection:
            head = (f"POST {path} HTTP/1.1", "host: x", f"x-api-key: {ring.add('developer')}", f"content-type: {kind}",
                    "content-length: 100")
            connection.sendall("\r\n".join((*head, "", "-")).encode())
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, json.load(answer)["error"]["code"]) == (408, "request_timeout")
        assert (line_of(ring)["status"], line_of(ring)["method"]) == ("too_slow", f"POST {path}")
    state.close()


def test_a_client_that_leaves_in_the_middle_of_its_body_is_written_down(guarded):
    app, ring = guarded
    key = ring.add().encode()
    with socket.create_connection(("127.0.0.1", app.port), timeout=10) as connection:
        connection.sendall(request_bytes(b"{", length=100).replace(b"host: x", b"host: x\r\nx-api-key: " + key))
    assert (line_of(ring)["status"], line_of(ring)["key_id"]) == ("cancelled", "key-0")


def test_what_asks_for_nothing_has_no_line(guarded):
    app, ring = guarded
    for path in ("/healthz", "/readyz", "/", "/static/chat.js", "/openapi.json"):
        assert httpx.get(app.url + path).status_code == 200
    assert httpx.get(f"{app.url}/nowhere").status_code == 404
    assert line_of(ring)["status"] == "not_found"
