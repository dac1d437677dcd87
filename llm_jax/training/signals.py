"""SIGTERM and Ctrl-C as a request that the loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class TrainingStopped(SystemExit):
    """Training saved and stopped because of a signal; the exit status is the shell's, 128 + the signal's number."""

    def __init__(self, signum: int, step: int):
        super().__init__(128 + signum)
        self.signum = signum
        self.step = step


class StopRequest:
    """Within `with StopRequest() as stop`, `stop.signum` is the first SIGTERM or SIGINT received, else None.

    The second one acts as if nothing had been installed: whoever presses Ctrl-C twice doesn't want to wait for a save.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals there only
            self._previous = {signum: signal.signal(signum, self._handle) for signum in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            # A handler that was not set from Python (a distributed runtime's) is given as None and can't be put back.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
