"""One line for each request: who asked for what kind of thing, how it ended, what it used. Nothing of its content."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import logging
import os
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

    The file may be moved away (logrotate): the next line begins a new one. Several servers may write to one file. A
    disk that is full costs lines, not requests, and is told in the log.

    Args:
      path: None writes nothing, "-" to standard error.

    Raises:
      UserError: it can't be written.
    """

    def __init__(self, path: str | os.PathLike | None) -> None:
        self._path = "" if path is None else os.path.abspath(os.path.expanduser(path)) if path != "-" else "-"
        self._lock = threading.Lock()
        self._descriptor = -1
        self._file = (0, 0)  # device and inode
        self._torn = False
        self._complained_at = -_COMPLAIN_S
        if self._path not in ("", "-"):
            try:
                os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
                self._open()
            except OSError as error:
                raise UserError(f"can't write the audit file {path}: {error.strerror or error}") from None

    def write(self, entry: AuditEntry) -> None:
        """Appends a line."""
        if not self._path:
            return
        data = (entry.line() + "\n").encode("utf-8", "backslashreplace")
        with self._lock:
            try:
                if self._path == "-":
                    os.write(sys.stderr.fileno(), data)
                    return
                self._open_again_if_moved()
                if self._torn:  # the end of a line didn't fit
                    data = b"\n" + data
                self._torn = os.write(self._descriptor, data) < len(data)
                if self._torn:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except (OSError, ValueError) as error:
                self._complain(error)

    def close(self) -> None:
        """Closes the file; what is written afterwards is lost."""
        with self._lock:
            self._path = ""
            self._close()

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

    def _complain(self, error: Exception) -> None:
        if time.monotonic() - self._complained_at >= _COMPLAIN_S:
            self._complained_at = time.monotonic()
            log.error("audit lines are lost: %s: %s", self._path, error)
