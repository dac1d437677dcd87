"""Clients that read slowly, and clients that stall until the buffers between them and the engine are full.

A stalled one asks for much (eight samples with the likeliest tokens beside each) over a connection with a small window,
reads nothing for a while, and then all of it: what was made meanwhile must have been merged, and nothing be missing.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence
from typing import Any

from benchmarks.soak_traffic.asker import LENGTHS, OK, STALL_S, Asker, Wrong, body, request
from benchmarks.soak_traffic.completions import grpc_generate, http_stream
from serving import messages

# Bytes that the kernel keeps for who does not read. With 4 KiB, less than one of the loopback's segments, it was seen
# to drop some (RcvPruned in nstat), which are sent again after ever longer times.
WINDOW = 32 << 10
STALLED_S = 4.0  # in which eight samples are made, if the engine is not waited for
SAMPLES, LIKELIEST = 8, 20
LENGTH = max(LENGTHS)


async def slow_http(ask: Asker) -> None:
    await http_stream(ask, pause_s=0.4)


async def slow_grpc(ask: Asker) -> None:
    await grpc_generate(ask, pause_s=0.4)


async def stalled_http(ask: Asker) -> None:
    prompt = ask.pick()[0]
    sent = json.dumps(_body(ask, prompt, stream=True)).encode()
    # A limit on what is read ahead, too: else asyncio would take what the kernel does not.
    reader, writer = await asyncio.open_connection(sock=await _small(ask), limit=WINDOW)
    try:
        writer.write(ask.head("/v1/completions", len(sent), request_id=ask.new_id(OK)).replace(
            b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + sent)
        await asyncio.sleep(STALLED_S)
        async with asyncio.timeout(STALL_S):
            received = bytearray()
            while piece := await reader.read(1 << 16):
                received += piece
    finally:
        writer.close()
    head, _, rest = bytes(received).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise Wrong(f"a stalled reader was answered with {head[:100]!r}")
    lines = [line for line in _unchunked(rest).decode().split("\n\n") if line]
    if lines[-1] != "data: [DONE]" or lines.count(lines[-1]) != 1:
        raise Wrong(f"a stalled reader's stream ended with {lines[-1][:100]!r}")
    choices = [choice for line in lines[:-1] if line.startswith("data: ") for choice in json.loads(line[6:])["choices"]]
    _check(ask, prompt, [(one["index"], one["text"], len((one["logprobs"] or {"tokens": ()})["tokens"]),
                          one["finish_reason"] is not None) for one in choices])


async def stalled_websocket(ask: Asker) -> None:
    prompt = ask.pick()[0]
    found, done = [], 0
    async with ask.websocket(sock=await _small(ask), max_queue=1, compression=None) as connection:
        await connection.send(json.dumps({"type": "start", "id": "a", **_body(ask, prompt)}))
        await asyncio.sleep(STALLED_S)
        while not done:
            message = json.loads(await asyncio.wait_for(connection.recv(), STALL_S))
            if message["type"] == "delta":
                tokens = (message.get("logprobs") or {"tokens": ()})["tokens"]
                found.append((message["index"], message["text"], len(tokens), False))
            elif message["type"] == "done":
                done += 1
                found += [(one["index"], "", 0, one["finish_reason"] == "length") for one in message["choices"]]
                ask.known.sent[message["request_id"]] = OK
            else:
                raise Wrong(f"WebSocket: {message}")
    _check(ask, prompt, found)


async def stalled_grpc(ask: Asker) -> None:
    prompt = ask.pick()[0]
    channel = _narrow(ask)
    try:
        call, found = ask.generate(_request(ask, prompt), OK, channel), []
        await asyncio.sleep(STALLED_S)
        async for one in call:
            found.append((one.sample, one.text, len(one.token_ids), one.finish_reason != 0))
    finally:
        await channel.close()
    _check(ask, prompt, found)


async def stalled_session(ask: Asker) -> None:
    prompts = {name: ask.pick()[0] for name in "ab"}
    found: dict[str, list[tuple[int, str, int, bool]]] = {name: [] for name in prompts}
    channel, done = _narrow(ask), 0
    try:
        call = ask.session(OK, channel)
        for name, prompt in prompts.items():
            await call.write(messages.SessionRequest(id=name, start=_request(ask, prompt)))
        await call.done_writing()
        await asyncio.sleep(STALLED_S)
        async for one in call:
            if one.WhichOneof("kind") == "response":
                told = one.response
                found[one.id].append((told.sample, told.text, len(told.token_ids), told.finish_reason != 0))
            elif one.WhichOneof("kind") == "done":
                done += 1
            else:
                raise Wrong(f"a stalled session says {one.failure}")
    finally:
        await channel.close()
    if done != len(prompts):
        raise Wrong(f"{done} requests of a stalled session were done")
    for name, prompt in prompts.items():
        _check(ask, prompt, found[name])


def _check(ask: Asker, prompt: str, found: Sequence[tuple[int, str, int, bool]]) -> None:
    """Whether pieces (sample, text, tokens, whether it ends there) are all that was asked for; notes how few came."""
    for sample in range(SAMPLES):
        mine = [piece for piece in found if piece[0] == sample]
        ask.check(prompt, LENGTH, "".join(text for _, text, _, _ in mine))
        if sum(tokens for _, _, tokens, _ in mine) != LENGTH or sum(ended for *_, ended in mine) != 1:
            raise Wrong(f"a stalled reader got the pieces {mine}")
    sizes = [tokens for _, _, tokens, _ in found if tokens]
    merged = ask.known.merged
    merged[:] = merged[0] + sum(sizes), merged[1] + sum(sizes) - len(sizes), max(merged[2], *sizes)


def _body(ask: Asker, prompt: str, **more: object) -> dict[str, Any]:
    # A seed of its own changes nothing here, but keeps the answer from being one that is remembered whole.
    return body(prompt, LENGTH, n=SAMPLES, logprobs=LIKELIEST, seed=ask.random.getrandbits(60), **more)


def _request(ask: Asker, prompt: str) -> Any:
    made = request(prompt, LENGTH)
    made.sampling.num_samples, made.sampling.top_logprobs = SAMPLES, LIKELIEST
    made.sampling.seed = ask.random.getrandbits(60)
    return made


async def _small(ask: Asker) -> socket.socket:
    """A connection for which the kernel takes little that is not read."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", ask.doors.http_port))
    return made


def _narrow(ask: Asker) -> Any:
    # Without the probe that widens windows with what the connection could carry.
    return ask.own_channel(("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", WINDOW))


def _unchunked(data: bytes) -> bytes:
    """A body of HTTP's chunked encoding, as it was."""
    found = bytearray()
    while True:
        size, _, data = data.partition(b"\r\n")
        if not int(size or b"0", 16):
            return bytes(found)
        found += data[:int(size, 16)]
        data = data[int(size, 16) + 2:]


SLOW = (slow_http, slow_grpc)
STALLED = (stalled_http, stalled_websocket, stalled_grpc, stalled_session)
