"""What the processes beside process 0 do, where several serve one model together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from serving.loading import SIGNALS


def follow(service: Any, on_event: Callable[[str], None] = print) -> int:
    """Takes part in process 0's steps until that one ends.

    SIGTERM and Ctrl-C are left to process 0: a launcher sends them to all, and what runs there may still finish, for
    which it needs every process.

    Args:
      service: a `JointService` of a process other than 0; closed here in any case.
      on_event: gets a line at the beginning and at the end.

    Returns:
      0 if process 0 ended in order, 1 if it was lost or a step failed.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    on_event("following: process 0 takes the requests")
    try:
        service.join()
    finally:
        failed = service.failure
        service.close()
    on_event(f"stopped: {failed}" if failed else "stopped")
    return 1 if failed else 0
