"""Several requests in one bidirectional call: each runs, ends and fails by itself."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from serving import messages
from serving.access.identity import Caller
from serving.admission import Admission
from serving.calls import Calls
from serving.errors import Reason, Rejected, invalid
from serving.logs import without_keys
from serving.rpc import shortened, status_code

MAX_REQUESTS = 64  # of one session at once
MAX_ID_CHARACTERS = 128

Generate = Callable[[Any, Admission, Callable[[Any], Awaitable[None]]], Awaitable[None]]


class Session:
    """One call of `Inference.Session`.

    Args:
      calls: the pipeline.
      caller: who opened the session; its requests' ids are this one's with their own behind it.
      generate: answers a `GenerateRequest`.
      write: sends a response to the client, and waits while it lags.
    """

    def __init__(self, calls: Calls, caller: Caller, generate: Generate,
                 write: Callable[[Any], Awaitable[None]]) -> None:
        self._calls = calls
        self._caller = caller
        self._generate = generate
        self._write = write
        self._running: dict[str, asyncio.Task[None]] = {}  # by their ids, which are free again when they have ended
        self._tasks: set[asyncio.Task[None]] = set()  # those, and the ones that still say how they ended
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._over = False

    async def run(self, requests: AsyncIterator[Any]) -> None:
        """Until the client has sent its last message and every request has ended; if it leaves, they are cancelled."""
        try:
            async for message in requests:
                if isinstance(message, Rejected):
                    await self._fail("", message)
                elif message.WhichOneof("kind") == "cancel":
                    if task := self._running.get(message.id):
                        task.cancel()
                else:
                    await self._start(message)
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            self._over = True
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _start(self, message: Any) -> None:
        name = message.id
        try:
            if message.WhichOneof("kind") is None:
                raise invalid("the message has neither start nor cancel", "kind")
            if not 1 <= len(name) <= MAX_ID_CHARACTERS:
                raise invalid(f"id must have 1 to {MAX_ID_CHARACTERS} characters, not {len(name)}", "id")
            if name in self._running:
                raise invalid(f"id={name!r} is that of a request that still runs in this session", "id")
        except Rejected as error:
            await self._fail("", error)
            return
        while len(self._tasks) >= 2 * MAX_REQUESTS:  # the client starts more than it reads
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        if len(self._running) >= MAX_REQUESTS:
            await self._fail(name, Rejected(Reason.QUEUE_FULL, f"{MAX_REQUESTS} requests run in this session already; "
                                            "wait for one of them to end"))
            return
        task = self._running[name] = asyncio.create_task(self._one(name, message.start))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.sleep(0)  # it begins, so that whoever cancels it is told

    async def _one(self, name: str, request: Any) -> None:
        """A request from its admission to its last message; its id is free before the client hears of its end."""
        try:
            failure = await self._answered(name, request)
        finally:
            del self._running[name]
        if failure is None:
            await self._send(name, done=messages.Done())
        else:
            await self._fail(name, failure)

    async def _answered(self, name: str, request: Any) -> Rejected | None:
        # The client's own name for it may be anything: it begins no line of the log, and no key gets into one by it.
        told = without_keys(name if name.isprintable() else repr(name))
        caller = dataclasses.replace(self._caller, request_id=f"{self._caller.request_id}/{told}",
                                     tenant=request.tenant)

        async def send(response: Any) -> None:
            await self._send(name, response=response)

        try:
            async with self._calls.admitted(caller, "generate") as admission:
                await self._generate(request, admission, send)
        except asyncio.CancelledError:
            if self._over:
                raise
            return Rejected(Reason.CANCELLED, "the request was cancelled")
        except Rejected as error:
            return error
        return None

    async def _fail(self, name: str, error: Rejected) -> None:
        await self._send(name, failure=messages.Failure(
            code=status_code(error.reason), message=shortened(error.message), field=error.field or "",
            retry_after_seconds=error.retry_after_s))

    async def _send(self, name: str, **kind: Any) -> None:
        # A request that is cancelled must not cut a message in two.
        sending = asyncio.ensure_future(self._written(messages.SessionResponse(id=name, **kind)))
        sending.add_done_callback(lambda task: task.cancelled() or task.exception())  # whoever still waits has it too
        await asyncio.shield(sending)

    async def _written(self, response: Any) -> None:
        async with self._writing:
            if not self._over:
                await self._write(response)
