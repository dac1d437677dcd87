"""Which role may do what: `policy.csv` under `policy_model.conf`, as casbin reads them; and how urgent it may be."""

from __future__ import annotations

import functools
import pathlib

import casbin

from serving.access.identity import ACTIONS, ROLES

MIN_PRIORITY = -1000  # of anybody's request: with the usual ageing, behind 8 hours of others
# A step of priority is worth so many seconds of waiting (`--ageing_seconds`): unbounded, one caller could go first for
# ever. Who is served beside others may give way to them, and not push in front.
_MAX_PRIORITY = {"admin": 100, "developer": 10}
_HERE = pathlib.Path(__file__).resolve().parent


@functools.cache
def allowed() -> dict[str, frozenset[str]]:
    """The roles that may do each action. There are so few that casbin is asked about all of them once."""
    enforcer = casbin.Enforcer(str(_HERE / "policy_model.conf"), str(_HERE / "policy.csv"))
    return {action: frozenset(role for role in ROLES if enforcer.enforce(role, action)) for action in ACTIONS}


def max_priority(role: str) -> int:
    """The highest priority that requests of a role may ask for."""
    return _MAX_PRIORITY.get(role, 0)
