"""The seed of a run, and the table that a whole run leaves in docs/families.md."""

from __future__ import annotations

import os
import secrets

import pytest

from tests.parity import report

os.environ["PARITY_SEED"] = os.environ.get("PARITY_SEED") or str(secrets.randbelow(1_000_000))  # workers inherit it
SEED = int(os.environ["PARITY_SEED"])


@pytest.fixture(scope="session")
def seed() -> int:
    return SEED


@pytest.fixture
def keep(record_property):
    """keep(family, result): what the test measured, for the table."""
    return lambda family, result: record_property("parity", (family, vars(result)))


def pytest_terminal_summary(terminalreporter, exitstatus):
    found: dict[str, report.Result] = {}
    for test in terminalreporter.stats.get("passed", []):
        for name, value in test.user_properties:
            if name == "parity":
                found.setdefault(value[0], report.Result()).add(report.Result(**value[1]))
    terminalreporter.write_line(f"parity: seed {SEED} (PARITY_SEED={SEED} repeats this run)")
    whole = set(report.TITLES) <= set(found) and "PARITY_DRAWS" not in os.environ  # the page names no other command
    if exitstatus == 0 and whole:
        report.write(found, SEED)
        terminalreporter.write_line(f"parity: wrote {report.DOCS}")
