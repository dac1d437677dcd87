"""Around every request: its id, a line in the log, no body that never ends, and an answer even to our own faults.

Whoever admits a request counts it and writes its audit line; for what nobody has admitted, that is done here.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import logs
from serving.access.identity import sane_request_id
from serving.calls import Calls
from serving.http import unrouted
from serving.http.errors import UNROUTED, error_response

log = logging.getLogger(__name__)

BODY_TIMEOUT_S = 60.0  # between two pieces of a request's body
QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds: not a line each


class Outermost:
    """ASGI middleware; puts `request_id` into the request's state and the log's context.

    Args:
      app: what it stands around.
      calls: the pipeline, for the audit lines of requests that never reach it.
    """

    def __init__(self, app: ASGIApp, calls: Calls) -> None:
        self._app = app
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        request_id = sane_request_id(Headers(scope=scope).get("x-request-id"))
        # FastAPI's limits on bodies count them as they come; of this header they would answer in plain text.
        scope = {**scope, "headers": [one for one in scope["headers"] if one[0] != b"content-length"]}
        scope.setdefault("state", {})["request_id"] = request_id
        token = logs.request_id.set(request_id)
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.accept", "websocket.http.response.start"):
                status = message.get("status", 101)
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif message["type"] == "websocket.close" and not status:  # there is no WebSocket at this path
                scope["state"][UNROUTED] = 404
            await send(message)

        try:
            await self._app(scope, _hurried(receive) if scope["type"] == "http" else receive, send_with_id)
        except ClientDisconnect:
            pass
        except Exception as error:  # noqa: BLE001 - answered and logged, and the server goes on
            response = error_response(error)
            if not status and scope["type"] == "http":
                await response(scope, receive, send_with_id)
        finally:
            unrouted.write_down(self._calls, scope, time.monotonic() - began)
            level = logging.DEBUG if scope["path"] in QUIET else logging.INFO
            log.log(level, "%s %s %d %.3f s", scope.get("method", "WEBSOCKET"), _printable(scope["path"]), status,
                    time.monotonic() - began)
            logs.request_id.reset(token)


def _hurried(receive: Receive) -> Receive:
    """A body must go on coming; after it, the wait for the client's leave may last."""
    complete = False

    async def receive_in_time() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):  # `wait_for` of Python 3.11 may lose a cancellation
                message = await receive()
        except TimeoutError:
            # Of FastAPI's own kind: what else is raised here becomes a fault in the JSON.
            raise HTTPException(408, f"no more of the request's body came for {BODY_TIMEOUT_S:g} s") from None
        complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return receive_in_time


def _printable(path: str) -> str:
    """A path that can't begin a second line, or a long one."""
    return path[:200].encode("ascii", errors="backslashreplace").decode() if path.isprintable() else repr(path[:200])
