"""Health and reflection come from gRPC's own packages, which take every request's bytes for granted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from serving import messages

_OURS = tuple(f"/{name}/" for name in (messages.ORCHESTRATOR, messages.INFERENCE))
_NOT_A_REQUEST = object()


class BytesChecked(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT where their methods would end with UNKNOWN and a traceback on the server's stderr."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The method's handler, wrapped unless it is one of ours, which check for themselves."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(_OURS):
            return handler
        codec = {"request_deserializer": _parser(handler.request_deserializer),
                 "response_serializer": handler.response_serializer}
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_one(handler.unary_unary), **codec)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_one(handler.unary_stream), **codec)
        return grpc.stream_stream_rpc_method_handler(_many(handler.stream_stream), **codec)


def _parser(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def checked(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return _NOT_A_REQUEST

    return checked


async def _check(request: Any, context: Any) -> None:
    if request is _NOT_A_REQUEST:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT,
                            "the request's bytes are not the message this method takes")


def _one(method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def checked(request: Any, context: Any) -> Any:
        await _check(request, context)
        return await method(request, context)

    return checked


def _many(method: Callable[[AsyncIterator[Any], Any], AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def checked(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async def good() -> AsyncIterator[Any]:
            async for request in requests:
                await _check(request, context)
                yield request

        async for response in method(good(), context):
            yield response

    return checked
