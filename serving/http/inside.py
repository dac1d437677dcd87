"""Requests that the server makes to itself, for callers who are not waiting at its HTTP port.

A line of a batch and a request over a WebSocket take the same way as any other request, from the check of their fields
to the audit line; only who is calling is said in another way.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message

from serving.access.identity import Caller
from serving.http.deps import CALLER


@dataclasses.dataclass
class Answer:
    """What came back.

    Attributes:
      status: of HTTP; 0 until it is known.
      headers: lower-case names.
      body: its bytes, as far as nobody took them while they came.
    """

    status: int = 0
    headers: Headers = dataclasses.field(default_factory=Headers)
    body: bytes = b""


async def post(app: ASGIApp, path: str, body: bytes, caller: Caller,
               on_events: Callable[[bytes], Awaitable[None]] | None = None) -> Answer:
    """Posts JSON to `path` of `app` for `caller`; cancelling this ends the request.

    Args:
      on_events: given the pieces of an answer that is a stream of events, as they come; while it waits, what comes
        next is merged where it is made.
    """
    answer = Answer()
    bodies = [{"type": "http.request", "body": body, "more_body": False}]
    never = asyncio.Event()

    async def receive() -> Message:
        if not bodies:
            await never.wait()  # the client does not leave: whoever asked is cancelled
        return bodies.pop()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], Headers(raw=message.get("headers", []))
        elif message["type"] == "http.response.body":
            if on_events and answer.headers.get("content-type", "").startswith("text/event-stream"):
                await on_events(message.get("body", b""))
            else:
                answer.body += message.get("body", b"")

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"x-request-id", caller.request_id.encode())]
    await app({"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
               "method": "POST", "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
               "root_path": "", "headers": headers, "client": None, "server": None, "state": {}, CALLER: caller},
              receive, send)
    return answer
