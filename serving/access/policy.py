"""Which role may do what: `policy.csv` under `policy_model.conf`, as casbin reads them."""

from __future__ import annotations

import functools
import pathlib

import casbin

from serving.access.identity import ACTIONS, ROLES

_HERE = pathlib.Path(__file__).resolve().parent


@functools.cache
def allowed() -> dict[str, frozenset[str]]:
    """The roles that may do each action. There are so few that casbin is asked about all of them once."""
    enforcer = casbin.Enforcer(str(_HERE / "policy_model.conf"), str(_HERE / "policy.csv"))
    return {action: frozenset(role for role in ROLES if enforcer.enforce(role, action)) for action in ACTIONS}
