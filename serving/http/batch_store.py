"""Batches and their lines in the server's state: what is asked for, what is answered, and by whom.

    validating ─▶ in_progress ─▶ finalizing ─▶ completed | expired
        └▶ failed      └▶ cancelling ─▶ cancelled

A line may be computed more than once (the server died in between), but its answer is stored once, and the files that
callers fetch are written from the stored answers in one go.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serving.errors import Reason, Rejected, invalid
from serving.http import tables
from serving.http.batch_input import Checked, Line
from serving.http.file_store import FileStore, StoredFile, new_id, not_found

MAX_UNFINISHED = 100  # batches of one tenant
PAGE = 500  # lines read at a time
REMEMBERED_S = 90 * 86_400  # a batch that has ended
# What a line says that was never answered.
UNANSWERED = {"expired": ("batch_expired", "This request could not be executed before the completion window expired."),
              "cancelled": ("batch_cancelled", "This request was not executed before the batch was cancelled.")}


@dataclasses.dataclass(frozen=True)
class Batch:
    """A row of `tables.SCHEMA`, as far as anybody outside needs it; times in seconds since 1970."""

    id: str
    tenant: str
    key_id: str
    endpoint: str
    completion_window: str
    input_file_id: str
    metadata: str | None
    output_kept_s: int
    status: str
    outcome: str | None
    model: str | None
    errors: str | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    total: int
    completed: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, row: sqlite3.Row) -> Batch:
        """From its row."""
        return cls(**{field.name: row[field.name] for field in dataclasses.fields(cls)})


class BatchStore:
    """The batches in a server's state, beside the files of `files`.

    Every call may wait for a disk: not for an event loop's own thread.
    """

    def __init__(self, files: FileStore) -> None:
        self.files = files
        self._database = files.database
        self._instance = files.state.instance

    def add(self, tenant: str, key_id: str, *, endpoint: str, input_file_id: str, window: str, window_s: int,
            metadata: Mapping[str, str] | None, output_kept_s: int) -> Batch:
        """A new batch, to be looked through and run as the requests of the key `key_id`.

        Raises:
          Rejected: there is no such file to read, or the tenant has too many batches under way.
        """
        batch_id, now = new_id("batch_"), int(self.files.clock())
        with self._database.transaction() as database:
            try:
                stored = self.files.get(tenant, input_file_id)
            except Rejected as error:
                raise Rejected(error.reason, error.message, field="input_file_id") from None
            if stored.purpose != "batch":
                raise invalid(f"the file {input_file_id!r} was uploaded for {stored.purpose!r}, not for 'batch'",
                              "input_file_id")
            count = database.execute(f"SELECT count(*) FROM batches WHERE tenant = ? AND status IN {tables.UNFINISHED}",
                                     (tenant,)).fetchone()[0]
            if count >= MAX_UNFINISHED:
                raise Rejected(Reason.RATE_LIMITED, f"{count} batches are under way, as many as may be: wait for one "
                               "to end, or cancel one")
            database.execute(
                "INSERT INTO batches (id, tenant, key_id, endpoint, completion_window, input_file_id, metadata, "
                "output_kept_s, status, created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'validating', ?, ?)",
                (batch_id, tenant, key_id, endpoint, window, input_file_id,
                 None if metadata is None else json.dumps(dict(metadata)), output_kept_s, now, now + window_s))
        return self.get(tenant, batch_id)

    def get(self, tenant: str, batch_id: str) -> Batch:
        """One of the tenant's batches.

        Raises:
          Rejected: there is none of that id.
        """
        rows = self._database.rows("SELECT * FROM batches WHERE id = ? AND tenant = ?", batch_id, tenant)
        if not rows:
            raise not_found("batch", batch_id)
        return Batch.of(rows[0])

    def page(self, tenant: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """The tenant's batches, the newest first, from behind `after`; and whether there are more.

        Raises:
          Rejected: there is no batch `after`.
        """
        query, values = "SELECT * FROM batches WHERE tenant = ?", [tenant]
        if after is not None:
            found = self._database.rows("SELECT seq FROM batches WHERE id = ? AND tenant = ?", after, tenant)
            if not found:
                raise invalid(f"there is no batch {after!r:.80} to go on after", "after")
            query, values = query + " AND seq < ?", [tenant, found[0]["seq"]]
        rows = self._database.rows(query + " ORDER BY seq DESC LIMIT ?", *values, limit + 1)
        return [Batch.of(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, tenant: str, batch_id: str) -> Batch:
        """Asks whoever works on the batch to stop.

        Raises:
          Rejected: there is none of that id, or it has ended.
        """
        with self._database.transaction() as database:
            batch = self.get(tenant, batch_id)
            if batch.status in ("validating", "in_progress"):
                database.execute("UPDATE batches SET status = 'cancelling', cancelling_at = ? WHERE id = ?",
                                 (int(self.files.clock()), batch_id))
            elif batch.status != "cancelling":
                raise Rejected(Reason.CONFLICT, f"a batch that is {batch.status} can't be cancelled")
        return self.get(tenant, batch_id)

    # What follows is for the server that works on a batch.

    def claim(self, most: int) -> list[Batch]:
        """Takes on up to `most` batches that nobody alive works on; gives them, and those it has already.

        The oldest of each tenant come first, then the second of each: many batches of one delay no other tenant's.
        """
        with self._database.transaction() as database:
            rows = database.execute(
                f"SELECT * FROM batches WHERE status IN {tables.UNFINISHED} "
                "ORDER BY row_number() OVER (PARTITION BY tenant ORDER BY seq), seq").fetchall()
            dead = {name for name in {row["owner"] for row in rows if row["owner"]}
                    if name != self._instance and not self.files.state.is_alive(name)}
            free = [row for row in rows if row["owner"] is None or row["owner"] in dead | {self._instance}][:most]
            database.executemany("UPDATE batches SET owner = ? WHERE id = ?",
                                 [(self._instance, row["id"]) for row in free])
        return [Batch.of(row) for row in free]

    def release(self) -> None:
        """Leaves what this server works on to others, or to its next start."""
        with self._database.transaction() as database:
            database.execute("UPDATE batches SET owner = NULL WHERE owner = ?", (self._instance,))

    def status(self, batch_id: str) -> str:
        """How a batch stands."""
        return self._database.rows("SELECT status FROM batches WHERE id = ?", batch_id)[0]["status"]

    def begin(self, batch: Batch, checked: Checked) -> None:
        """What was found in the input file: lines to answer, or why none will be."""
        now = int(self.files.clock())
        with self._database.transaction() as database:
            if checked.errors:
                database.execute(
                    "UPDATE batches SET status = 'failed', failed_at = ?, errors = ?, owner = NULL WHERE id = ? AND "
                    "status = 'validating'", (now, json.dumps(checked.errors), batch.id))
                return
            database.executemany(
                "INSERT INTO lines (batch, number, custom_id, start, size) VALUES (?, ?, ?, ?, ?)",
                [(batch.id, line.number, line.custom_id, line.start, line.size) for line in checked.lines])
            # A batch that is being cancelled by now has lines all the same: each is told so in the error file.
            database.execute("UPDATE batches SET total = ?, model = ?, in_progress_at = ? WHERE id = ?",
                             (len(checked.lines), checked.model, now, batch.id))
            database.execute("UPDATE batches SET status = 'in_progress' WHERE id = ? AND status = 'validating'",
                             (batch.id,))

    def to_do(self, batch_id: str, after: int) -> list[Line]:
        """Some lines without an answer behind number `after`, in order; empty if there are none."""
        return [Line(**row) for row in self._database.rows(
            "SELECT number, custom_id, start, size FROM lines WHERE batch = ? AND number > ? AND answer IS NULL "
            "ORDER BY number LIMIT ?", batch_id, after, PAGE)]

    def record(self, batch_id: str, number: int, answer: str, failed: bool, tokens: Sequence[int] = (0, 0, 0)) -> bool:
        """Stores the answer of a line; False if it has one, or the batch has been stopped or taken over by another.

        Args:
          answer: the line of the output file, or, if `failed`, of the error file.
          tokens: of the prompt, of those the cached ones, and of the completion.
        """
        with self._database.transaction() as database:
            stored = database.execute(
                "UPDATE lines SET answer = ?, failed = ? WHERE batch = ? AND number = ? AND answer IS NULL AND EXISTS "
                "(SELECT 1 FROM batches WHERE id = ? AND status = 'in_progress' AND owner = ?)",
                (answer, failed, batch_id, number, batch_id, self._instance)).rowcount
            if stored:
                database.execute(
                    "UPDATE batches SET completed = completed + ?, failed = failed + ?, "
                    "prompt_tokens = prompt_tokens + ?, cached_tokens = cached_tokens + ?, "
                    "completion_tokens = completion_tokens + ? WHERE id = ?",
                    (not failed, failed, *tokens, batch_id))
        return bool(stored)

    def finish(self, batch_id: str, outcome: str) -> None:
        """Ends a batch: no more answers are taken, its files are written, and then it is what `outcome` says.

        Nothing happens if another server has taken the batch over.

        Args:
          outcome: "completed", "expired" or "cancelled"; if one was decided on before, by a server that died while it
            wrote, that one counts. A batch that is being cancelled is: its last answers may not have been taken.
        """
        now = int(self.files.clock())
        with self._database.transaction() as database:
            # The names are decided before anything is written: who has to write again replaces what is there.
            database.execute(
                "UPDATE batches SET outcome = CASE status WHEN 'cancelling' THEN 'cancelled' ELSE ? END, "
                "output_file_id = ?, error_file_id = ? WHERE id = ? AND owner = ? AND outcome IS NULL",
                (outcome, new_id("file-"), new_id("file-"), batch_id, self._instance))
            database.execute("UPDATE batches SET status = 'finalizing', finalizing_at = ? "
                             "WHERE id = ? AND owner = ? AND status = 'in_progress'", (now, batch_id, self._instance))
        batch = Batch.of(self._database.rows("SELECT * FROM batches WHERE id = ?", batch_id)[0])
        if not batch.outcome:
            return
        parts = {kind: self.files.write(self._answers(batch, kind == "error")) for kind in ("output", "error")}
        try:
            with self._database.transaction() as database:
                owner = database.execute("SELECT owner FROM batches WHERE id = ?", (batch_id,)).fetchone()["owner"]
                if owner == self._instance:
                    self._end(database, batch, parts)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)

    def _end(self, database: sqlite3.Connection, batch: Batch, parts: dict[str, pathlib.Path]) -> None:
        """The last step: its files, if there is anything in them, and its last status."""
        now = int(self.files.clock())
        names = {"output": batch.output_file_id, "error": batch.error_file_id}
        for kind, part in parts.items():
            name, size = names[kind], part.stat().st_size
            if name and size:
                os.replace(part, self.files.path(name))
                self.files.insert(database, StoredFile(name, batch.tenant, f"{batch.id}_{kind}.jsonl", "batch_output",
                                                       size, now, now + batch.output_kept_s))
            else:
                names[kind] = None
        database.execute(
            f"UPDATE batches SET status = outcome, {batch.outcome}_at = ?, owner = NULL, output_file_id = ?, "
            "error_file_id = ? WHERE id = ?", (now, names["output"], names["error"], batch.id))
        database.execute("DELETE FROM lines WHERE batch = ?", (batch.id,))

    def _answers(self, batch: Batch, failed: bool) -> Iterator[str]:
        """The lines of the output file or of the error file, in the order of the requests."""
        after = 0
        while rows := self._database.rows(
                "SELECT number, custom_id, answer, failed FROM lines WHERE batch = ? AND number > ? ORDER BY number "
                "LIMIT ?", batch.id, after, PAGE):
            for row in rows:
                if row["answer"] is None and failed:
                    code, message = UNANSWERED[batch.outcome or ""]
                    yield answer_line(row["custom_id"], error={"code": code, "message": message})
                elif row["answer"] is not None and bool(row["failed"]) == failed:
                    yield row["answer"]
            after = rows[-1]["number"]

    def sweep(self) -> None:
        """Forgets batches that ended long ago, and files past their time."""
        with self._database.transaction() as database:
            database.execute(f"DELETE FROM batches WHERE status NOT IN {tables.UNFINISHED} AND expires_at < ?",
                             (self.files.clock() - REMEMBERED_S,))
        self.files.sweep()
        self.files.state.forget_the_dead()


def answer_line(custom_id: str, *, status: int = 0, request_id: str = "", body: Any = None,
                error: dict[str, Any] | None = None) -> str:
    """A line of an output or error file: a response, or an error of a request that got none."""
    response = None if error else {"status_code": status, "request_id": request_id, "body": body}
    return json.dumps({"id": new_id("batch_req_"), "custom_id": custom_id, "response": response, "error": error},
                      ensure_ascii=False)
