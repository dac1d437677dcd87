"""Between gRPC and the calls: who is calling, by the metadata; how a method ends, as gRPC says it."""

from __future__ import annotations

import functools
import re
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from serving import messages
from serving.access.identity import Caller, sane_request_id
from serving.access.tls import grpc_certificate
from serving.calls import Calls
from serving.errors import Reason, Rejected, as_rejected, invalid

MAX_DETAILS_BYTES = 1500  # of a status message: clients drop a call whose trailers exceed 8 KiB
REQUEST_ID = "x-request-id"
_NOT_THE_MESSAGE = "the request's bytes are not the message this method takes"
_ADDRESS = re.compile(r"ipv[46]:(.*):\d+")


def parser(calls: Calls, message: Any) -> Callable[[bytes], Any]:
    """A deserializer that gives what `method` answers with INVALID_ARGUMENT for bytes that are no such message."""
    parse = messages.parser(message)

    def parse_or_reject(data: bytes) -> Any:
        if len(data) > calls.max_message_bytes:
            return invalid(f"the request has {len(data)} bytes, more than any prompt that fits: at most "
                           f"{calls.front.max_prompt_tokens} tokens", "prompt")
        request = parse(data)
        return invalid(_NOT_THE_MESSAGE) if request is None else request

    return parse_or_reject


def caller_of(context: Any, method_name: str, tenant: str = "") -> Caller:
    """Who calls, as far as the connection and the metadata tell.

    Args:
      context: gRPC's.
      method_name: the method's full name.
      tenant: that the request names.
    """
    sent: dict[str, Any] = {}
    for name, value in context.invocation_metadata() or ():
        sent.setdefault(name, value)
    peer = urllib.parse.unquote(context.peer() or "")
    address = _ADDRESS.fullmatch(peer)
    return Caller(
        interface="grpc", method=method_name, request_id=sane_request_id(sent.get(REQUEST_ID)),
        credential=_credential(sent), certificate=grpc_certificate(context),
        peer=address[1].strip("[]") if address else peer, tenant=tenant, traceparent=sent.get("traceparent", ""))


def _credential(sent: dict[str, Any]) -> str | None:
    scheme, _, key = sent.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return sent.get("x-api-key", "").strip() or None


def method(action: str, *, counted: bool = True) -> Callable[[Callable[..., Awaitable]], Callable[..., Awaitable]]:
    """Makes `handler(self, request, context, admission)` a method of a service, which has `full_name` and `_calls`.

    The request is admitted before anything of it is looked at; the answer begins with the id of the request, and
    ends with the status of whatever was raised. Anything unforeseen is INTERNAL for this one call.

    Args:
      action: what the method does, one of `access.identity.ACTIONS`.
      counted: see `Calls.admitted`.
    """

    def decorate(handler: Callable[..., Awaitable]) -> Callable[..., Awaitable]:
        @functools.wraps(handler)
        async def answered(self: Any, request: Any, context: Any) -> Any:
            caller = caller_of(context, f"/{self.full_name}/{handler.__name__}", getattr(request, "tenant", ""))
            try:
                await context.send_initial_metadata(((REQUEST_ID, caller.request_id),))
                async with self._calls.admitted(caller, action, counted=counted) as admission:
                    if isinstance(request, Rejected):
                        raise request
                    return await handler(self, request, context, admission)
            except Rejected as error:
                rejected = error
            except grpc.aio.BaseError:  # the call is over already (a write after the client left)
                raise
            await _abort(context, rejected)

        return answered

    return decorate


def open_method(handler: Callable[..., Awaitable]) -> Callable[..., Awaitable]:
    """The same for `handler(self, request, context)` of a method that anybody may call, such as a probe: it is neither
    counted nor written down."""

    @functools.wraps(handler)
    async def answered(self: Any, request: Any, context: Any) -> Any:
        if not isinstance(request, Rejected):
            try:
                return await handler(self, request, context)
            except Exception as error:
                request = as_rejected(error)
        await _abort(context, request)

    return answered


async def _abort(context: Any, rejected: Rejected) -> None:
    trailing: tuple[tuple[str, str], ...] = ()
    if rejected.retry_after_s is not None:  # gRPC's own word for it, which clients that retry obey
        trailing = (("grpc-retry-pushback-ms", str(round(1000 * rejected.retry_after_s))),)
    await context.abort(rejected.reason.value.grpc, shortened(rejected.message), trailing)


def shortened(message: str) -> str:
    """A status message that fits: a value that it quotes may be of any length."""
    data = message.encode("utf-8", errors="replace")
    return message if len(data) <= MAX_DETAILS_BYTES else data[:MAX_DETAILS_BYTES].decode(errors="ignore") + "…"


def status_code(reason: Reason) -> int:
    """The number of the reason's gRPC status."""
    return reason.value.grpc.value[0]
