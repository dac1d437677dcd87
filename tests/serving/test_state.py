"""A transaction happens whole or not at all, whatever ends it; where the folder lies."""

from __future__ import annotations

import sqlite3

import pytest

from serving.state import Database, State

SCHEMA = ("CREATE TABLE parent (id INTEGER PRIMARY KEY)",
          "CREATE TABLE child (parent INTEGER REFERENCES parent(id) DEFERRABLE INITIALLY DEFERRED)")


@pytest.fixture
def database(tmp_path):
    made = Database(tmp_path / "state.db", SCHEMA, 1)
    made._connection.execute("PRAGMA foreign_keys = ON")
    yield made
    made.close()


def fails_inside(connection):
    connection.execute("INSERT INTO parent VALUES (1)")
    raise KeyError("中断")


def fails_at_commit(connection):
    connection.execute("INSERT INTO parent VALUES (1)")
    connection.execute("INSERT INTO child VALUES (7)")  # of nobody, which is found out at the end


@pytest.mark.parametrize("fault, error", [(fails_inside, KeyError), (fails_at_commit, sqlite3.IntegrityError)])
def test_what_fails_leaves_nothing(database, fault, error):
    with pytest.raises(error), database.transaction() as connection:
        fault(connection)
    assert not database.rows("SELECT * FROM parent")
    with database.transaction() as connection:  # and the next one can begin
        connection.execute("INSERT INTO parent VALUES (2)")
    assert [row["id"] for row in database.rows("SELECT id FROM parent")] == [2]


def test_the_folder_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    """Where quotas and audit lines of the same --state_dir lie."""
    monkeypatch.setenv("HOME", str(tmp_path))
    state = State("~/state")
    assert state.path == tmp_path / "state" and (tmp_path / "state" / "instances").is_dir()
    state.close()
