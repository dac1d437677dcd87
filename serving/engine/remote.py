"""The front of an engine in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.inference.request import Delta, SamplingParams, Unavailable
from serving.engine import wire
from serving.engine.front import Listener

if TYPE_CHECKING:
    from serving.engine.child import EngineProcess
    from serving.engine.process import Facts

MOST_UNSENT = 4 << 20  # bytes, from which new requests wait for the engine to read
GONE = "the engine has ended, and this server with it; try again, here later or elsewhere"
_SEND_S = 5.0  # for the last word to an engine that does not read
_READ = 1 << 16  # at a time: other callbacks come in between

log = logging.getLogger(__name__)


class RemoteFront:
    """A `Front` whose requests go over a socket; all of it happens in the event loop that `start` was awaited in.

    Requests have numbers of this side's own, so that one can be cancelled before the engine has answered.
    """

    def __init__(self, process: EngineProcess, facts: Facts, tokenizer: Tokenizer) -> None:
        """Takes over the process's line and its end; `start` begins to listen."""
        self.tokenizer = tokenizer
        self.defaults = facts.defaults
        self.max_context = facts.max_context
        self.max_prompt_tokens = facts.max_prompt_tokens
        self.max_requests = facts.max_requests
        self.created = facts.created
        self.weights_version = 0  # nothing replaces them in the engine's own process
        self.process = process
        self.failure = ""  # why the engine has ended, unless it was told to
        self._line = process.line
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unpacker = wire.Unpacker()
        self._unsent = bytearray()
        self._flowing = asyncio.Event()  # unless too much is unsent
        self._flowing.set()
        self._ended = asyncio.Event()
        self._numbers = itertools.count()
        self._listeners: dict[int, Listener] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._reason = ""  # as the engine says it
        self._draining = False
        self.closed = False

    @property
    def is_live(self) -> bool:
        return not (self.failure or self._draining or self.closed)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return self.tokenizer.prompt_ids(text) if add_bos else self.tokenizer.encode(text)

    async def start(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._line.setblocking(False)
            self._loop.add_reader(self._line, self._read)

    async def submit_samples(self, prompt_ids: Sequence[int], params: Sequence[SamplingParams],
                             listeners: Sequence[Listener], priority: int = 0, *, tenant: str = "",
                             deadline_s: float | None = None) -> list[int]:
        numbers = [next(self._numbers) for _ in params]
        await self._asked(numbers, listeners, "submit", numbers, prompt_ids, params, priority, tenant, deadline_s)
        return numbers

    async def embed(self, prompt_ids: Sequence[int], pooling: str, listener: Listener, priority: int = 0) -> int:
        number = next(self._numbers)
        await self._asked([number], [listener], "embed", number, prompt_ids, pooling, priority)
        return number

    def cancel(self, request_id: int) -> None:
        if self._listeners.pop(request_id, None) is not None:
            self._send("cancel", [request_id])

    async def stats(self) -> dict[str, Any]:
        number = next(self._numbers)
        return await self._answer(number, "stats", number) | {"pid": self.process.pid}

    def begin_drain(self) -> None:
        if not self._draining:
            self._draining = True
            self._send("drain")

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._hang_up()
        if not self.failure:
            self._line.settimeout(_SEND_S)
            try:
                self._line.shutdown(socket.SHUT_RD)  # or the engine might wait for its last words to be read
                self._line.sendall(self._unsent + wire.pack(("close",)))
            except OSError:
                self.process.kill()
        self.process.end()

    async def lost(self) -> str:
        await self._ended.wait()
        if not self._reason:  # it could not say it
            self._reason = self.failure = await asyncio.to_thread(self.process.how_it_ended)
        return self.failure

    async def _asked(self, numbers: Sequence[int], listeners: Sequence[Listener], *message: Any) -> None:
        """Sends a request and waits until the engine has taken it in."""
        await self._flowing.wait()
        if not self.is_live:
            raise Unavailable(GONE if self.failure else "the server is shutting down and takes no new requests")
        self._listeners |= zip(numbers, listeners, strict=True)
        try:
            await self._answer(numbers[0], *message)
        except asyncio.CancelledError:  # the client left
            for number in numbers:
                self.cancel(number)
            raise
        except BaseException:  # nothing of it is queued
            for number in numbers:
                self._listeners.pop(number, None)
            raise

    async def _answer(self, number: int, *message: Any) -> Any:
        """Sends a message and waits for the answer of that number."""
        if self._loop is None:
            raise RuntimeError("nobody listens to the engine: await start() first")
        if self.failure or self.closed:
            raise Unavailable(GONE)
        answer = self._answers[number] = self._loop.create_future()
        try:
            self._send(*message)
            return await answer
        finally:
            self._answers.pop(number, None)

    def _send(self, *message: Any) -> None:
        if self._loop is None or self.failure or self.closed:
            return
        data = memoryview(wire.pack(message))
        if not self._unsent:
            data = data[self._write(data):]
            if data:
                self._loop.add_writer(self._line, self._write_more)
        self._unsent += data
        if len(self._unsent) > MOST_UNSENT:
            self._flowing.clear()

    def _write(self, data: memoryview | bytearray) -> int:
        """Bytes that could be sent at once."""
        try:
            return self._line.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:  # the engine has ended, and `_read` comes to know that, too
            return len(data)

    def _write_more(self) -> None:
        del self._unsent[:self._write(self._unsent)]
        if not self._unsent:
            assert self._loop is not None
            self._loop.remove_writer(self._line)
            self._flowing.set()

    def _read(self) -> None:
        try:
            data = self._line.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._lose()
        for kind, *values in self._unpacker.feed(data):
            self._hear(kind, values)

    def _hear(self, kind: str, values: list[Any]) -> None:
        if kind == "news":
            for number, sent in values[0].items():
                delta = wire.full(sent)
                listener = self._listeners.get(number)
                if listener is None:
                    continue  # it was cancelled meanwhile
                if delta.finish_reason is not None:
                    del self._listeners[number]
                self._tell(listener, delta)
        elif kind == "lost":
            self._reason = values[0]
            self._lose()
        else:
            answer = self._answers.get(values[0])
            if answer is None or answer.done():
                return
            if kind == "refused":
                answer.set_exception(values[1])
            else:
                answer.set_result(values[1] if len(values) > 1 else None)

    def _lose(self) -> None:
        """The engine is gone: everyone who waits for something of it is told."""
        if self.failure:
            return
        self._hang_up()
        self.failure = self._reason or "the engine's process has ended"
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Unavailable(GONE))
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            self._tell(listener, Delta(finish_reason="cancelled", error=GONE))
        self._flowing.set()
        self._ended.set()

    def _tell(self, listener: Listener, delta: Delta) -> None:
        try:
            listener(delta)
        except Exception:  # noqa: BLE001 - a listener's fault is its request's alone
            log.exception("the listener of a request failed")

    def _hang_up(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._line)
            self._loop.remove_writer(self._line)
