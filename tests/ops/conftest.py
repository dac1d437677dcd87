"""Here nothing is skipped: `make test-ops` installs what is needed, so what did not run has failed."""

from __future__ import annotations


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped and exitstatus == 0:
        reporter.write_line(f"{len(skipped)} tests were skipped; here that is a failure", red=True)
        session.exitstatus = 1
