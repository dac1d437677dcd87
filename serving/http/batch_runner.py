"""Runs batches behind everything else: a few lines at a time, at the lowest priority, until all are answered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp

from serving.access.identity import Caller
from serving.http import batch_input, inside
from serving.http.batch_input import Line
from serving.http.batch_store import Batch, BatchStore, answer_line, new_id

log = logging.getLogger(__name__)

AT_ONCE = 4  # lines of all batches
MAX_BATCHES = 16  # that one server works on; they take turns
POLL_S = 2.0  # between looks for batches that other servers took in, were cancelled there, or have run out of time
SWEEP_S = 600.0
BUSY = (429, 503)  # too much is asked, or the server goes down: tried again for as long as the batch may take
FAULTS = (500, 504)  # a fault of the server, or no time for it: tried again a few times
MAX_FAULTS = 3
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class BatchRunner:
    """Works on the batches of a store, from `start` to `stop`.

    Args:
      store: where they are.
      app: what answers their requests.
      max_line_bytes: no request has more.
      is_live: whether requests are taken; when not, the batches are left to other servers.
      at_once: lines that run at a time.
    """

    def __init__(self, store: BatchStore, app: ASGIApp, *, max_line_bytes: int,
                 is_live: Callable[[], bool] = lambda: True, at_once: int = AT_ONCE, poll_s: float = POLL_S) -> None:
        self.store = store
        self._app = app
        self._max_line_bytes = max_line_bytes
        self._is_live = is_live
        self._at_once = at_once
        self._poll_s = poll_s
        self._slots = asyncio.Semaphore(at_once)  # first come, first served: batches take turns
        self._batches: dict[str, asyncio.Task[None]] = {}
        self._news = asyncio.Event()
        self._stopped: dict[str, asyncio.Event] = {}
        self._faults: dict[str, tuple[int, float]] = {}  # how often each batch stopped short, and when to go on with it
        self._main: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins, with what was left at the last stop. In a running event loop."""
        self._main = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends; lines under way are dropped, and computed again by whoever takes their batch."""
        tasks = [task for task in (self._main, *self._batches.values()) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self.store.release)

    def wake(self, batch_id: str | None = None) -> None:
        """Something has changed: a new batch, or (by its id) a cancelled one."""
        self._news.set()
        if batch_id in self._stopped:
            self._stopped[batch_id].set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        swept_at = -SWEEP_S
        while True:
            self._news.clear()
            try:
                if loop.time() - swept_at >= SWEEP_S:
                    swept_at = loop.time()
                    await asyncio.to_thread(self.store.sweep)
                if self._is_live():
                    for batch in await asyncio.to_thread(self.store.claim, MAX_BATCHES):
                        if batch.id not in self._batches and loop.time() >= self._faults.get(batch.id, (0, 0.0))[1]:
                            self._begin(batch)
            except Exception:
                log.exception("can't look for batches")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):  # `wait_for` of Python 3.11 may lose a cancellation
                    await self._news.wait()

    def _begin(self, batch: Batch) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            del self._batches[batch.id], self._stopped[batch.id]
            if task.cancelled() or not (error := task.exception()):
                self._faults.pop(batch.id, None)
                return
            # A full disk, for one. It is still ours, and taken up again later: its lines cost the engine time.
            log.error("batch %s stopped short", batch.id, exc_info=error)
            times = self._faults.get(batch.id, (0, 0.0))[0]
            wait_s = min(FIRST_WAIT_S * 2**times, LONGEST_WAIT_S)
            self._faults[batch.id] = times + 1, asyncio.get_running_loop().time() + wait_s

        self._stopped[batch.id] = asyncio.Event()
        self._batches[batch.id] = asyncio.create_task(self._work(batch))
        self._batches[batch.id].add_done_callback(ended)

    async def _work(self, batch: Batch) -> None:
        """Takes a batch from wherever it stands to its end."""
        path = self.store.files.path(batch.input_file_id)
        if batch.in_progress_at is None and batch.outcome is None:
            checked = await asyncio.to_thread(batch_input.check, path, batch.endpoint, self._max_line_bytes)
            await asyncio.to_thread(self.store.begin, batch, checked)
            log.info("batch %s: %d requests, %d errors in its file", batch.id, len(checked.lines), len(checked.errors))
        status = await asyncio.to_thread(self.store.status, batch.id)
        if status == "failed":
            return
        outcome = "cancelled" if status == "cancelling" else "completed"
        if status == "in_progress":
            outcome = await self._answered(batch) if batch.expires_at > self.store.files.clock() else "expired"
        await asyncio.to_thread(self.store.finish, batch.id, outcome)
        log.info("batch %s has ended", batch.id)

    async def _answered(self, batch: Batch) -> str:
        """Answers the lines until all are answered or the batch is stopped; how it ended."""
        answering = asyncio.create_task(self._answer_all(batch))
        stopping = asyncio.create_task(self._until_stopped(batch))
        try:
            await asyncio.wait((answering, stopping), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
                return "completed"
            return stopping.result()
        finally:
            answering.cancel()
            stopping.cancel()
            await asyncio.gather(answering, stopping, return_exceptions=True)

    async def _until_stopped(self, batch: Batch) -> str:
        while True:
            if await asyncio.to_thread(self.store.status, batch.id) == "cancelling":
                return "cancelled"
            left_s = batch.expires_at - self.store.files.clock()
            if left_s <= 0:
                return "expired"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._poll_s, left_s)):
                    await self._stopped[batch.id].wait()
            self._stopped[batch.id].clear()

    async def _answer_all(self, batch: Batch) -> None:
        started = asyncio.Semaphore(self._at_once)  # of this batch: those that wait to be tried again included
        after = 0
        async with asyncio.TaskGroup() as group:
            while lines := await asyncio.to_thread(self.store.to_do, batch.id, after):
                for line in lines:
                    await started.acquire()
                    group.create_task(self._answer(batch, line)).add_done_callback(lambda _: started.release())
                after = lines[-1].number

    async def _answer(self, batch: Batch, line: Line) -> None:
        """Answers one line, however often that takes."""
        request = await asyncio.to_thread(batch_input.read, self.store.files.path(batch.input_file_id), line)
        body = json.dumps(request["body"], ensure_ascii=False).encode(errors="surrogatepass")
        wait_s, faults = FIRST_WAIT_S, 0
        while True:
            async with self._slots:
                request_id = new_id("req-")
                caller = Caller("batch", f"POST {batch.endpoint}", request_id, key_id=batch.key_id, tenant=batch.tenant,
                                peer=batch.id)
                found = await inside.post(self._app, batch.endpoint, body, caller)
            faults += found.status in FAULTS
            if found.status not in BUSY and not (found.status in FAULTS and faults < MAX_FAULTS):
                break
            asked_s = found.headers.get("retry-after", "")
            await asyncio.sleep(min(max(wait_s, float(asked_s) if asked_s.isdigit() else 0.0), LONGEST_WAIT_S))
            wait_s *= 2
        said = json.loads(found.body)
        answer = answer_line(line.custom_id, status=found.status, request_id=request_id, body=said)
        await asyncio.to_thread(self.store.record, batch.id, line.number, answer, found.status != 200, _tokens(said))


def _tokens(answer: dict[str, Any]) -> tuple[int, int, int]:
    """Prompt, cached and completion tokens, in the words of either of OpenAI's interfaces."""
    usage = answer.get("usage") or {}
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return (usage.get("prompt_tokens", usage.get("input_tokens", 0)), details.get("cached_tokens") or 0,
            usage.get("completion_tokens", usage.get("output_tokens", 0)))
