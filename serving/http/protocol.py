"""uvicorn's HTTP, which by itself waits for ever for a request's head, of any length, and for clients that are gone."""

from __future__ import annotations

import asyncio
import socket

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10  # request line and headers, or what stands for nothing between two pieces of a body
HEAD_S = 30.0  # from a connection's or a request's beginning to the end of its head
PROBE_AFTER_S, PROBE_EVERY_S, PROBES = 30, 10, 3  # a silent client whose machine has vanished is found out within 60 s


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0  # of the request that is being read
    _unread_bytes = 0  # received since the parser last made something of it
    _too_long = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        super().connection_made(transport)
        _probe(transport.get_extra_info("socket"))
        self._hurry()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing any more."""
        self._at_ease()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes what came, as long as something comes of it."""
        self._unread_bytes += len(data)
        super().data_received(data)
        if self._unread_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._too_long = True
            self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """Tells why the connection ends, in plain text: there is no request yet to answer."""
        if not self._too_long:
            super().send_400_response(msg)
            return
        text = f"the request's line and headers are too long: at most {MAX_HEAD_BYTES} bytes are taken".encode()
        self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain\r\n"
                             b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))
        self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head_bytes = 0
        self._hurry()

    def on_url(self, url: bytes) -> None:
        """A piece of the path."""
        self._took(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a line behind a body, which counts as one."""
        self._took(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there; the body's pieces have a time limit of their own."""
        self._unread_bytes = 0
        self._at_ease()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is read."""
        self._unread_bytes = 0
        super().on_message_complete()

    def _took(self, num_bytes: int) -> None:
        self._unread_bytes = 0
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self._too_long = True
            raise ValueError("the head is too long")  # the parser makes it an error of its own

    def _hurry(self) -> None:
        self._at_ease()
        self._timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _at_ease(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _probe(connection: socket.socket | None) -> None:
    if connection is None:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", PROBE_AFTER_S), ("TCP_KEEPINTVL", PROBE_EVERY_S), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
