"""Signals while a model is loaded and compiled, when the interpreter may be busy elsewhere for seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def signals_end_the_process(status: int = 0, first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While inside, SIGTERM and SIGINT end the process at once, without a word.

    Python runs its own handlers between two bytecodes of the main thread, so one would wait until XLA has compiled; and
    the kernel ignores SIGTERM altogether where the process is the first of a container and has no handler. Here the
    signal's number is written to a pipe at once and another thread acts on it. An event loop that is started inside and
    handles the signals itself takes over without a gap. Main thread only.

    Args:
      status: the process's exit status. Nothing was being served, so nothing is left undone: 0.
      first: called before that, on another thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        while number := os.read(reader, 1):
            if number[0] in SIGNALS:
                try:
                    first()
                finally:
                    os._exit(status)
        os.close(reader)

    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=wait, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
