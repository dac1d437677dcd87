"""Worker processes that end with their parent, however that ends."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from llm_jax.errors import UserError


class Workers:
    """Maps a function over tasks, in worker processes or, with one worker, right here."""

    def __init__(self, pool: concurrent.futures.Executor | None) -> None:
        self._pool = pool

    def map(self, function: Callable, tasks: Iterable, progress: Callable[[Any], None]) -> list:
        """`[function(task) for task in tasks]`; `progress` sees each result, in order.

        Raises:
          UserError: a worker process was killed.
        """
        results = []
        try:
            for result in map(function, tasks) if self._pool is None else self._pool.map(function, tasks):
                progress(result)
                results.append(result)
        except BrokenProcessPool as error:
            raise UserError("a worker process was killed, most likely for lack of memory; set WORKERS lower") from error
        return results


@contextlib.contextmanager
def start(count: int) -> Iterator[Workers]:
    """Starts `count` worker processes; an exception, Ctrl-C included, ends them at once."""
    if count == 1:
        yield Workers(None)
        return
    context = _Context()
    pool = concurrent.futures.ProcessPoolExecutor(count, mp_context=context, initializer=_initialise)
    try:
        yield Workers(pool)
    except BaseException:
        for process in context.started:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Context(multiprocessing.context.SpawnContext):
    """Spawns processes, since forking a process that runs threads is not safe, and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[multiprocessing.context.SpawnProcess] = []

    def Process(self, *args, **kwargs) -> multiprocessing.context.SpawnProcess:  # type: ignore[override]
        process = multiprocessing.context.SpawnProcess(*args, **kwargs)
        self.started.append(process)
        return process


def _initialise() -> None:
    """Leaves Ctrl-C to the parent, and follows it if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
