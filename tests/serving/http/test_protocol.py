"""Requests whose head never ends, in bytes or in time, and clients that vanish: each costs its own connection alone."""

from __future__ import annotations

import socket
import time

import httpx
import pytest

from serving.http import protocol
from serving.http.door import HttpDoor
from tests.serving.doubles import wait_until
from tests.serving.http.conftest import running_app
from tests.serving.http.test_app import COMPLETIONS, complete

MANY = 64 << 20  # more than the buffers of a connection on one machine hold (about 10 MiB)


def sent(port: int, *pieces: bytes) -> tuple[bytes, int]:
    """What the server answers, and how many bytes it took before it did."""
    taken = 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                taken += len(piece)
        except OSError:
            pass
        try:
            return connection.recv(1 << 16), taken
        except ConnectionResetError:
            return b"", taken


def repeated(piece: bytes) -> list[bytes]:
    return [piece] * (MANY // len(piece))


@pytest.mark.parametrize("pieces", [
    [b"GET /", *repeated(b"a" * 65_536)], [b"GET / HTTP/1.1\r\n", *repeated(b"a: b\r\n" * 1000)],
    [b"GET / HTTP/1.1\r\na: ", *repeated(b"b" * 65_536)], [b"GET / HTTP/1.1\r\n", *repeated(b"a" * 65_536)],
    [b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1; a=" % COMPLETIONS.encode(),
     *repeated(b"b" * 65_536)],
    [b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" % COMPLETIONS.encode(),
     *repeated(b"a: b\r\n" * 1000)]],
    ids=["path", "headers", "value", "name", "chunk", "trailers"])
def test_a_head_that_does_not_end_is_given_up(app, http, pieces):
    answer, taken = sent(app.port, *pieces)
    assert not answer or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    assert taken < MANY  # what the system's buffers hold, and no more
    assert complete(http).status_code == 200


def test_a_long_head_that_fits_is_taken(http):
    assert http.get("/healthz", headers={"cookie": "a" * 60_000}).status_code == 200
    refused = http.get("/healthz", headers={"cookie": "a" * 300_000})
    assert refused.status_code == 431 and str(protocol.MAX_HEAD_BYTES) in refused.text


@pytest.mark.parametrize("begun", [b"", b"GET /healthz HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_takes_too_long_is_given_up(monkeypatch, begun):
    monkeypatch.setattr(protocol, "HEAD_S", 0.2)
    with running_app() as app, socket.create_connection(("127.0.0.1", app.port), timeout=10) as connection:
        connection.sendall(begun)
        began = time.monotonic()
        try:
            assert connection.recv(100) == b""
        except ConnectionResetError:
            pass
        assert 0.1 < time.monotonic() - began < 5


def test_an_answer_and_the_next_request_have_their_time(monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_S", 0.2)
    with running_app() as app, httpx.Client(base_url=app.url) as http:
        app.service._step_s = 0.1
        assert complete(http, max_tokens=4).status_code == 200  # longer than a head may take
        time.sleep(0.4)
        assert http.get("/healthz").status_code == 200
        assert len(app._server.server_state.connections) == 1  # still the first


def test_clients_that_vanish_are_looked_for(app, http):
    http.get("/healthz")
    (connection,) = app._server.server_state.connections
    found = connection.transport.get_extra_info("socket")
    assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == protocol.PROBE_AFTER_S


def test_the_servers_own_door_and_its_tls_use_it():
    from serving.access.tls import NamingClients

    assert HttpDoor(None, [])._server.config.http is protocol.BoundedHttp
    assert issubclass(NamingClients, protocol.BoundedHttp)


def test_connections_are_forgotten(app):
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", app.port), timeout=10) as connection:
            connection.sendall(b"GET /heal")
    assert wait_until(lambda: not app._server.server_state.connections)
