"""Clients that go away: they cancel in order, or their connection is lost (RST) in the middle of either direction.

Each shows a good key: it is admitted, and has to be let go of.
"""

from __future__ import annotations

import asyncio
import contextlib
import json

import grpc

from benchmarks.soak_traffic.asker import (
    GONE,
    LEFT,
    LONG,
    STALL_S,
    Asker,
    Wrong,
    body,
    chat_body,
    request,
    reset,
    user,
)
from serving import messages

FORM = "multipart/form-data; boundary=x"
FORM_HEAD = (b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
             b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n')


async def cancelled_http(ask: Asker) -> None:
    await _left(ask, "/v1/completions", body(ask.pick()[0], LONG))


async def cancelled_chat(ask: Asker) -> None:
    await _left(ask, "/v1/chat/completions", chat_body([user(ask.pick_chat()[0])], LONG))


async def cancelled_response(ask: Asker) -> None:
    """A response that is made in the background, and cancelled there."""
    made = await ask.post("/v1/responses", {"model": "model", "input": ask.pick_chat()[0], "max_output_tokens": LONG,
                                            "ignore_eos": True, "background": True}, LEFT)
    await asyncio.sleep(0.3 * ask.random.random())
    path, client = f"/v1/responses/{made['id']}", ask.doors.client
    ended = ask.good(await client.post(f"{path}/cancel"))
    if ended["status"] not in ("cancelled", "incomplete"):  # the latter if it was at max_output_tokens already
        raise Wrong(f"a response was cancelled and is {ended['status']}")
    ask.good(await client.delete(path))


async def cancelled_grpc(ask: Asker) -> None:
    call = ask.generate(request(ask.pick()[0], LONG))
    for _ in range(ask.random.randrange(6)):
        await call.read()
    call.cancel()


async def cancelled_session(ask: Asker) -> None:
    """One request is cancelled and must say so; the other ends with the call."""
    call = ask.session(LEFT)
    for name in "ab":
        await call.write(messages.SessionRequest(id=name, start=request(ask.pick()[0], LONG)))
    await call.write(messages.SessionRequest(id="a", cancel=messages.Cancel()))
    while (response := await call.read()).WhichOneof("kind") == "response":
        pass
    if response.id != "a" or response.failure.code != grpc.StatusCode.CANCELLED.value[0]:
        raise Wrong(f"instead of a cancelled request: {response}")
    call.cancel()


async def cancelled_websocket(ask: Asker) -> None:
    async with ask.websocket() as socket:
        for name in ("a", "b"):
            await socket.send(json.dumps({"type": "start", "id": name, **body(ask.pick()[0], LONG)}))
        await socket.recv()
        await socket.send('{"type": "cancel", "id": "a"}')  # and b ends with the connection
        await socket.recv()


async def dropped_in_body(ask: Asker) -> None:
    """In the middle of its request, which the server has begun to read: it has said so."""
    await _half_sent(ask, ask.head("/v1/completions", 5000, expect=True), b'{"model": "model", "prompt": "')


async def dropped_in_upload(ask: Asker) -> None:
    head = ask.head("/v1/files", 4 << 20, FORM, expect=True, request_id=ask.new_id(GONE))
    await _half_sent(ask, head, FORM_HEAD + ask.random.randbytes(1 << 20))


async def dropped_in_stream(ask: Asker) -> None:
    """In the middle of its answer."""
    sent = json.dumps(body(ask.pick()[0], LONG, stream=True)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", ask.doors.http_port)
    try:
        writer.write(ask.head("/v1/completions", len(sent), request_id=ask.new_id(LEFT)) + sent)
        async with asyncio.timeout(STALL_S):
            await reader.readuntil(b"data: ")
    finally:
        reset(writer.get_extra_info("socket"))
        writer.transport.abort()


async def dropped_websocket(ask: Asker) -> None:
    socket = await ask.websocket(additional_headers={
        "authorization": f"Bearer {ask.doors.key}", "x-request-id": ask.new_id()})
    try:
        for name in ("a", "b"):
            await socket.send(json.dumps({"type": "start", "id": name, **body(ask.pick()[0], LONG)}))
        async with asyncio.timeout(STALL_S):
            await socket.recv()
    finally:
        reset(socket.transport.get_extra_info("socket"))
        socket.transport.abort()


async def dropped_grpc(ask: Asker) -> None:
    """The connection of a call that runs is closed under it."""
    channel = ask.own_channel()
    try:
        await ask.generate(request(ask.pick()[0], LONG), LEFT, channel).read()
    finally:
        await channel.close()


async def _left(ask: Asker, path: str, sent: dict) -> None:
    async with contextlib.aclosing(ask.events(path, sent, LEFT)) as events:
        count = ask.random.randrange(1, 6)
        async for _ in events:
            count -= 1
            if count == 0:
                return


async def _half_sent(ask: Asker, head: bytes, half: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", ask.doors.http_port)
    try:
        writer.write(head)
        async with asyncio.timeout(STALL_S):
            told = await reader.readuntil(b"\r\n")
            if not told.startswith(b"HTTP/1.1 100 "):  # which is said when the body is asked for: the key was good
                raise Wrong(f"a request with a good key was answered with {told!r} before its body")
            writer.write(half)
            await writer.drain()
    finally:
        reset(writer.get_extra_info("socket"))
        writer.transport.abort()


CANCELLED = (cancelled_http, cancelled_chat, cancelled_response, cancelled_grpc, cancelled_session, cancelled_websocket)
DROPPED = (dropped_in_body, dropped_in_upload, dropped_in_stream, dropped_websocket, dropped_grpc)
TALKING = (cancelled_chat, cancelled_response)
