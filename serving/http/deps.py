"""What every handler needs: which model is served, who is calling, and a router that asks before it reads."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection

from serving.access.browsers import foreign_page
from serving.access.identity import Caller
from serving.access.tls import http_certificate
from serving.calls import Calls
from serving.errors import Reason, Rejected
from serving.http.errors import Refused, rejected_of, too_large

CALLER = "llm_jax.caller"  # in the scope of a request that the server makes itself: the `Caller` it speaks for


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """The served model as clients see it.

    Attributes:
      name: what requests call it.
      created: when its run was made, or the server started; seconds since 1970.
      max_context: longest sequence, prompt and completion, in tokens.
      has_chat_template: whether it can be talked with, beside being given a text to go on with.
      owned_by: whose it is.
      tool_format: how it writes calls of tools; None is found out from its chat template.
    """

    name: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    max_context: int = 0
    has_chat_template: bool = False
    owned_by: str = "llm_jax"
    tool_format: str | None = None

    @staticmethod
    def of(front: Any, name: str, **more: Any) -> ModelInfo:
        """The model behind a `Front`; `more` are other fields."""
        return ModelInfo(name, max_context=front.max_context,
                         has_chat_template=bool(getattr(front.tokenizer, "chat_template", None)), **more)

    def check(self, asked: str | None) -> None:
        """None is this model.

        Raises:
          Rejected: another one is asked for.
        """
        if asked is not None and asked != self.name:
            raise Refused(Reason.NOT_FOUND, f"the model `{asked}` does not exist; this server has `{self.name}`",
                          "model_not_found", field="model")


def caller(connection: HTTPConnection) -> Caller:
    """Who makes a request, or opens a WebSocket, as far as the connection says."""
    scope, headers = connection.scope, connection.headers
    if (made := scope.get(CALLER)) is not None:
        return made
    route, is_websocket = scope.get("route"), scope["type"] == "websocket"
    path = getattr(route, "path", "unknown")  # its template: a client can't make up metrics
    return Caller(
        interface="websocket" if is_websocket else "http", method=path if is_websocket else f"{scope['method']} {path}",
        request_id=request_id(connection), credential=credential(headers), certificate=http_certificate(scope),
        peer=connection.client.host if connection.client else "", tenant=headers.get("x-tenant", ""),
        traceparent=headers.get("traceparent", ""), page=foreign_page(headers))


def credential(headers: Any) -> str | None:
    """The API key in the headers: `Authorization: Bearer` as OpenAI's clients send it, or `x-api-key`."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", "").strip() or None


def request_id(connection: HTTPConnection) -> str:
    """The id that the answer carries as `x-request-id`."""
    return connection.scope["state"]["request_id"]


class JsonRequest(Request):
    """A request whose JSON is read strictly: no lone surrogates, no NaN; and in a third of the time."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = pydantic_core.from_json(await self.body(), allow_inf_nan=False)
            except ValueError as error:
                packed = self.headers.get("content-encoding")
                why = f"it is sent as {packed[:80]!r}, and must not be compressed" if packed else str(error)
                raise json.JSONDecodeError(why, "", 0) from None
        return self._json


def make_router(calls: Calls, action: str, **options: Any) -> APIRouter:
    """A router whose requests all do `action`; its handlers still enter `calls.admitted(caller(request), action)`.

    A request from somebody who may not is refused before its body is read, and one whose body is wrong is admitted
    first: it counts against its sender's limits, and is found in the metrics and the audit log.
    """

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()

            async def asked_first(request: Request) -> Response:
                request = JsonRequest(request.scope, request.receive)
                who = caller(request)
                if not _may(calls, who, action):
                    async with calls.admitted(who, action):  # says why not
                        pass
                try:
                    return await handler(request)
                except RequestValidationError as error:
                    fault = rejected_of(error)
                except HTTPException as error:
                    if (found := _body_fault(request, error)) is None:
                        raise
                    fault = found
                async with calls.admitted(who, action):
                    raise fault

            return asked_first

    return APIRouter(route_class=Route, max_body_size=max_body_bytes(calls), **options)


def _body_fault(request: Request, error: HTTPException) -> Rejected | None:
    """What went wrong while the body was read; None if it was something else."""
    if isinstance(error.__cause__, ClientDisconnect):
        return Rejected(Reason.CANCELLED, "the client left before its request was here")
    if error.status_code == 408:
        return Rejected(Reason.TOO_SLOW, error.detail)
    return too_large(request) if error.status_code == 413 else None


def max_body_bytes(calls: Calls) -> int:
    """Size of a body from which no prompt in it fits; a path that takes more says so itself."""
    return 2 * calls.max_message_bytes  # JSON's escapes double the bytes of Chinese text


def _may(calls: Calls, who: Caller, action: str) -> bool:
    guard = calls.guard
    if guard is None or who.interface == "batch":  # a batch's line shows no key
        return True
    try:
        guard.authorize(guard.identify(who.credential, who.certificate, who.page), action)
    except Rejected:
        return False
    return True
