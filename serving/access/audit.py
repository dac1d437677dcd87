"""One line for each request: who asked for what kind of thing, how it ended, what it used. Nothing of its content."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import logging
import os
import queue
import sys
import threading
import time
from typing import Any

from llm_jax.errors import UserError
from serving.logs import without_keys

log = logging.getLogger(__name__)

_SENT = ("request_id", "method", "tenant", "peer")  # what a client may have chosen
_MAX_CHARACTERS = 256  # of each
_COMPLAIN_S = 60.0
MAX_WAITING = 100_000  # lines that are not written yet, some 50 MB
CLOSE_S = 10.0


@dataclasses.dataclass(frozen=True)
class AuditEntry:
    """A request that has ended.

    Attributes:
      request_id, interface, method, peer: see `Caller`.
      status: "ok", or the name of the reason in lower case: "unauthenticated", "over_quota", "cancelled" ….
      seconds: from its arrival to its end.
      key_id, tenant, role: see `Identity`; empty if nobody knows who it was.
      prompt_tokens, completion_tokens: that it used, also if it was cut short.
      time: of its end, in seconds since 1970.
    """

    request_id: str
    interface: str
    method: str
    status: str
    seconds: float
    key_id: str = ""
    tenant: str = ""
    role: str = ""
    peer: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    time: float = dataclasses.field(default_factory=time.time)

    def line(self) -> str:
        """The entry as one line of JSON, of bounded length and without anything that looks like a key."""
        said: dict[str, Any] = dict(vars(self))
        for name in _SENT:
            said[name] = without_keys(said[name])[:_MAX_CHARACTERS]
        when = datetime.datetime.fromtimestamp(self.time, datetime.UTC).isoformat(timespec="milliseconds")
        said |= {"tokens": self.prompt_tokens + self.completion_tokens, "seconds": round(self.seconds, 4)}
        return json.dumps({**said, "time": when.replace("+00:00", "Z")}, ensure_ascii=False)


class AuditLog:
    """Writes entries to the end of a file that only its owner may read, whole lines each; safe for several threads.

    A thread of its own writes, in the order in which entries came: a disk that is slow, or a pipe that nobody reads,
    delays no request. What has come is written before the end (`close`). The file may be moved away (logrotate): the
    next line begins a new one. Several servers may write to one file. A disk that is full, or hangs until
    `MAX_WAITING` lines wait, costs lines, not requests, and is told in the log.

    Args:
      path: None writes nothing, "-" to standard error. Its folder must be there: one that was made here for a name
        that was mistyped would have the lines where nobody looks for them.

    Raises:
      UserError: it can't be written, or its folder is not there.
    """

    def __init__(self, path: str | os.PathLike | None) -> None:
        self._path = "" if path is None else os.path.abspath(os.path.expanduser(path)) if path != "-" else "-"
        self._descriptor = -1
        self._file = (0, 0)  # device and inode
        self._torn = False
        self._complained_at = -_COMPLAIN_S
        if self._path not in ("", "-"):
            folder = os.path.dirname(self._path)
            if not os.path.isdir(folder):
                raise UserError(f"can't write the audit file {path}: there is no folder {folder}; make it first")
            try:
                self._open()
            except OSError as error:
                raise UserError(f"can't write the audit file {path}: {error.strerror or error}") from None
        # From here on the file is the thread's own.
        self._waiting: queue.Queue[AuditEntry | threading.Event | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._is_open = bool(self._path)
        if self._is_open:
            self._thread.start()

    def write(self, entry: AuditEntry) -> None:
        """Takes a line; never waits."""
        if self._is_open:
            try:
                self._waiting.put_nowait(entry)
            except queue.Full:
                self._complain(f"{MAX_WAITING} wait to be written")

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Waits until the lines that have come are written; False if that took longer than `timeout_s`."""
        if not self._is_open:
            return True
        written = threading.Event()
        try:
            self._waiting.put(written, timeout=timeout_s)
        except queue.Full:
            return False
        return written.wait(timeout_s)

    def close(self) -> None:
        """Writes what has come, for `CLOSE_S` at most, and closes the file; what comes afterwards is lost."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            self._waiting.put(None, timeout=CLOSE_S)
            self._thread.join(CLOSE_S)
        except queue.Full:
            pass
        if self._thread.is_alive():
            log.error("audit lines are lost: %s: what waited could not be written in %g s", self._path, CLOSE_S)

    def _run(self) -> None:
        while (one := self._waiting.get()) is not None:
            if isinstance(one, threading.Event):
                one.set()
                continue
            try:
                self._append((one.line() + "\n").encode("utf-8", "backslashreplace"))
            except (OSError, ValueError) as error:
                self._complain(error)
        self._close()

    def _append(self, data: bytes) -> None:
        if self._path == "-":
            while data:
                data = data[os.write(sys.stderr.fileno(), data):]
            return
        self._open_again_if_moved()
        if self._torn:  # the end of a line didn't fit
            data = b"\n" + data
        self._torn = os.write(self._descriptor, data) < len(data)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open(self) -> None:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        found = os.fstat(self._descriptor)
        self._file = found.st_dev, found.st_ino
        self._torn = False

    def _open_again_if_moved(self) -> None:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._file or self._descriptor < 0:
            self._close()
            self._open()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _complain(self, error: object) -> None:
        if time.monotonic() - self._complained_at >= _COMPLAIN_S:
            self._complained_at = time.monotonic()
            log.error("audit lines are lost: %s: %s", self._path, error)
