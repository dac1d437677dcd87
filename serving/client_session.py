"""The client's end of a bidirectional call: several requests at once, each started, read and cancelled by itself."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import grpc

from llm_jax.errors import UserError
from serving import messages
from serving.client_request import Asked, Chunk, chunk, generate_request

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Generation:
    """One request of a session: an iterator of its chunks, which raises `RequestFailed` if it fails.

    Attributes:
      id: by which the session knows it.
    """

    def __init__(self, name: str, cancel: Callable[[str], None]) -> None:
        self.id = name
        self._cancel = cancel
        self._arrived: queue.SimpleQueue[Chunk | Exception | None] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[Chunk]:
        while (news := self._arrived.get()) is not None:
            if isinstance(news, Exception):
                self._arrived.put(None)
                raise news
            yield news
        self._arrived.put(None)  # for whoever asks again

    def cancel(self) -> None:
        """Ends it, with `RequestFailed` (CANCELLED), unless it has ended."""
        self._cancel(self.id)

    def put(self, news: Chunk | Exception | None) -> None:
        """Takes what the session has heard of it; None is its end."""
        self._arrived.put(news)


class Session:
    """A call of `Inference.Session`; made by `Client.session`. Thread-safe.

    Args:
      open_call: starts the call with an iterator of requests.
      failure: makes the error of a call that ended with one.
      failed: makes the error of a request that failed by itself, of its status and message.
    """

    def __init__(self, open_call: Callable[[Iterator[Any]], Any], failure: Callable[[grpc.RpcError], Exception],
                 failed: Callable[[grpc.StatusCode, str], Exception]) -> None:
        self._failure = failure
        self._failed = failed
        self._ids = itertools.count(1)
        self._lock = threading.Lock()  # guards _running and _ended
        self._running: dict[str, Generation] = {}
        self._ended: Exception | None = None
        self._unsent: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = open_call(iter(self._unsent.get, None))
        self._reader = threading.Thread(target=self._read, name="session", daemon=True)
        self._reader.start()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def start(self, prompt: str | Sequence[int], **asked: Unpack[Asked]) -> Generation:
        """Begins to go on with `prompt`; arguments as of `Client.generate`.

        Raises:
          UserError: an argument does not fit its field, or the session has ended.
        """
        request = generate_request(prompt, asked)
        made = Generation(str(next(self._ids)), self._cancel)
        with self._lock:
            if self._ended is not None:
                raise self._ended
            self._running[made.id] = made
        self._unsent.put(messages.SessionRequest(id=made.id, start=request))
        return made

    def close(self) -> None:
        """Ends the session, and what still runs in it."""
        self._unsent.put(None)
        self._call.cancel()
        self._reader.join()

    def _cancel(self, name: str) -> None:
        self._unsent.put(messages.SessionRequest(id=name, cancel=messages.Cancel()))

    def _read(self) -> None:
        ended: Exception = UserError("the session has ended")
        try:
            for response in self._call:
                self._hear(response)
        except grpc.RpcError as error:
            ended = self._failure(error)
        with self._lock:
            self._ended = ended
            left, self._running = self._running, {}
        for one in left.values():
            one.put(ended)

    def _hear(self, response: Any) -> None:
        kind = response.WhichOneof("kind")
        with self._lock:
            one = self._running.get(response.id) if kind == "response" else self._running.pop(response.id, None)
        if one is None:
            return
        if kind == "response":
            one.put(chunk(response.response))
        elif kind == "failure":
            code = _CODES.get(response.failure.code, grpc.StatusCode.UNKNOWN)
            one.put(self._failed(code, response.failure.message))
        else:
            one.put(None)
