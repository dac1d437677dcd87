"""Tokens used, by tenant and by key, in UTC days and months; kept in SQLite, so that a restart gives nobody more."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import datetime
import logging
import os
import pathlib
import sqlite3
import threading
import time
from collections.abc import Sequence

from llm_jax.errors import UserError
from serving.state import Database

log = logging.getLogger(__name__)

FILE = "usage.sqlite3"
_KEEP_DAYS = 70
_FRESH_S = 1.0  # for which a count that was read is taken to be still the same
_MAX_SEEN = 10_000  # counts kept in memory beside the database
_LENGTHS = {"day": len("2026-01-31"), "month": len("2026-01")}
_SCHEMA = ("CREATE TABLE used (owner TEXT, name TEXT, period TEXT, tokens INTEGER NOT NULL, "
           "PRIMARY KEY (owner, name, period)) WITHOUT ROWID",)

_Count = tuple[str, str, str]  # owner, its name, the day or month


@dataclasses.dataclass(frozen=True)
class Quota:
    """So many tokens in a period.

    Attributes:
      owner: "tenant" or "key".
      name: the tenant's name or the key's id.
      period: "day" or "month".
      tokens: at most.
    """

    owner: str
    name: str
    period: str
    tokens: int

    def ends(self, now: datetime.datetime) -> datetime.datetime:
        """When it is renewed."""
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        if self.period == "day":
            return midnight + datetime.timedelta(days=1)
        return (midnight.replace(day=1) + datetime.timedelta(days=32)).replace(day=1)


@dataclasses.dataclass(frozen=True)
class Shortage:
    """A quota of which too little is left: tokens used, and those set aside for requests that run."""

    quota: Quota
    used: int
    reserved: int


class Quotas:
    """What was used, and what running requests may still use. Safe for several threads.

    A charge counts at once and is written by a thread of its own: a disk that is slow delays nobody's tokens, and one
    that refuses gives nobody more.

    Args:
      state_dir: where `FILE` lies, also for several servers of one machine; None keeps the counts in memory.

    Raises:
      UserError: the file can't be opened.
    """

    def __init__(self, state_dir: str | os.PathLike | None = None) -> None:
        self._lock = threading.Lock()
        self._reserved: collections.Counter[tuple[str, str]] = collections.Counter()
        self._seen: dict[_Count, tuple[float, int]] = {}  # when it was read, and what it was
        self._unwritten: collections.Counter[_Count] = collections.Counter()  # not in what was seen
        self._writing = False
        self._writer: concurrent.futures.ThreadPoolExecutor | None = None
        if state_dir is None:
            return
        path = str(pathlib.Path(state_dir).expanduser() / FILE)
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise UserError(f"can't keep quotas in {path!r}: {error.strerror or error}") from None
        self._written = Database(path, _SCHEMA, version=1)
        self._read = Database(path, _SCHEMA, version=1)  # in the log written ahead, no reader waits for the writer
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "quotas")

    def short(self, quotas: Sequence[Quota], tokens: int, now: datetime.datetime) -> Shortage | None:
        """Which of the quotas has not so many tokens left; None if all have."""
        with self._lock:
            return self._short(quotas, tokens, now)

    def reserve(self, quotas: Sequence[Quota], tokens: int, now: datetime.datetime) -> Shortage | None:
        """Sets tokens aside for a request, all or none: two that run at once can't both have the last ones.

        Returns:
          None, or what is short.
        """
        with self._lock:
            short = self._short(quotas, tokens, now)
            if short is None:
                for owner in _owners(quotas):
                    self._reserved[owner] += tokens
            return short

    def release(self, quotas: Sequence[Quota], tokens: int) -> None:
        """Gives back what `reserve` set aside."""
        with self._lock:
            for owner in _owners(quotas):
                self._reserved[owner] -= tokens
                if self._reserved[owner] <= 0:
                    del self._reserved[owner]

    def charge(self, owners: dict[str, str], tokens: int, now: datetime.datetime) -> None:
        """Counts tokens as used, by each of `owners`: names by "tenant" and "key"."""
        with self._lock:
            for owner, name in owners.items():
                for period in _LENGTHS:
                    self._unwritten[owner, name, _named(period, now)] += tokens
            if self._writer is None:
                self._forget_in_memory(now)
            elif not self._writing:
                self._writing = True
                self._writer.submit(self._write)

    def forget_old(self, now: datetime.datetime) -> None:
        """Drops counts of periods that are long over."""
        oldest = _named("month", now - datetime.timedelta(days=_KEEP_DAYS))
        if self._writer is not None:
            try:
                with self._written.transaction() as database:
                    database.execute("DELETE FROM used WHERE period < ?", (oldest,))
            except sqlite3.Error as error:
                log.error("old counts of used tokens can't be dropped: %s", error)

    def close(self) -> None:
        """Writes what is left, and closes the file; what is charged afterwards is not kept."""
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is not None:
            writer.submit(self._write)
            writer.shutdown()
            self._written.close()
            self._read.close()

    def _short(self, quotas: Sequence[Quota], tokens: int, now: datetime.datetime) -> Shortage | None:
        for quota in quotas:
            used, reserved = self._used(quota, now), self._reserved[quota.owner, quota.name]
            if used + reserved + tokens > quota.tokens:
                return Shortage(quota, used, reserved)
        return None

    def _used(self, quota: Quota, now: datetime.datetime) -> int:
        count = quota.owner, quota.name, _named(quota.period, now)
        read_at, seen = self._seen.get(count, (-_FRESH_S, 0))
        if self._writer is not None and time.monotonic() - read_at >= _FRESH_S:  # another server may have added to it
            if len(self._seen) > _MAX_SEEN:
                self._seen.clear()
            try:
                found = self._read.rows("SELECT tokens FROM used WHERE owner = ? AND name = ? AND period = ?", *count)
                seen = found[0]["tokens"] if found else 0
            except sqlite3.Error as error:
                log.error("used tokens can't be read: %s", error)
            self._seen[count] = time.monotonic(), seen
        return seen + self._unwritten[count]

    def _forget_in_memory(self, now: datetime.datetime) -> None:
        if len(self._unwritten) > _MAX_SEEN:
            current = {_named(period, now) for period in _LENGTHS}
            for count in [count for count in self._unwritten if count[2] not in current]:
                del self._unwritten[count]

    def _write(self) -> None:
        """Writes charges until there are none; what the disk refuses is written with the next."""
        while True:
            with self._lock:
                charges = dict(self._unwritten)
                if not charges:
                    self._writing = False
                    return
            try:
                with self._written.transaction() as database:
                    totals = {count: database.execute(
                        "INSERT INTO used VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET tokens = tokens + "
                        "excluded.tokens RETURNING tokens", (*count, tokens)).fetchone()[0]
                        for count, tokens in charges.items()}
            except sqlite3.Error as error:
                log.error("used tokens can't be written down: %s", error)
                with self._lock:
                    self._writing = False
                return
            with self._lock:
                self._unwritten -= collections.Counter(charges)
                self._seen |= {count: (time.monotonic(), total) for count, total in totals.items()}


def _named(period: str, now: datetime.datetime) -> str:
    return now.isoformat()[:_LENGTHS[period]]


def _owners(quotas: Sequence[Quota]) -> set[tuple[str, str]]:
    return {(quota.owner, quota.name) for quota in quotas}
