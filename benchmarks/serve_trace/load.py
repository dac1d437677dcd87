"""The load: replays requests against a gRPC server, from a process of its own.

The answers' bytes are only put aside with the time of their arrival, and read when the replay is over, so that the
client takes little from the cores that it shares with the server.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from benchmarks.serve_trace.workers import answer
from serving import messages

METHOD = f"/{messages.INFERENCE}/Generate"


async def _replay(address: str, requests: list[dict[str, Any]]) -> list[list[tuple[float, bytes]]]:
    channel = grpc.aio.insecure_channel(address, options=[
        ("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)])
    async with channel:
        await asyncio.wait_for(channel.channel_ready(), 30)
        call = channel.unary_stream(METHOD)  # bytes in, bytes out
        bodies = [messages.GenerateRequest(
            token_ids=messages.TokenIds(ids=r["tokens"]), priority=r.get("priority", 0),
            sampling=messages.Sampling(max_tokens=r["output"], temperature=0.0, ignore_eos=True)).SerializeToString()
            for r in requests]
        began = time.perf_counter()

        async def one(at: float, body: bytes) -> list[tuple[float, bytes]]:
            await asyncio.sleep(max(at - (time.perf_counter() - began), 0))
            return [(time.perf_counter() - began, data) async for data in call(body)]

        return await asyncio.gather(*(one(r["at"], body) for r, body in zip(requests, bodies, strict=True)))


def replay(address: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sends each request when it is due, and waits for all.

    Args:
      address: of the server.
      requests: with "at" (seconds), "tokens", "output" and, if it is not 0, "priority".
    Returns:
      for each request the fields of `Served`, and "gaps": seconds between its successive messages with tokens.
    Raises:
      RuntimeError: a request did not get the tokens that it asked for.
    """
    served = []
    for request, arrived in zip(requests, asyncio.run(_replay(address, requests)), strict=True):
        counts = [(at, len(messages.GenerateResponse.FromString(data).token_ids)) for at, data in arrived]
        if sum(n for _, n in counts) != request["output"]:
            raise RuntimeError(f"asked for {request['output']} tokens, got {sum(n for _, n in counts)}")
        times = [at for at, n in counts if n]
        served.append({"at": request["at"], "first": times[0], "last": times[-1], "output": request["output"],
                       "gaps": [b - a for a, b in zip(times, times[1:], strict=False)]})
    return served


if __name__ == "__main__":
    answer({"replay": replay})
