"""Messages between the doors' process and the engine's: pickled tuples, each behind its length.

Both ends are this program, and nobody else can reach the socket pair between them: what is unpickled is our own.
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Iterator
from typing import Any

from llm_jax.inference.request import Delta

_LENGTH = struct.Struct("<Q")


def pack(message: tuple[Any, ...]) -> bytes:
    """A message as it goes over the wire."""
    payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(payload)) + payload


class Unpacker:
    """Cuts what arrives into messages."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._wanted = 0  # bytes of the message that has begun to arrive, its length included; 0 is not known yet

    def feed(self, data: bytes) -> Iterator[tuple[Any, ...]]:
        """Takes what came next; gives the messages that it completes."""
        self._held += data
        while True:
            if not self._wanted and len(self._held) >= _LENGTH.size:
                self._wanted = _LENGTH.size + _LENGTH.unpack_from(self._held)[0]
            if not self._wanted or len(self._held) < self._wanted:
                return
            with memoryview(self._held) as view:
                message = pickle.loads(view[_LENGTH.size:self._wanted])
            del self._held[:self._wanted]
            self._wanted = 0
            yield message


def receive(line: socket.socket) -> tuple[Any, ...] | None:
    """The next message on a blocking socket; None if the other end has hung up."""
    try:
        head = _exactly(line, _LENGTH.size)
        return pickle.loads(_exactly(line, _LENGTH.unpack(head)[0]))
    except (ConnectionError, EOFError):
        return None


def _exactly(line: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    with memoryview(data) as view:
        got = 0
        while got < count:
            part = line.recv_into(view[got:])
            if not part:
                raise EOFError
            got += part
    return data


def slim(delta: Delta) -> Delta | tuple[Any, ...]:
    """A delta as it is sent: the usual ones, which go by the thousand, as a tuple of the fields that they have."""
    if delta.finish_reason is None and not delta.top_logprobs and not delta.prompt_logprobs:
        return delta.text, delta.token_ids, delta.logprobs
    return delta


def full(sent: Delta | tuple[Any, ...]) -> Delta:
    """The inverse of `slim`."""
    return Delta(*sent) if isinstance(sent, tuple) else sent
