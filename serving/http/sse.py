"""Server-sent events: an answer that is written while it is made, and ends when its reader goes.

A handler gives back `EventStream(produce)`; `produce` is the whole request, from its admission to its last event:

    async def produce(events):
        async with calls.admitted(caller, "generate") as admission:
            await calls.stream(..., write=lambda news, _: events.send(chunk(news)), admission=admission)

    return EventStream(produce)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.errors import Reason, Rejected
from serving.http.errors import error_body, rejected_of, to_json

KEEP_ALIVE_S = 15.0  # proxies give up on a connection that is silent for 60 s, some for 30 s
DONE = "[DONE]"
_HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"))  # nginx would collect the events otherwise

Result = TypeVar("Result")


def described(what: str) -> dict[int | str, dict[str, Any]]:
    """Of a path that may answer with events: `responses` for its OpenAPI document, with what they are."""
    event = {"type": "object", "description": what, "required": ["data"], "properties": {
        "data": {"type": "string", "description": "JSON, but for `[DONE]`."}, "event": {"type": "string"}}}
    return {200: {"content": {"text/event-stream": {"itemSchema": event}}}}


class Events:
    """The events of one answer. `send` waits while the reader lags: what is made meanwhile is merged behind it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lock = asyncio.Lock()
        self._sent_at = time.monotonic()
        self.began = False

    async def send(self, data: Any, event: str | None = None) -> None:
        """Sends one event.

        Args:
          data: plain values or a pydantic model, sent as JSON; a string is sent as it is, and must have one line.
          event: its type, where the protocol has any.
        """
        name = b"" if event is None else b"event: %s\n" % event.encode()
        await self._write(name + b"data: " + (data.encode() if isinstance(data, str) else to_json(data)) + b"\n\n")

    async def keep_alive(self) -> float:
        """Sends a comment, which clients skip, if nothing was sent for long; returns seconds to the next look."""
        silent_s = time.monotonic() - self._sent_at
        if silent_s < KEEP_ALIVE_S:
            return KEEP_ALIVE_S - silent_s
        if not self._lock.locked():  # else the reader lags, and needs no comments
            await self._write(b": keep-alive\n\n")
        return KEEP_ALIVE_S

    async def end(self) -> None:
        """Sends the end of the body."""
        await self._write(b"", more=False)

    async def _write(self, data: bytes, more: bool = True) -> None:
        async with self._lock:
            if not self.began:
                self.began = True
                await self._send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
            self._sent_at = time.monotonic()


class EventStream(Response):
    """An answer that `produce` writes.

    What `produce` raises before its first event is answered with the error's own status, as if there were no stream;
    later it becomes the last event, and `done` is not sent. After `KEEP_ALIVE_S` without an event the status is 200
    in any case. When the client goes, `produce` is cancelled, and has ended when this has.

    Args:
      produce: makes the events.
      done: the last event of a stream that went well; None: `produce` sends it itself.
      failure: the event that tells of an error: its data, and its type.
    """

    media_type = "text/event-stream"

    def __init__(self, produce: Callable[[Events], Coroutine[Any, Any, None]], *, done: str | None = DONE,
                 failure: Callable[[Rejected], tuple[Any, str | None]] = lambda error: (error_body(error), None)
                 ) -> None:
        super().__init__()
        self._produce = produce
        self._done = done
        self._failure = failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = Events(send)
        work = asyncio.create_task(self._run(events))
        gone = asyncio.create_task(_gone(receive))
        wait_s = KEEP_ALIVE_S
        try:
            while True:
                ended, _ = await asyncio.wait((work, gone), timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                if work in ended:
                    await work
                if ended:
                    break
                wait_s = await events.keep_alive()
        finally:
            await _ended(work, gone)

    async def _run(self, events: Events) -> None:
        try:
            await self._produce(events)
            if self._done is not None:
                await events.send(self._done)
        except Exception as error:
            if not events.began:
                raise
            await events.send(*self._failure(rejected_of(error)))
        await events.end()


async def unless_gone(request: Request, answer: Coroutine[Any, Any, Result]) -> Result:
    """What `answer` returns; it is cancelled if the client goes before that.

    Args:
      request: read to its end.
      answer: the whole request, from its admission on.

    Raises:
      Rejected: the client has gone; nobody reads the status.
    """
    work = asyncio.create_task(answer)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Rejected(Reason.CANCELLED, "the client left before the answer")
        return await work
    finally:
        await _ended(work, gone)


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancels them and waits for their ends; what they raised has been told, or nobody is left to tell."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
