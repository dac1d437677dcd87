"""What the soak sends: good requests by every door, and the kinds of clients that a server has to live with.

Every action either returns or raises `Wrong`: an answer that is not what it should be, or comes twice, or not at all.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import math
import random
import struct
from collections.abc import Callable

import grpc
import httpx
from websockets.asyncio.client import connect

from serving import messages

STALL_S = 60.0  # in which a request must be answered, whatever else goes on
LENGTHS = (4, 24, 64)  # tokens asked for
MALFORMED = 400, 404, 405, 413, 422


class Wrong(Exception):
    """An answer that should not be."""


@dataclasses.dataclass
class Known:
    """What the model says, asked alone before the traffic: its text by prompt and length, and embeddings by prompt."""

    texts: dict[tuple[str, int], str] = dataclasses.field(default_factory=dict)
    embeddings: dict[str, list[float]] = dataclasses.field(default_factory=dict)


class Traffic:
    """One client's actions, over connections that it shares with the others.

    Args:
      http_port, grpc_port: of the server, on loopback.
      key: sent with every request.
      known: what the answers must be; may be filled by `learn`.
      seed: of its choices.
    """

    def __init__(self, http_port: int, grpc_port: int, key: str, known: Known, client: httpx.AsyncClient,
                 channel: grpc.aio.Channel, seed: int) -> None:
        self._http_port = http_port
        self._key = key
        self._known = known
        self._client = client
        self._random = random.Random(seed)
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._generate = channel.unary_stream(f"/{messages.INFERENCE}/Generate",
                                              request_serializer=lambda m: m if isinstance(m, bytes) else
                                              m.SerializeToString(),
                                              response_deserializer=messages.GenerateResponse.FromString)
        self._decode = channel.unary_stream(f"/{messages.ORCHESTRATOR}/Decode",
                                            request_serializer=messages.DecodeRequest.SerializeToString,
                                            response_deserializer=messages.DecodeResponse.FromString)
        self._embed = channel.unary_unary(f"/{messages.INFERENCE}/Embed",
                                          request_serializer=messages.EmbedRequest.SerializeToString,
                                          response_deserializer=messages.EmbedResponse.FromString)

    def choose(self) -> tuple[str, Callable]:
        """An action and its kind: 20 % are cancelled, 5 % malformed, 2 % oversized, 4 % read slowly, 4 % drop their
        connection in the middle, and the others are good."""
        r = self._random.random()
        for share, kind, actions in (
                (0.20, "cancelled", (self.cancelled_http, self.cancelled_grpc, self.cancelled_websocket)),
                (0.05, "malformed", (self.malformed_http, self.malformed_grpc)),
                (0.02, "oversized", (self.oversized_http, self.oversized_grpc)),
                (0.04, "slow", (self.slow_http, self.slow_grpc)),
                (0.04, "dropped", (self.dropped_half_sent, self.dropped_unread))):
            r -= share
            if r < 0:
                return kind, self._random.choice(actions)
        return "good", self._random.choice((self.http, self.http_stream, self.grpc_generate, self.grpc_decode,
                                            self.websocket, self.embed_http, self.embed_grpc))

    # Good requests

    async def http(self) -> None:
        prompt, length = self._pick()
        answer = await self._post("/v1/completions", self._body(prompt, length))
        self._check(prompt, length, answer["choices"][0]["text"])
        if len(answer["choices"]) != 1 or answer["usage"]["completion_tokens"] != length:
            raise Wrong(f"choices or usage of {answer}")

    async def http_stream(self, pause_s: float = 0.0) -> None:
        prompt, length = self._pick()
        text, finished, done = "", 0, 0
        body = self._body(prompt, length, stream=True)
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise Wrong(f"HTTP {answer.status_code}: {(await answer.aread())[:200]!r}")
            async for line in answer.aiter_lines():
                await asyncio.sleep(pause_s * self._random.random())
                if line == "data: [DONE]":
                    done += 1
                elif line.startswith("data: "):
                    if done:
                        raise Wrong("something follows [DONE]")
                    (choice,) = json.loads(line[6:])["choices"]
                    text += choice["text"]
                    finished += choice["finish_reason"] is not None
        if (finished, done) != (1, 1):
            raise Wrong(f"a stream ended {finished} times, with [DONE] {done} times")
        self._check(prompt, length, text)

    async def grpc_generate(self, pause_s: float = 0.0) -> None:
        prompt, length = self._pick()
        text, finished = "", 0
        async for response in self._generate(_request(prompt, length), metadata=self._metadata, timeout=STALL_S):
            await asyncio.sleep(pause_s * self._random.random())
            text += response.text
            finished += response.finish_reason != 0
        if finished != 1:
            raise Wrong(f"a stream ended {finished} times")
        self._check(prompt, length, text)

    async def grpc_decode(self) -> None:
        prompt, length = self._pick()
        request = messages.DecodeRequest(max_tokens=length)
        request.text_content.text = prompt
        text, count = "", 0
        async for response in self._decode(request, metadata=self._metadata, timeout=STALL_S):
            text += response.stream_content.samples[0].text
            count += len(response.stream_content.samples[0].token_ids)
        # The model may end before the length here, where nobody can ask it to go on, perhaps within a character.
        if count > length or not self._known.texts[prompt, max(LENGTHS)].startswith(text.rstrip("\ufffd")):
            raise Wrong(f"Decode said {text!r} to {prompt!r}")

    async def websocket(self) -> None:
        picked = {str(i): self._pick() for i in range(3)}
        texts, ended = dict.fromkeys(picked, ""), dict.fromkeys(picked, 0)
        async with self._websocket() as socket:
            for name, (prompt, length) in picked.items():
                await socket.send(json.dumps({"type": "start", "id": name, **self._body(prompt, length)}))
            while not all(ended.values()):
                message = json.loads(await asyncio.wait_for(socket.recv(), STALL_S))
                if message["type"] == "delta":
                    texts[message["id"]] += message["text"]
                elif message["type"] == "done":
                    ended[message["id"]] += 1
                else:
                    raise Wrong(f"WebSocket: {message}")
        for name, (prompt, length) in picked.items():
            self._check(prompt, length, texts[name])

    async def embed_http(self) -> None:
        prompt, _ = self._pick()
        answer = await self._post("/v1/embeddings", {"model": "model", "input": prompt, "encoding_format": "base64"})
        self._check_vector(prompt, [x for (x,) in struct.iter_unpack("<f", base64.b64decode(
            answer["data"][0]["embedding"]))])

    async def embed_grpc(self) -> None:
        prompt, _ = self._pick()
        request = messages.EmbedRequest()
        request.inputs.add(text=prompt)
        answer = await self._embed(request, metadata=self._metadata, timeout=STALL_S)
        self._check_vector(prompt, list(answer.embeddings[0].values))

    async def slow_http(self) -> None:
        await self.http_stream(pause_s=0.4)

    async def slow_grpc(self) -> None:
        await self.grpc_generate(pause_s=0.4)

    # Clients that go away

    async def cancelled_http(self) -> None:
        body = self._body(self._pick()[0], 400, stream=True)
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            count = self._random.randrange(6)
            async for _ in answer.aiter_lines():
                count -= 1
                if count < 0:
                    return

    async def cancelled_grpc(self) -> None:
        call = self._generate(_request(self._pick()[0], 400), metadata=self._metadata, timeout=STALL_S)
        for _ in range(self._random.randrange(6)):
            await call.read()
        call.cancel()

    async def cancelled_websocket(self) -> None:
        async with self._websocket() as socket:
            for name in ("a", "b"):
                await socket.send(json.dumps({"type": "start", "id": name, **self._body(self._pick()[0], 400)}))
            await socket.recv()
            await socket.send('{"type": "cancel", "id": "a"}')  # and b ends with the connection
            await socket.recv()

    async def dropped_half_sent(self) -> None:
        await self._raw(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + self._key.encode()
                        + b"\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n{\"model\": ", read=False)

    async def dropped_unread(self) -> None:
        body = json.dumps(self._body(self._pick()[0], 400, stream=True)).encode()
        await self._raw(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + self._key.encode()
                        + b"\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body,
                        read=True)

    # Requests that must be refused

    async def malformed_http(self) -> None:
        content = self._random.choice((
            b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "model"}', b'{"model": "model", "prompt": {}}',
            b'{"model": "model", "prompt": "a", "max_tokens": -1}',
            b'{"model": "model", "prompt": "a", "max_tokns": 1}',
            b'{"model": "model", "prompt": "a", "temperature": "hot"}', b'{"model": "another", "prompt": "a"}',
            b'{"model": "model", "prompt": "a", "n": 100000}', b'{"model": "model", "prompt": [[1], [-5]]}'))
        answer = await self._client.post("/v1/completions", content=content,
                                         headers={"content-type": "application/json"})
        if answer.status_code not in MALFORMED or "message" not in answer.json()["error"]:
            raise Wrong(f"{content!r} was answered with {answer.status_code} {answer.text[:200]}")

    async def malformed_grpc(self) -> None:
        bad = _request(self._pick()[0], 4)
        self._random.choice((
            lambda: setattr(bad.sampling, "max_tokens", -1), lambda: setattr(bad.sampling, "temperature", float("nan")),
            lambda: bad.ClearField("prompt") if "prompt" in bad.DESCRIPTOR.fields_by_name else bad.ClearField("text"),
            lambda: bad.token_ids.ids.extend([2**31 - 1]), lambda: setattr(bad.sampling, "regex", "(")))()
        sent = self._random.choice((bad, self._random.randbytes(30) + b"\xff"))
        await self._refused(sent, grpc.StatusCode.INVALID_ARGUMENT)

    async def oversized_http(self) -> None:
        length = self._random.choice((100_000, 3_000_000))
        answer = await self._client.post("/v1/completions", json=self._body("a b" * length, 4))
        if answer.status_code not in (400, 413):
            raise Wrong(f"a prompt of {3 * length} characters was answered with {answer.status_code}")

    async def oversized_grpc(self) -> None:
        await self._refused(_request("a b" * 200_000, 4), grpc.StatusCode.INVALID_ARGUMENT)

    async def learn(self, prompt: str) -> bool:
        """Notes what the model says to `prompt`, now that nobody else asks; False if two tokens are too near to each
        other somewhere for the answer to be the same in any company."""
        request = _request(prompt, max(LENGTHS))
        request.sampling.top_logprobs = 2
        async for response in self._generate(request, metadata=self._metadata, timeout=STALL_S):
            if any(top.logprobs[0] - top.logprobs[1] < 0.002 for top in response.top_logprobs):
                return False
        for length in LENGTHS:
            body = self._body(prompt, length)
            self._known.texts[prompt, length] = (await self._post("/v1/completions", body))["choices"][0]["text"]
        answer = await self._post("/v1/embeddings", {"model": "model", "input": prompt})
        self._known.embeddings[prompt] = answer["data"][0]["embedding"]
        return True

    def _pick(self) -> tuple[str, int]:
        return self._random.choice(list(self._known.embeddings)), self._random.choice(LENGTHS)

    def _body(self, prompt: str, length: int, **more: object) -> dict:
        return {"model": "model", "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True, **more}

    def _check(self, prompt: str, length: int, text: str) -> None:
        if text != self._known.texts[prompt, length]:
            raise Wrong(f"{text!r} instead of {self._known.texts[prompt, length]!r} to {prompt!r}")

    def _check_vector(self, prompt: str, found: list[float]) -> None:
        known = self._known.embeddings[prompt]  # of length 1, as OpenAI's are; gRPC gives them as the model does
        length = math.hypot(*found)
        if len(found) != len(known) or max(abs(a / length - b) for a, b in zip(found, known, strict=True)) > 1e-3:
            raise Wrong(f"another embedding of {prompt!r}")

    async def _post(self, path: str, body: dict) -> dict:
        answer = await self._client.post(path, json=body)
        if answer.status_code != 200:
            raise Wrong(f"HTTP {answer.status_code}: {answer.text[:200]}")
        return answer.json()

    async def _refused(self, sent: object, code: grpc.StatusCode) -> None:
        try:
            async for _ in self._generate(sent, metadata=self._metadata, timeout=STALL_S):
                pass
        except grpc.aio.AioRpcError as error:
            if error.code() is not code:
                raise Wrong(f"{str(sent)[:100]!r} ended with {error.code()}: {error.details()}") from None
        else:
            raise Wrong(f"{str(sent)[:100]!r} was answered")

    def _websocket(self) -> connect:
        # Without a bound on its queue: with one, closing waits 10 s for what this client has not read.
        return connect(f"ws://127.0.0.1:{self._http_port}/v1/stream", max_queue=None,
                       additional_headers={"authorization": f"Bearer {self._key}"}, open_timeout=STALL_S)

    async def _raw(self, data: bytes, read: bool) -> None:
        """Sends bytes and drops the connection without a word (RST), perhaps after the first bytes of the answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._http_port)
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            if read:
                await asyncio.wait_for(reader.read(200), STALL_S)
        writer.transport.abort()


def _request(prompt: str, length: int) -> messages.GenerateRequest:
    request = messages.GenerateRequest(text=prompt)
    request.sampling.max_tokens = length
    request.sampling.temperature = 0
    request.sampling.ignore_eos = True
    return request
