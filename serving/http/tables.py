"""The tables of files and batches."""

from __future__ import annotations

from serving.state import Database, State

VERSION = 1
READING = "('validating', 'in_progress')"  # in these states a batch reads its input file
UNFINISHED = "('validating', 'in_progress', 'finalizing', 'cancelling')"

SCHEMA = (
    """
    CREATE TABLE files (
      seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, filename TEXT NOT NULL,
      purpose TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL)
    """,
    "CREATE INDEX files_of_tenant ON files (tenant, seq)",
    """
    CREATE TABLE batches (
      seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL,
      key_id TEXT NOT NULL,              -- public id of the key it came with; the key itself is not kept
      endpoint TEXT NOT NULL, completion_window TEXT NOT NULL, input_file_id TEXT NOT NULL, metadata TEXT,
      output_kept_s INTEGER NOT NULL,
      status TEXT NOT NULL,              -- as the API names it
      outcome TEXT,                      -- the last status, once it is known and the files are being written
      owner TEXT,                        -- State.instance of the server that works on it
      model TEXT, errors TEXT, output_file_id TEXT, error_file_id TEXT,
      created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, in_progress_at INTEGER, finalizing_at INTEGER,
      completed_at INTEGER, failed_at INTEGER, expired_at INTEGER, cancelling_at INTEGER, cancelled_at INTEGER,
      total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
      prompt_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0,
      completion_tokens INTEGER NOT NULL DEFAULT 0)
    """,
    "CREATE INDEX batches_of_tenant ON batches (tenant, seq)",
    "CREATE INDEX batches_by_status ON batches (status)",
    """
    CREATE TABLE lines (
      batch TEXT NOT NULL, number INTEGER NOT NULL, custom_id TEXT NOT NULL,
      start INTEGER NOT NULL, size INTEGER NOT NULL,  -- where it lies in the input file, in bytes
      answer TEXT, failed INTEGER,                    -- the line of the output or error file; null until it is answered
      PRIMARY KEY (batch, number))
    """,
    "CREATE INDEX lines_to_do ON lines (batch, number) WHERE answer IS NULL",
)


def database(state: State) -> Database:
    """The database of a server's state."""
    return Database(state.path / "batches.sqlite3", SCHEMA, VERSION)
