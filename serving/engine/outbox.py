"""From the engine's thread to the doors' process, without the engine ever waiting for it."""

from __future__ import annotations

import socket
import threading
from typing import Any

from llm_jax.inference.request import Delta
from serving.engine import wire
from serving.mailbox import Gathered


class Outbox:
    """What is to be sent to the doors: answers, in order, and the news of requests, merged while the line is full.

    What is held is at most the text of the requests that run, however long the other end does not read.
    """

    def __init__(self, line: socket.socket) -> None:
        """Starts the thread that sends; `line` is blocking."""
        self._line = line
        self._answers: list[tuple[Any, ...]] = []
        self._news: dict[int, Gathered] = {}
        self._changed = threading.Condition()  # guards everything above
        self._ended = False
        self._thread = threading.Thread(target=self._send, name="outbox", daemon=True)
        self._thread.start()

    def answer(self, *message: Any) -> None:
        """Sends a message, behind those before it."""
        with self._changed:
            self._answers.append(message)
            self._changed.notify()

    def push(self, request_id: int, delta: Delta) -> None:
        """Sends news of a request; never blocks."""
        with self._changed:
            is_first = not self._news
            self._news.setdefault(request_id, Gathered()).add(delta)
            if is_first:
                self._changed.notify()

    def drop(self, request_id: int) -> None:
        """Forgets news that nobody waits for any more."""
        with self._changed:
            self._news.pop(request_id, None)

    def close(self, timeout_s: float) -> None:
        """Sends what is left, for so long at most."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _send(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._answers or self._news or self._ended)
                if not self._answers and not self._news:
                    return
                answers, self._answers = self._answers, []
                news, self._news = self._news, {}
            parts = [wire.pack(message) for message in answers]
            if news:
                parts.append(wire.pack(("news", {i: wire.slim(held.joined()) for i, held in news.items()})))
            try:
                self._line.sendall(b"".join(parts))
            except OSError:
                return  # the doors' process has ended, which whoever reads the line finds out
