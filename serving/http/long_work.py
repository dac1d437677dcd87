"""Work that takes long and is not urgent: it has a few threads of its own, and no client has more than one of them."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from serving.admission import Admission
from serving.errors import RETRY_S, Reason, Rejected

THREADS = 2
MAX_WAITING = 64  # pieces of work of one client, the one that runs included
Result = TypeVar("Result")


class LongWork:
    """A place for long work, apart from the threads that requests for text need; lives in one event loop.

    Of one client one piece runs at a time, so that whoever sends many leaves a thread to the others.
    """

    def __init__(self) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "long-work")
        self._turns: dict[str, asyncio.Lock] = {}
        self._count: Counter[str] = Counter()

    async def run(self, admission: Admission, work: Callable[[], Result]) -> Result:
        """What `work` returns, when its turn has come.

        Args:
          admission: whose it is.
          work: run in a thread.

        Raises:
          Rejected: QUEUE_FULL; so many of the same client wait already.
        """
        client = _client(admission)
        if self._count[client] >= MAX_WAITING:
            raise Rejected(Reason.QUEUE_FULL, f"{MAX_WAITING} long requests of this client are waiting already; try "
                           "again later", retry_after_s=RETRY_S)
        self._count[client] += 1
        try:
            async with self._turns.setdefault(client, asyncio.Lock()):
                running = asyncio.get_running_loop().run_in_executor(self._threads, work)
                await _ended(running)
                return running.result()
        finally:
            self._count[client] -= 1
            if not self._count[client]:
                del self._count[client], self._turns[client]

    def close(self) -> None:
        """Ends the threads; what waits is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)


async def _ended(running: asyncio.Future[Any]) -> None:
    """Waits to the end also for who is cancelled meanwhile: a thread can't be stopped, and its place is not free."""
    try:
        await asyncio.wait((running,))
    except asyncio.CancelledError:
        await asyncio.wait((running,))
        if not running.cancelled():
            running.exception()  # nobody asks for it any more
        raise


def _client(admission: Admission) -> str:
    identity = admission.identity
    return f"key {identity.key_id}" if identity and identity.key_id else f"peer {admission.caller.peer}"
