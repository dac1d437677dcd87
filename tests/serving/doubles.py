"""What the door's tests stand on: a service that needs no model, a server in a thread, and a foreign client's stub."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from llm_jax.inference.generation_config import SamplingDefaults
from llm_jax.inference.request import (
    Delta,
    PromptLogprob,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    Unavailable,
    Usage,
)
from serving.options import ServerOptions
from serving.server import Server

BOS, EOS = 1, 2


class CharacterTokenizer:
    """A token for each code point."""

    vocab_size, bos_id, eos_id, end_ids, adds_bos = 0x110003, BOS, EOS, (EOS,), True
    max_token_bytes, stripped_spaces = 4, 0

    def encode(self, text: str, special: bool = False) -> list[int]:
        return [ord(c) + 3 for c in text]

    def prompt_ids(self, text: str, special: bool = False) -> list[int]:
        return [BOS, *self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return _text(ids)

    def token_bytes(self, token_id: int) -> bytes:
        return _text([token_id]).encode()

    def token_text(self, token_id: int) -> str:
        return _text([token_id]) or f"<{token_id}>"


class FakeService:
    """Behaves like `llm_jax.inference.service.Service`; its "model" repeats the prompt for ever.

    Attributes:
      submitted: (prompt ids, parameters, priority) of every accepted request, in order; of an embedding the parameters
        are its pooling.
      terms: (tenant, deadline in seconds) of each call of `submit_samples`. Of a deadline some has passed by then: see
        `Left`.
      cancelled: ids of requests cancelled while they ran.
      faults: what happens instead of an answer, by the prompt's text: an exception to raise from `submit_samples`, or a
        Delta, or for each sample its deltas.
      hold: `submit_samples` of a request with a constraint waits for it.
    """

    max_context = 10_000
    max_prompt_tokens = 9_999
    max_requests = 64
    tokenizer = CharacterTokenizer()
    defaults = SamplingDefaults()
    weights_version = 0

    def __init__(self, *, step_s: float = 0.001, max_running: int = 64) -> None:
        self.submitted: list[tuple[tuple[int, ...], SamplingParams | str, int]] = []
        self.terms: list[tuple[str, float | None]] = []
        self.cancelled: list[int] = []
        self.faults: dict[str, Exception | Delta | list[list[Delta]]] = {}
        self.hold = threading.Event()
        self.hold.set()
        self.is_live = True
        self.closed = False
        self._step_s = step_s
        self._max_running = max_running
        self._lock = threading.Lock()
        self._running: dict[int, Iterator[Delta]] = {}
        self._listeners: dict[int, Callable[[Delta], None]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return [BOS] * add_bos + self.tokenizer.encode(text)

    def submit_samples(self, prompt_ids: Sequence[int], params: Sequence[SamplingParams],
                       listeners: Sequence[Callable[[Delta], None]], priority: int = 0, *, tenant: str = "",
                       deadline_s: float | None = None) -> list[int]:
        text = _text(prompt_ids)
        fault = self.faults.get(text)
        if isinstance(fault, Exception):
            raise fault
        if params[0].constraint is not None:
            self.hold.wait(5)
        answers = [iter(fault[i]) if isinstance(fault, list) else iter([fault]) if fault
                   else self._answer(text, len(prompt_ids), p) for i, p in enumerate(params)]
        ids = self._start(prompt_ids, list(params), answers, listeners, priority)
        self.terms.append((tenant, deadline_s))
        return ids

    def embed(self, prompt_ids: Sequence[int], pooling: str, listener: Callable[[Delta], None],
              priority: int = 0) -> int:
        fault = self.faults.get(_text(prompt_ids)) or Delta(
            finish_reason="stop", usage=Usage(len(prompt_ids), 0), embedding=np.array(prompt_ids, np.float32))
        return self._start(prompt_ids, [pooling], [iter([fault])], [listener], priority)[0]

    def _start(self, prompt_ids, params, answers, listeners, priority) -> list[int]:
        if len(prompt_ids) > self.max_prompt_tokens:
            raise PromptTooLong(f"the prompt has {len(prompt_ids)} tokens; at most {self.max_prompt_tokens} fit")
        if not self.is_live:
            raise Unavailable("stopped")
        with self._lock:
            if len(self._running) + len(params) > self._max_running:
                raise QueueFull("too many requests are waiting")
            ids = [len(self.submitted) + i for i in range(len(params))]
            self.submitted += [(tuple(prompt_ids), p, priority) for p in params]
            self._running |= dict(zip(ids, answers, strict=True))
            self._listeners |= dict(zip(ids, listeners, strict=True))
        return ids

    def _answer(self, text: str, num_prompt: int, params: SamplingParams) -> Iterator[Delta]:
        """As much as is asked for is told of each token: the likeliest are the tokens 0, 1, 2 …"""
        told = () if params.prompt_logprobs is None else tuple(
            PromptLogprob(i, -0.25 * i, _likeliest(params.prompt_logprobs)) for i in range(1, num_prompt))
        for i in range(params.max_tokens):
            c = text[i % len(text)] if text else "x"
            last = i + 1 == params.max_tokens
            yield Delta(text=c, token_ids=(ord(c) + 3,), logprobs=(-0.5,), finish_reason="length" if last else None,
                        top_logprobs=(_likeliest(params.logprobs),) if params.logprobs else (),
                        prompt_logprobs=() if i else told, usage=Usage(num_prompt, i + 1, 2) if last else None)

    def cancel(self, request_id: int) -> None:
        with self._lock:
            if self._running.pop(request_id, None):
                self.cancelled.append(request_id)

    def stats(self) -> dict:
        return {"running": len(self._running), "waiting": 0, "steps": len(self.submitted)}

    def begin_drain(self) -> None:
        self.is_live = False

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self.closed = True

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                running = list(self._running.items())
            for request_id, answer in running:
                delta = next(answer)
                if delta.finish_reason:
                    with self._lock:
                        self._running.pop(request_id, None)
                self._listeners[request_id](delta)
            time.sleep(self._step_s)


class Left:
    """Equals what is left of a deadline that a client asked for, when the engine hears of it."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and 0.1 * self._deadline_s < other <= self._deadline_s


