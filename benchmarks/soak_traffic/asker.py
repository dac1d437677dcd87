"""One client of the soak: its connections, what it has asked, and what the answers must be."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import random
import socket
import struct
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import grpc
import httpx
from websockets.asyncio.client import connect

from serving import messages

STALL_S = 60.0  # in which a request must be answered, whatever else goes on
LENGTHS = (4, 24, 64)  # tokens asked for
LONG = 400  # tokens asked for by those who will not stay to the end
NEAR = 0.002  # of two log-probabilities: rounding may turn them round in other company
# Statuses of audit lines: of who stayed, of who left before the end, and of who may have been told all by then.
OK, GONE, LEFT = frozenset(("ok",)), frozenset(("cancelled",)), frozenset(("ok", "cancelled"))


class Wrong(Exception):
    """An answer that should not be."""


@dataclasses.dataclass
class Known:
    """What the model says, asked alone before the traffic, and what must stand in the audit file after it.

    Attributes:
      talks: whether it has a chat template.
      texts: how a prompt goes on, by prompt and length.
      embeddings: by prompt.
      chats: the answer to a message, by message and length.
      follow_ups: the answer to a second message, by the first.
      calls: arguments of the call that a message leads to, and the answer to what the tool gave back, by message.
      sent: ids of requests, and the statuses one of which each must have exactly one audit line with.
      merged: of tokens that came to readers who had stalled: all, those that came behind another in one piece, and the
        most in a piece.
    """

    talks: bool = False
    texts: dict[tuple[str, int], str] = dataclasses.field(default_factory=dict)
    embeddings: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    chats: dict[tuple[str, int], str] = dataclasses.field(default_factory=dict)
    follow_ups: dict[str, str] = dataclasses.field(default_factory=dict)
    calls: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    sent: dict[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    merged: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0])


@dataclasses.dataclass(frozen=True)
class Doors:
    """Where the server is, and the connections that its clients share."""

    http_port: int
    grpc_port: int
    key: str
    client: httpx.AsyncClient
    channel: grpc.aio.Channel


class Asker:
    """One client.

    Args:
      doors: of the server, on loopback.
      known: what the answers must be.
      seed: of its choices.
    """

    _numbers = itertools.count(1)

    def __init__(self, doors: Doors, known: Known, seed: int) -> None:
        self.doors = doors
        self.known = known
        self.random = random.Random(seed)

    def pick(self) -> tuple[str, int]:
        """A prompt whose answer is known, and a length."""
        return self.random.choice(list(self.known.texts))

    def pick_chat(self) -> tuple[str, int]:
        """A message whose answer is known, and a length."""
        return self.random.choice(list(self.known.chats))

    def new_id(self, statuses: frozenset[str] | None = None) -> str:
        """An id for a request, by which it is looked for in the audit file if statuses are given."""
        name = f"soak-{next(self._numbers)}"
        if statuses is not None:
            self.known.sent[name] = statuses
        return name

    # HTTP

    async def post(self, path: str, body: Mapping[str, Any], statuses: frozenset[str] | None = OK) -> Any:
        """The answer to a request that must be answered, and must be found in the audit file."""
        answer = await self.doors.client.post(path, json=body, headers={"x-request-id": self.new_id(statuses)})
        return self.good(answer)

    @staticmethod
    def good(answer: httpx.Response) -> Any:
        """What it holds, if it is one."""
        if answer.status_code != 200:
            raise Wrong(f"HTTP {answer.status_code}: {answer.text[:200]}")
        return answer.json()

    async def events(self, path: str, body: Mapping[str, Any], statuses: frozenset[str] | None = OK
                     ) -> AsyncGenerator[Any, None]:
        """The events of a stream, parsed; "[DONE]" as it is."""
        headers = {"x-request-id": self.new_id(statuses)}
        async with self.doors.client.stream("POST", path, json={**body, "stream": True}, headers=headers) as answer:
            if answer.status_code != 200:
                raise Wrong(f"HTTP {answer.status_code}: {(await answer.aread())[:200]!r}")
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])

    def head(self, path: str, length: int, kind: str = "application/json", *, expect: bool = False,
             request_id: str = "") -> bytes:
        """The head of a request that is sent by hand."""
        more = "expect: 100-continue\r\n" if expect else ""
        return (f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {self.doors.key}\r\n{more}"
                f"content-type: {kind}\r\ncontent-length: {length}\r\nx-request-id: {request_id or self.new_id()}\r\n"
                "\r\n").encode()

    def websocket(self, **more: Any) -> connect:
        """A new connection to /v1/stream."""
        # Without a bound on its queue: with one, closing waits 10 s for what this client has not read.
        return connect(f"ws://127.0.0.1:{self.doors.http_port}/v1/stream", open_timeout=STALL_S, **{
            "max_queue": None, "additional_headers": {"authorization": f"Bearer {self.doors.key}"}, **more})

    # gRPC

    def metadata(self, statuses: frozenset[str] | None = None) -> tuple[tuple[str, str], ...]:
        """Of a call."""
        return ("authorization", f"Bearer {self.doors.key}"), ("x-request-id", self.new_id(statuses))

    def generate(self, request: Any, statuses: frozenset[str] | None = None,
                 channel: grpc.aio.Channel | None = None) -> Any:
        """A call of Inference.Generate, of a message or of bytes."""
        method = (channel or self.doors.channel).unary_stream(
            f"/{messages.INFERENCE}/Generate",
            request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            response_deserializer=messages.GenerateResponse.FromString)
        return method(request, metadata=self.metadata(statuses), timeout=STALL_S)

    def session(self, statuses: frozenset[str] | None = None, channel: grpc.aio.Channel | None = None) -> Any:
        """A call of Inference.Session."""
        method = (channel or self.doors.channel).stream_stream(
            f"/{messages.INFERENCE}/Session", request_serializer=messages.SessionRequest.SerializeToString,
            response_deserializer=messages.SessionResponse.FromString)
        return method(metadata=self.metadata(statuses), timeout=STALL_S)

    def own_channel(self, *options: tuple[str, Any]) -> grpc.aio.Channel:
        """A connection that nobody shares."""
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.doors.grpc_port}", options=(
            ("grpc.use_local_subchannel_pool", 1), *options))

    # What must be true

    def check(self, prompt: str, length: int, text: str) -> None:
        """Whether a prompt went on as it must."""
        self.same(text, self.known.texts[prompt, length], prompt)

    @staticmethod
    def same(found: str, known: str, prompt: str) -> None:
        """Whether two texts are one."""
        if found != known:
            raise Wrong(f"{found!r} instead of {known!r} to {prompt!r}")

    def check_vector(self, prompt: str, found: list[float]) -> None:
        """Whether a prompt's embedding is what it must be, whatever its length."""
        known = self.known.embeddings[prompt]  # of length 1, as OpenAI's are; gRPC gives them as the model does
        length = math.hypot(*found)
        if len(found) != len(known) or max(abs(a / length - b) for a, b in zip(found, known, strict=True)) > 1e-3:
            raise Wrong(f"another embedding of {prompt!r}")


def body(prompt: str, length: int, **more: object) -> dict[str, Any]:
    """A request of /v1/completions that has one answer."""
    return {"model": "model", "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True, **more}


def chat_body(said: list[dict[str, Any]], length: int, **more: object) -> dict[str, Any]:
    """A request of /v1/chat/completions that has one answer."""
    return {"model": "model", "messages": said, "max_completion_tokens": length, "temperature": 0, "ignore_eos": True,
            **more}


def user(text: str) -> dict[str, Any]:
    """A message."""
    return {"role": "user", "content": text}


def request(prompt: str, length: int) -> Any:
    """A request of Inference.Generate that has one answer."""
    made = messages.GenerateRequest(text=prompt)
    made.sampling.max_tokens = length
    made.sampling.temperature = 0
    made.sampling.ignore_eos = True
    return made


def reset(found: socket.socket | None) -> None:
    """Has the connection end without a word (RST) when it is closed."""
    with contextlib.suppress(OSError):
        if found is not None:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
