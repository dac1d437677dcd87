"""One trainer a run directory: a second one is refused, and a killed one's successor goes on at once.

`trainer.lock` in the run directory says who trains there. On a disk it is also held with flock(2), which the kernel
lets go of however a process ends, so that whoever gets it on the same machine knows the former holder to be dead. Where
flock reaches no further than one machine, or there is none (a bucket), the file is a lease: its holder renews it every
few seconds, and one that stands still for `STALE_S` is a dead trainer's. Clocks of two machines are never compared: who
wants the lease watches whether it moves.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import psutil
from etils import epath

from llm_jax import storage
from llm_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: the lease alone
    fcntl = None  # type: ignore[assignment]

NAME = "trainer.lock"
RENEW_S, STALE_S = 10.0, 60.0
_SETTLE_S = 1.0  # after which whoever wrote a bucket's lease last is the one who has it
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """Holds a run directory from `with` on; see the module."""

    def __init__(self, run_dir: epath.PathLike, *, renew_s: float = RENEW_S, stale_s: float = STALE_S,
                 say: Callable[[str], None] | None = None):
        """Does nothing yet.

        Args:
          run_dir: there already; local or in a bucket.
          renew_s: seconds between two renewals.
          stale_s: seconds after which a lease of another machine that wasn't renewed is nobody's.
          say: takes a line for the user; stderr by default.
        """
        self.run_dir = storage.located(run_dir)
        self._path = self.run_dir / NAME
        self._renew_s, self._stale_s = renew_s, stale_s
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._me = {"token": uuid.uuid4().hex, **_this_process(), "renewals": 0}
        self._file: int | None = None
        self._taken_by: dict[str, Any] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        """Takes the lock.

        Raises:
          UserError: another trainer has it. Said at once if it runs on this machine; otherwise after its next renewal.
        """
        try:
            if storage.is_local(self._path):
                self._take_file()
            else:
                self._take_lease()
        except OSError as error:
            self._let_go_of_file()
            raise UserError(f"can't lock {self._path}: {error.strerror or error}") from error
        except BaseException:
            self._let_go_of_file()
            raise
        self._thread = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """UserError if another trainer has taken the run, as it may from one that stood still for long."""
        if self._taken_by is not None:
            raise UserError(f"{self.run_dir} was taken over by {_named(self._taken_by)} while this process stood still "
                            "or could not write to it; nothing more was saved here")

    def release(self) -> None:
        """Lets go; at the second call nothing happens."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=self._renew_s)
        try:
            if (self._read() or {}).get("token") == self._me["token"]:
                self._path.unlink(missing_ok=True)
        except OSError:
            pass  # the successor will find out by waiting
        self._let_go_of_file()

    def _take_file(self) -> None:
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                is_held = _flock(self._file)
            except BlockingIOError:
                raise self._refusal(self._read()) from None
            found = self._read()
            is_dead = found is not None and (is_held and found.get("boot") == self._me["boot"]
                                             or _is_dead(found, self._me))
            if found is not None and not is_dead:
                self._wait_until_stale(found)
            try:
                if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                    break
            except FileNotFoundError:
                pass
            self._let_go_of_file()  # its holder let go and removed it in between
        self._write()
        if not is_held:
            self._settle()

    def _take_lease(self) -> None:
        found = self._read()
        if found is not None and not _is_dead(found, self._me):
            self._wait_until_stale(found)
        self._write()
        self._settle()

    def _settle(self) -> None:
        """Of two that wrote the lease at once, the later has it."""
        time.sleep(min(_SETTLE_S, self._renew_s))
        if (now := self._read()) is not None and now.get("token") != self._me["token"]:
            raise self._refusal(now)

    def _wait_until_stale(self, found: dict[str, Any]) -> None:
        """Returns when a lease has not moved for long enough; UserError if it moves."""
        self._say(f"{self.run_dir} was in use by {_named(found)}; waiting up to {self._stale_s:.0f} s to see whether "
                  "it still is")
        until = time.monotonic() + self._stale_s
        while time.monotonic() < until:
            time.sleep(min(1.0, self._renew_s / 4))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise self._refusal(now)

    def _refusal(self, owner: dict[str, Any] | None) -> UserError:
        return UserError(f"{self.run_dir} is in use: {_named(owner)} trains there. Stop that one first, or choose "
                         "another run directory")

    def _renew(self) -> None:
        while not self._closed.wait(self._renew_s):
            try:
                now = self._read()
                if now is not None and now.get("token") != self._me["token"]:
                    self._taken_by = now
                    return
                self._me["renewals"] += 1
                self._write()
            except OSError:
                continue  # a disk or network that comes back; until then the lease ages

    def _read(self) -> dict[str, Any] | None:
        """What the lock file says; None if there is none, or nothing in it that can be read (yet)."""
        try:
            found = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) and "token" in found else None

    def _write(self) -> None:
        content = json.dumps(self._me | {"time": time.strftime("%Y-%m-%d %H:%M:%S%z")}).encode()
        if self._file is None:
            self._path.write_bytes(content)  # an object is replaced whole
        else:
            os.pwrite(self._file, content.ljust(1024), 0)  # always the same length: never a mixture of two

    def _let_go_of_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _flock(file: int) -> bool:
    """Locks a file; whether this file system can. BlockingIOError: somebody else has."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return False
    return True


def _this_process() -> dict[str, Any]:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        pid_space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        boot, pid_space = f"{socket.gethostname()}/{psutil.boot_time():.0f}", 0
    return {"host": socket.gethostname(), "boot": boot, "pid_space": pid_space, "pid": os.getpid(),
            "started": psutil.Process().create_time()}


def _is_dead(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether `owner` surely runs no more; of another machine, or another container, one can't know."""
    if (owner.get("boot"), owner.get("pid_space")) != (me["boot"], me["pid_space"]):
        return False
    try:
        return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > 1
    except (psutil.NoSuchProcess, KeyError, TypeError):
        return True
    except psutil.Error:
        return False


def _named(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} (last seen {owner.get('time')})"
