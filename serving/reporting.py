"""A line of statistics now and then, while there is something to say."""

from __future__ import annotations

import contextlib
import select
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def reporting(service: Any, seconds: float, say: Callable[[str], None]) -> Iterator[None]:
    """While inside, `say` gets `Statistics.line` every so often, unless no step has run and nothing waits.

    Args:
      service: what is served.
      seconds: between two lines; 0 is never.
      say: receives the lines, on a thread of its own.
    """
    if not seconds:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_report, args=(service, seconds, say, ended), name="statistics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(1.0)


def _report(service: Any, seconds: float, say: Callable[[str], None], ended: threading.Event) -> None:
    steps = service.stats()["steps"]
    while not ended.wait(seconds):
        now = service.stats()
        is_idle = now["steps"] == steps and not now["running"] and not now["waiting"]
        steps = now["steps"]
        line = service.statistics.line(now)  # also of an idle time: rates are since the last one
        if is_idle or not _takes_more():
            continue
        try:
            say(line)
        except (OSError, ValueError):  # nobody reads standard output any more
            return


def _takes_more() -> bool:
    """Whether a line can be written without waiting: a launcher may have stopped reading after `ready:`."""
    try:
        return bool(select.select([], [sys.stdout], [], 0)[1])
    except (OSError, ValueError):  # not a file, or one that can't be asked
        return True
