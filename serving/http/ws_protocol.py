"""uvicorn's WebSocket, which by itself reads for ever from clients that only take up its time."""

from __future__ import annotations

import time

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

MAX_PINGS, PING_PERIOD_S = 100, 10.0  # so many pings in this time; clients send one in 20 s or so
MAX_UNSENT_BYTES = 32 << 20  # answers to pings are not held back: of who reads none they would pile up
MAX_LATE_BYTES = 256 << 10  # from a client that was told that the connection is closed, instead of its own good-bye


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """One WebSocket; a client that does more than this is cut off."""

    _late_bytes = 0
    _pings = 0
    _pings_since = 0.0

    def data_received(self, data: bytes) -> None:
        """Takes what came."""
        if self.transport.is_closing():
            return
        if self.close_sent:
            self._late_bytes += len(data)
        if self._late_bytes > MAX_LATE_BYTES or self.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.transport.abort()
            return
        super().data_received(data)

    def handle_ping(self) -> None:
        """Answers a ping."""
        now = time.monotonic()
        if now - self._pings_since > PING_PERIOD_S:
            self._pings, self._pings_since = 0, now
        self._pings += 1
        if self._pings > MAX_PINGS:
            self.transport.abort()
        else:
            super().handle_ping()
