"""What Orbax and TensorStore say when something fails, and how much of it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator


def end_reads() -> None:
    """Ends what Orbax had begun to read beside what failed; otherwise each says so in a traceback when Python ends."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        # Those that TensorStore is still busy with report to an event loop that is gone, later.
        sys.unraisablehook = lambda failed: None if "Event loop is closed" in str(failed.exc_value) else hook(failed)


def refusal(error: Exception) -> str | None:
    """What the operating system said, or None if the error is not one of its."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else None


def is_not_raised_as_well(record: logging.LogRecord) -> bool:
    """False for the tracebacks that Orbax logs of errors that it also raises."""
    if not record.exc_info:
        return True
    frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(record.exc_info[2]))
    return not any("orbax" in path for path in (record.pathname, *frames))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Orbax's warnings that a directory opened for reading is read only."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
