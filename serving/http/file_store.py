"""Files that callers upload, and those that batches leave for them: contents on disk, the rest in the database."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable
from typing import BinaryIO

from serving.errors import Reason, Rejected, invalid
from serving.http import tables
from serving.state import State

MAX_FILE_BYTES = 200 << 20
MAX_TENANT_BYTES = 10 << 30
MAX_TENANT_FILES = 10_000
KEPT_S = 30 * 86_400  # a file whose owner says nothing
MIN_KEPT_S = 3_600
MAX_FILENAME = 255  # characters
COPY_BYTES = 1 << 20
ABANDONED_S = 3_600  # of a content without a row: left by a server that died, not just being written


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file as its owner knows it; times in seconds since 1970."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int

    @classmethod
    def of(cls, row: sqlite3.Row) -> StoredFile:
        """From its row."""
        return cls(**{field.name: row[field.name] for field in dataclasses.fields(cls)})


def not_found(what: str, name: str) -> Rejected:
    """There is none, or it is another tenant's: nobody learns which."""
    return Rejected(Reason.NOT_FOUND, f"there is no {what} {name!r:.80}")


def too_large(most: int) -> Rejected:
    """A file of more than `most` bytes."""
    return Rejected(Reason.TOO_LARGE, f"the file is too large: at most {most} bytes are taken", field="file")


def new_id(prefix: str) -> str:
    """A name that nobody guesses."""
    return prefix + secrets.token_hex(12)


class FileStore:
    """The files in a server's state.

    Every call may wait for a disk: not for an event loop's own thread.

    Attributes:
      database: where the rows are, those of `BatchStore` too.
    """

    def __init__(self, state: State, *, clock: Callable[[], float] = time.time, max_bytes: int = MAX_FILE_BYTES,
                 max_tenant_bytes: int = MAX_TENANT_BYTES) -> None:
        self.state = state
        self.max_bytes = max_bytes
        self.clock = clock
        self._max_tenant_bytes = max_tenant_bytes
        self._folder = state.path / "files"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self.database = tables.database(state)

    def add(self, tenant: str, filename: str, purpose: str, source: BinaryIO, kept_s: int = KEPT_S) -> StoredFile:
        """Keeps a copy of `source` for `kept_s` seconds.

        Raises:
          Rejected: it is empty or too large, or the tenant has too much already.
        """
        if not filename or len(filename) > MAX_FILENAME:
            raise invalid(f"the file's name must have 1 to {MAX_FILENAME} characters", "file")
        file_id, size = new_id("file-"), 0
        self._check_room(tenant, 1)  # before anything is written; again when the size is known
        path = self.path(file_id)
        try:
            with open(path, "xb") as target:
                while block := source.read(COPY_BYTES):
                    size += len(block)
                    if size > self.max_bytes:
                        raise too_large(self.max_bytes)
                    target.write(block)
                _to_disk(target)
            if not size:
                raise invalid("the file is empty", "file")
            with self.database.transaction() as database:
                self._check_room(tenant, size)
                now = int(self.clock())
                stored = StoredFile(file_id, tenant, filename, purpose, size, now, now + kept_s)
                self.insert(database, stored)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return stored

    def _check_room(self, tenant: str, size: int) -> None:
        count, used = self.database.rows(
            "SELECT count(*), coalesce(sum(bytes), 0) FROM files WHERE tenant = ? AND expires_at > ?", tenant,
            self.clock())[0]
        if count >= MAX_TENANT_FILES:
            raise Rejected(Reason.OVER_QUOTA, f"there are {count} files already, as many as may be kept: delete some")
        if used + size > self._max_tenant_bytes:
            raise Rejected(Reason.OVER_QUOTA, f"the files take {used} bytes already; with this one it would be more "
                           f"than the {self._max_tenant_bytes} that may be kept: delete some")

    @staticmethod
    def insert(database: sqlite3.Connection, stored: StoredFile) -> None:
        """The row of a file whose content is in place; as part of a transaction."""
        database.execute(
            "INSERT INTO files (id, tenant, filename, purpose, bytes, created_at, expires_at) VALUES "
            "(:id, :tenant, :filename, :purpose, :bytes, :created_at, :expires_at)", dataclasses.asdict(stored))

    def write(self, lines: Iterable[str]) -> pathlib.Path:
        """Writes what is to become a file's content; the caller moves it to its `path`, or removes it."""
        part = self.path(new_id("part-"))
        with open(part, "w", encoding="utf-8", newline="\n") as target:
            target.writelines(line + "\n" for line in lines)
            _to_disk(target)
        return part

    def get(self, tenant: str, file_id: str) -> StoredFile:
        """One of the tenant's files.

        Raises:
          Rejected: there is none of that id.
        """
        rows = self.database.rows("SELECT * FROM files WHERE id = ? AND tenant = ? AND expires_at > ?", file_id, tenant,
                                  self.clock())
        if not rows:
            raise not_found("file", file_id)
        return StoredFile.of(rows[0])

    def page(self, tenant: str, *, purpose: str | None, after: str | None, limit: int,
             ascending: bool) -> tuple[list[StoredFile], bool]:
        """The tenant's files in the order of their making, from behind `after`; and whether there are more.

        Raises:
          Rejected: there is no file `after`.
        """
        query, values = "SELECT * FROM files WHERE tenant = ? AND expires_at > ?", [tenant, self.clock()]
        if purpose is not None:
            query, values = query + " AND purpose = ?", [*values, purpose]
        if after is not None:
            found = self.database.rows("SELECT seq FROM files WHERE id = ? AND tenant = ?", after, tenant)
            if not found:
                raise invalid(f"there is no file {after!r:.80} to go on after", "after")
            query, values = query + f" AND seq {'>' if ascending else '<'} ?", [*values, found[0]["seq"]]
        rows = self.database.rows(f"{query} ORDER BY seq {'ASC' if ascending else 'DESC'} LIMIT ?", *values, limit + 1)
        return [StoredFile.of(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, tenant: str, file_id: str) -> None:
        """Forgets one of the tenant's files.

        Raises:
          Rejected: there is none of that id, or a batch still reads it.
        """
        with self.database.transaction() as database:
            self.get(tenant, file_id)
            readers = self.database.rows(
                f"SELECT id FROM batches WHERE input_file_id = ? AND status IN {tables.READING}", file_id)
            if readers:
                raise Rejected(Reason.CONFLICT, f"the batch {readers[0]['id']!r} still reads the file {file_id!r}: "
                               "cancel it first, or wait for its end")
            database.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)

    def path(self, file_id: str) -> pathlib.Path:
        """Where the content of a file lies; `file_id` is one of ours, never what a caller sent."""
        return self._folder / file_id

    def sweep(self) -> None:
        """Deletes what is past its time, and what servers that died left half written."""
        now = self.clock()
        with self.database.transaction() as database:
            gone = [row["id"] for row in database.execute(
                "SELECT id FROM files WHERE expires_at <= ? AND id NOT IN (SELECT input_file_id FROM batches WHERE "
                f"status IN {tables.READING})", (now,))]
            database.executemany("DELETE FROM files WHERE id = ?", [(name,) for name in gone])
        for name in gone:
            self.path(name).unlink(missing_ok=True)
        known = {row["id"] for row in self.database.rows("SELECT id FROM files")}
        for path in self._folder.iterdir():
            try:
                if path.name not in known and time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:  # another server was faster
                pass

    def close(self) -> None:
        """Closes the database; the files stay."""
        self.database.close()


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())