def _text(prompt_ids: Sequence[int]) -> str:
    return "".join(chr(i - 3) for i in prompt_ids if i > 2)


def _likeliest(count: int) -> tuple[tuple[int, float], ...]:
    return tuple((i, -float(i)) for i in range(count))


class RunningServer:
    """A `Server` in a thread of its own, for clients that block."""

    def __init__(self, service, **options) -> None:
        self.service = service
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.run(self._make(service, options))
        self.address = self.server.address

    async def _make(self, service, options) -> Server:
        # A response cache would answer where a test asks what the engine does.
        options.setdefault("options", ServerOptions(response_cache_entries=0))
        server = Server(service, port=0, **options)
        await server.start()
        return server

    def run(self, coroutine):
        """Runs a coroutine in the server's loop and gives its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    def start_stopping(self, grace_seconds: float):
        """`Server.stop` in the background, as a future."""
        return asyncio.run_coroutine_threadsafe(self.server.stop(grace_seconds), self._loop)

    def end(self) -> None:
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@contextlib.contextmanager
def running_server(service=None, **options) -> Iterator[RunningServer]:
    """A server over `service` (a `FakeService` if none is given), stopped and closed afterwards."""
    service = service or FakeService()
    running = RunningServer(service, **options)
    try:
        yield running
    finally:
        running.run(running.server.stop(0))
        running.end()
        service.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Whether `condition` becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


class ForeignStub:
    """`jetstream_proto.Orchestrator` as another client knows it: described here by hand, in a pool of its own."""

    def __init__(self, channel: grpc.Channel) -> None:
        pool = descriptor_pool.DescriptorPool()
        pool.Add(jetstream_description())

        def message(name: str) -> type:
            return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"jetstream_proto.{name}"))

        self.DecodeRequest = message("DecodeRequest")
        health_request = message("HealthCheckRequest")
        self.Decode = channel.unary_stream(
            "/jetstream_proto.Orchestrator/Decode", self.DecodeRequest.SerializeToString,
            message("DecodeResponse").FromString)
        check = channel.unary_unary(
            "/jetstream_proto.Orchestrator/HealthCheck", health_request.SerializeToString,
            message("HealthCheckResponse").FromString)
        self.is_live = lambda: check(health_request(), timeout=10).is_live

    def text_request(self, text: str, **fields):
        request = self.DecodeRequest(**fields)
        request.text_content.text = text
        return request

    def token_request(self, token_ids: Sequence[int], **fields):
        request = self.DecodeRequest(**fields)
        request.token_content.token_ids.extend(token_ids)
        return request


def jetstream_description() -> descriptor_pb2.FileDescriptorProto:
    """The published field numbers, written down a second time and independently of `serving/protos`."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="foreign.proto", package="jetstream_proto", syntax="proto3")

    def add(message, name: str, number: int, type_: int, *, repeated: bool = False, of: str = "", oneof: bool = False):
        field = message.field.add(name=name, number=number, type=type_,
                                  label=kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL)
        if of:
            field.type_name = f".jetstream_proto.{of}"
        if oneof:
            field.oneof_index = 0

    request = file.message_type.add(name="DecodeRequest")
    request.oneof_decl.add(name="content")
    add(request.nested_type.add(name="TextContent"), "text", 1, kind.TYPE_STRING)
    add(request.nested_type.add(name="TokenContent"), "token_ids", 1, kind.TYPE_INT32, repeated=True)
    add(request, "session_cache", 1, kind.TYPE_STRING)
    add(request, "priority", 3, kind.TYPE_INT32)
    add(request, "max_tokens", 4, kind.TYPE_INT32)
    add(request, "text_content", 5, kind.TYPE_MESSAGE, of="DecodeRequest.TextContent", oneof=True)
    add(request, "token_content", 6, kind.TYPE_MESSAGE, of="DecodeRequest.TokenContent", oneof=True)
    add(request, "num_samples", 8, kind.TYPE_INT32)
    add(request, "lora_adapter_id", 9, kind.TYPE_STRING)
    add(request, "has_bos", 10, kind.TYPE_BOOL)

    response = file.message_type.add(name="DecodeResponse")
    response.oneof_decl.add(name="content")
    response.nested_type.add(name="InitialContent")
    stream = response.nested_type.add(name="StreamContent")
    sample = stream.nested_type.add(name="Sample")
    add(sample, "text", 1, kind.TYPE_STRING)
    add(sample, "token_ids", 2, kind.TYPE_INT32, repeated=True)
    add(stream, "samples", 1, kind.TYPE_MESSAGE, repeated=True, of="DecodeResponse.StreamContent.Sample")
    add(response, "initial_content", 2, kind.TYPE_MESSAGE, of="DecodeResponse.InitialContent", oneof=True)
    add(response, "stream_content", 3, kind.TYPE_MESSAGE, of="DecodeResponse.StreamContent", oneof=True)

    file.message_type.add(name="HealthCheckRequest")
    add(file.message_type.add(name="HealthCheckResponse"), "is_live", 1, kind.TYPE_BOOL)
    return file
