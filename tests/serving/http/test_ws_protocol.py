"""WebSocket clients that take up the server's time and memory, and are cut off."""

from __future__ import annotations

import contextlib
import json
import socket

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from serving.http import websocket as door
from serving.http import ws_protocol
from tests.serving.doubles import wait_until

PING = b"\x89\xfd\0\0\0\0" + b"x" * 125  # masked with zeros


def open_websocket(app):
    return connect(app.url.replace("http", "ws") + "/v1/stream", proxy=None)


@contextlib.contextmanager
def silent_client(app):
    """The socket of a client that reads nothing after the handshake."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", app.port))
        connection.sendall(b"GET /v1/stream HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
                           b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n")
        assert b" 101 " in connection.recv(1000)
        yield connection


def is_cut_off(connection: socket.socket, data: bytes) -> bool:
    """Whether the server ends a connection that sends this again and again."""
    try:
        for _ in range(2_000):
            connection.sendall(data)
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


def test_a_client_that_does_nothing_but_ping_is_cut_off(app):
    with silent_client(app) as connection:
        assert is_cut_off(connection, PING * 100)
        assert wait_until(lambda: not app.calls.running)


def test_pings_now_and_then_are_answered(app, monkeypatch):
    monkeypatch.setattr(ws_protocol, "MAX_PINGS", 3)
    monkeypatch.setattr(ws_protocol, "PING_PERIOD_S", -1.0)  # each is in a period of its own
    with open_websocket(app) as websocket:
        for _ in range(10):
            assert websocket.ping().wait(10)
        websocket.send(json.dumps({"type": "start", "id": "a", "prompt": "好", "max_tokens": 1}))
        assert json.loads(websocket.recv(timeout=10))["text"] == "好"


def test_answers_that_nobody_reads_do_not_pile_up(app, monkeypatch):
    monkeypatch.setattr(ws_protocol, "MAX_PINGS", 1 << 30)
    monkeypatch.setattr(ws_protocol, "MAX_UNSENT_BYTES", 1 << 20)
    with silent_client(app) as connection:
        assert is_cut_off(connection, PING * 500)


def test_a_client_that_goes_on_after_the_end_is_cut_off(app, monkeypatch):
    monkeypatch.setattr(door, "MAX_FAULTS", 1)
    with silent_client(app) as connection:
        assert is_cut_off(connection, b"\x81\x81\0\0\0\0{" * 1000)


def test_a_client_that_says_good_bye_gets_the_reason(app, monkeypatch):
    monkeypatch.setattr(door, "MAX_FAULTS", 1)
    with open_websocket(app) as websocket:
        websocket.send("{")
        assert json.loads(websocket.recv(timeout=10))["type"] == "error"
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=10)
    assert closed.value.rcvd.code == 1008
