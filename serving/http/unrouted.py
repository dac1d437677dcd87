"""Requests that end before a handler has them: no such path, no such method. They are counted and written down, too."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.types import Scope

from serving.access.audit import AuditEntry
from serving.access.identity import Identity
from serving.calls import Calls
from serving.errors import Rejected
from serving.http.deps import caller
from serving.http.errors import UNROUTED

CODES = {404: "not_found", 405: "method_not_allowed"}
UNKNOWN = "unknown"  # what metrics call all of them: nobody can make series of them


def write_down(calls: Calls, scope: Scope, seconds: float) -> None:
    """The audit line and the count of a request that ended as `UNROUTED` says; nothing for others, who have theirs.

    Nobody is refused for want of a key here, since there is nothing to be had: a good key is named, and no path that
    a client made up is written.
    """
    code = CODES.get(scope["state"].get(UNROUTED, 0))
    if code is None:
        return
    who = caller(HTTPConnection(scope))
    if calls.metrics is not None:
        calls.metrics.started(who.interface, UNKNOWN)
        calls.metrics.finished(who.interface, UNKNOWN, code, seconds)
    if calls.guard is None:
        return
    found: Identity | None = None
    try:
        found = calls.guard.identify(who.credential, who.certificate, who.page)
    except Rejected as error:
        found = getattr(error, "identity", None)  # of an expired key
    calls.guard.audit(AuditEntry(
        who.request_id, who.interface, who.method, code, seconds, found.key_id if found else "",
        found.tenant if found else "", found.role if found else "", who.peer))
