"""What outlives the server's process: a folder with a SQLite database, and files beside it.

Several servers of one machine may share the folder. Each holds a lock file of its own with flock(2), which the kernel
lets go however the process ends: so what a server had taken on and did not finish is known at once, without leases.
(SQLite's locks, too, are for one machine: the folder must not lie on a network file system.)
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from llm_jax.errors import UserError

try:
    import fcntl
except ImportError:  # no flock here: the folder is for one server at a time
    fcntl = None  # type: ignore[assignment]

BUSY_S = 10.0  # longest wait for another server's transaction; ours take milliseconds


class State:
    """One server's hold on the folder.

    Attributes:
      path: the folder.
      instance: who this server is, among those that share the folder.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        """Makes the folder if there is none, readable by its owner alone.

        Raises:
          UserError: it can't be written to.
        """
        self.path = pathlib.Path(directory).expanduser()  # as of quotas and audit lines, which lie there too
        self.instance = secrets.token_hex(8)
        self._instances = self.path / "instances"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._instances.mkdir(mode=0o700, exist_ok=True)
            self._lock = open(self._lock_file(self.instance), "w")
        except OSError as error:
            raise UserError(f"can't keep state in {str(directory)!r}: {error.strerror or error}") from None
        if fcntl is not None:
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def is_alive(self, instance: str) -> bool:
        """Whether the server of that id still runs."""
        if instance == self.instance:
            return True
        if fcntl is None:
            return False
        path = self._lock_file(instance)
        try:
            with open(path) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)  # nobody takes that id again
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    def forget_the_dead(self) -> None:
        """Removes the lock files of servers that were killed."""
        for path in self._instances.glob("*.lock"):
            self.is_alive(path.stem)

    def close(self) -> None:
        """Lets go: what this server had taken on is anybody's."""
        self._lock_file(self.instance).unlink(missing_ok=True)
        self._lock.close()

    def _lock_file(self, instance: str) -> pathlib.Path:
        return self._instances / f"{instance}.lock"


class Database:
    """A SQLite database, for any thread of any server that shares its file.

    Args:
      path: the file; made if there is none.
      schema: statements that make its tables.
      version: of the schema; a file of another one is refused.
    """

    def __init__(self, path: str | os.PathLike, schema: Sequence[str], version: int) -> None:
        self._lock = threading.RLock()
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # what is in it is its owner's alone
            self._connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            # With a log written ahead readers and the writer don't wait for one another. What was committed survives
            # the process at once, and a loss of power from the next checkpoint on: older, never torn.
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            with self.transaction() as database:
                found = database.execute("PRAGMA user_version").fetchone()[0]
                if not found:
                    for statement in schema:
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version = {version}")
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"can't open the database {str(path)!r}: {error}") from None
        if found not in (0, version):
            self.close()
            raise UserError(f"the database {str(path)!r} is of version {found}, this server's of version {version}")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of what is done inside, or nothing of it."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # some errors have rolled it back already
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> Sequence[sqlite3.Row]:
        """What a SELECT finds."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def close(self) -> None:
        """Nothing can be done with it afterwards."""
        with self._lock:
            self._connection.close()
