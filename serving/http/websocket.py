"""`/v1/stream`: several requests at once over one WebSocket, each of which can be cancelled.

    client  {"type": "auth", "key": "…"}                            first, unless a header or subprotocol has the key
            {"type": "start", "id": "a", "prompt": "从前", …}        or "messages"; and the endpoint's other fields
            {"type": "cancel", "id": "a"}
    server  {"type": "delta", "id": "a", "index": 0, "text": "…"}   and "tool_calls", "logprobs" where there are any
            {"type": "done",  "id": "a", "choices": [{"index": 0, "finish_reason": "stop"}], "usage": {…}, …}
            {"type": "error", "id": "a", "status": 400, "error": {"message", "type", "param", "code"}, …}

Each start is answered by deltas and then one "done" or "error" of its id. What is no start, or has an id that is in
use, is answered by an "error" whose id is null: it ends nothing. A request runs as over HTTP, and is merged for a slow
reader there.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from typing import Any

import pydantic_core
from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

from serving.access.identity import Caller, sane_request_id
from serving.calls import Calls
from serving.errors import Reason, Rejected, as_rejected, invalid
from serving.http import inside
from serving.http.deps import caller
from serving.http.errors import Refused, error_body, missing, no_json

PATH = "/v1/stream"
SUBPROTOCOL = "llm-jax.v1"
KEY_SUBPROTOCOL = "llm-jax.key."  # and the key: browsers can't send other headers
MAX_REQUESTS = 32  # at once on one connection
MAX_ID = 128  # characters
MAX_FAULTS = 100  # messages of a connection that begin and end nothing
MAX_MESSAGE_BYTES = 16 << 20  # uvicorn closes a connection with 1009 at more
AUTH_S = 10.0  # for the first message, where it must have the key
POLICY_VIOLATION, INTERNAL_ERROR = 1008, 1011
ENDPOINTS = {"prompt": "/v1/completions", "messages": "/v1/chat/completions"}
_STATUS = {reason.value.code: reason.value.http for reason in Reason}


def router(calls: Calls) -> APIRouter:
    """The one path."""
    routes = APIRouter()

    @routes.websocket(PATH)
    async def stream(websocket: WebSocket) -> None:
        await _Connection(calls, websocket).run()

    return routes


class _Connection:
    """One WebSocket, from its opening to its end."""

    def __init__(self, calls: Calls, websocket: WebSocket) -> None:
        self._calls = calls
        self._websocket = websocket
        self._sending = asyncio.Lock()
        self._running: dict[str, asyncio.Task[None]] = {}  # until the last message of each is on its way
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serves until the client goes, whose requests are cancelled then."""
        offered = self._websocket.scope.get("subprotocols", [])
        await self._websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        try:
            who = await self._identified(offered)
            async with self._calls.admitted(who, "generate", counted=False):
                await self._serve(who)
        except WebSocketDisconnect:
            pass
        except Rejected as error:
            with contextlib.suppress(WebSocketDisconnect):
                await self._tell_error(None, error)
                await self._websocket.close(POLICY_VIOLATION if error.reason.value.http < 500 else INTERNAL_ERROR)

    async def _identified(self, offered: list[str]) -> Caller:
        """Who calls, with the key from wherever it was sent.

        Raises:
          Rejected: what the connection says can't be.
        """
        who, guard = caller(self._websocket), self._calls.guard
        if guard is None or guard.is_open:
            return who
        if who.credential or who.certificate:
            return who
        for protocol in offered:
            if protocol.startswith(KEY_SUBPROTOCOL):
                return dataclasses.replace(who, credential=protocol.removeprefix(KEY_SUBPROTOCOL))
        with contextlib.suppress(TimeoutError, Rejected):
            message = _read(await asyncio.wait_for(self._websocket.receive(), AUTH_S))
            if message.get("type") == "auth" and isinstance(message.get("key"), str):
                return dataclasses.replace(who, credential=message["key"])
        return who  # without a key: the guard has words for that

    async def _serve(self, who: Caller) -> None:
        faults = 0
        try:
            while faults < MAX_FAULTS:
                try:
                    await self._obey(_read(await self._websocket.receive()), who)
                except Rejected as error:
                    faults += 1
                    await self._tell_error(None, error)
                # Many messages may be here already: what was started begins, and others than this client have a turn.
                await asyncio.sleep(0)
            await self._websocket.close(POLICY_VIOLATION, f"{MAX_FAULTS} messages were none of this protocol's")
        except WebSocketDisconnect:
            pass
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _obey(self, message: dict[str, Any], who: Caller) -> None:
        """Begins or cancels a request.

        Raises:
          Rejected: the message is neither.
        """
        match message.pop("type", None):
            case "start":
                name = _name(message)
                if name in self._running:  # an end of that id would be taken for the other's
                    raise invalid(f"the id {name!r} is that of a request that still runs", "id")
                who = dataclasses.replace(who, request_id=sane_request_id(None))
                try:
                    path, body = self._asked(name, message)
                except Rejected as fault:
                    await self._refuse(name, fault, who)
                    return
                task = self._running[name] = asyncio.create_task(self._answer(name, path, body, who))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case "cancel":
                running = self._running.get(_name(message))
                if running is not None and not running.cancelling():  # else its end has crossed this
                    running.cancel()
            case "auth":
                pass  # nobody asked, or it is known already
            case None:
                raise missing("type", ": 'start' or 'cancel'")
            case other:
                raise invalid(f"type must be 'start' or 'cancel', not {other!r:.80}", "type")

    def _asked(self, name: str, message: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Path and body of the request that a start stands for.

        Raises:
          Rejected: it stands for none, or for one too many.
        """
        del message["id"]
        if len(self._running) >= MAX_REQUESTS:
            raise Rejected(Reason.RATE_LIMITED, f"{name!r} was not started: one connection may have {MAX_REQUESTS} "
                           "requests at once", field="id")
        asked = [field for field in ENDPOINTS if field in message]
        if not asked:
            raise missing("prompt", f": {name!r} was not started; give either 'prompt' or 'messages'")
        if len(asked) > 1:
            raise invalid(f"{name!r} was not started: give either 'prompt' or 'messages'", "prompt")
        for field in ("stream", "stream_options"):
            if field in message:
                raise invalid(f"{name!r} was not started: every answer is a stream; leave {field} out", field)
        return ENDPOINTS[asked[0]], message | {"stream": True, "stream_options": {"include_usage": True}}

    async def _refuse(self, name: str, fault: Rejected, who: Caller) -> None:
        """Ends a request that can't begin: like one over HTTP it counts against its sender's limits and is audited."""
        try:
            async with self._calls.admitted(who, "generate"):
                raise fault
        except Rejected as error:
            await self._tell_error(name, error, {"request_id": who.request_id})

    async def _answer(self, name: str, path: str, body: dict[str, Any], who: Caller) -> None:
        """Runs one request and tells how it ended."""
        told = _Told()

        async def on_events(data: bytes) -> None:
            try:
                for message in told.messages(data):
                    await self._send({"type": "delta", "id": name} | message)
            except WebSocketDisconnect:  # which is no fault of the request: it ends as one that was cancelled
                raise asyncio.CancelledError from None

        last: dict[str, Any]
        try:
            answer = await inside.post(self._websocket.app, path, json.dumps(body, ensure_ascii=False).encode(), who,
                                       on_events)
            if told.complete:
                last = {"type": "done"} | told.end()
            else:  # it was refused, or broke off; the body is not JSON if that was a fault of ours
                error = told.error or (json.loads(answer.body)["error"] if answer.body else
                                       error_body(Rejected(Reason.INTERNAL, "the answer broke off"))["error"])
                last = {"type": "error", "error": error, "status": answer.status if not told.error
                        else _STATUS.get(error["code"], 500)}
        except asyncio.CancelledError:
            if self._websocket.client_state is WebSocketState.DISCONNECTED:
                raise
            last = {"type": "done"} | told.end("cancelled")
        except WebSocketDisconnect:  # whoever reads the messages finds that out too, and cancels the others
            return
        except Exception as error:
            rejected = as_rejected(error)
            last = {"type": "error", "status": rejected.reason.value.http} | error_body(rejected)
        del self._running[name]  # what can't be cancelled any more
        with contextlib.suppress(WebSocketDisconnect):
            await self._send({"type": last.pop("type"), "id": name, "request_id": who.request_id} | last)

    async def _tell_error(self, name: str | None, error: Rejected, more: dict[str, str] | None = None) -> None:
        await self._send({"type": "error", "id": name, "status": error.reason.value.http} | error_body(error)
                         | (more or {}))

    async def _send(self, message: dict[str, Any]) -> None:
        """Waits while the client reads slowly.

        Raises:
          WebSocketDisconnect: it has gone.
        """
        text = json.dumps(message, ensure_ascii=False)
        async with self._sending:
            if WebSocketState.DISCONNECTED in (self._websocket.client_state, self._websocket.application_state):
                raise WebSocketDisconnect
            await self._websocket.send_text(text)


class _Told:
    """What an answer's events say, as this protocol says it.

    Attributes:
      complete: whether the stream came to its end.
      error: with which it ended instead.
    """

    def __init__(self) -> None:
        self.complete = False
        self.error: dict[str, Any] | None = None
        self._rest = b""
        self._reasons: dict[int, str | None] = {0: None}
        self._usage: dict[str, Any] | None = None

    def messages(self, data: bytes) -> list[dict[str, Any]]:
        """Takes in a piece of the stream; what is new in it, by choice."""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        return [message for event in events if event.startswith(b"data: ")
                for message in self._event(event.removeprefix(b"data: "))]

    def _event(self, data: bytes) -> list[dict[str, Any]]:
        if data == b"[DONE]":
            self.complete = True
            return []
        event = pydantic_core.from_json(data)
        if "error" in event:
            self.error = event["error"]
            return []
        self._usage = event.get("usage") or self._usage
        found = []
        for choice in event["choices"]:
            self._reasons[choice["index"]] = choice.get("finish_reason") or self._reasons.get(choice["index"])
            delta = choice.get("delta", {})
            message = {"index": choice["index"], "text": choice.get("text") or delta.get("content") or ""}
            message |= {key: value for key, value in (("tool_calls", delta.get("tool_calls")),
                                                      ("logprobs", choice.get("logprobs"))) if value}
            if message["text"] or len(message) > 2:
                found.append(message)
        return found

    def end(self, reason: str | None = None) -> dict[str, Any]:
        """How each choice ended; `reason` for those that did not by themselves."""
        choices = [{"index": i, "finish_reason": found or reason} for i, found in sorted(self._reasons.items())]
        return {"choices": choices, "usage": self._usage}


def _read(message: Any) -> dict[str, Any]:
    """A message of the client.

    Raises:
      WebSocketDisconnect: it says good-bye.
      Rejected: it is no JSON object.
    """
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1000))
    text = message.get("text")
    if text is None:
        raise Refused(Reason.INVALID, "send text messages: each a JSON object", "invalid_type")
    if len(text) > MAX_MESSAGE_BYTES:
        raise Rejected(Reason.TOO_LARGE, f"the message has more than {MAX_MESSAGE_BYTES} bytes")
    try:
        found = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise no_json("message", error) from None
    if not isinstance(found, dict):
        raise Refused(Reason.INVALID, "the message must be a JSON object", "invalid_type")
    return found


def _name(message: dict[str, Any]) -> str:
    name, wanted = message.get("id"), f"a string of 1 to {MAX_ID} characters"
    if name is None:
        raise missing("id", f": {wanted}")
    if not isinstance(name, str):
        raise Refused(Reason.INVALID, f"id must be {wanted}", "invalid_type", field="id")
    if not 1 <= len(name) <= MAX_ID:
        raise invalid(f"id must be {wanted}", "id")
    return name
