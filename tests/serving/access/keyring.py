"""Keys files for tests."""

from __future__ import annotations

import datetime
import itertools
import json
import pathlib
from typing import Any

from serving.access import keys
from serving.access.audit import AuditLog
from serving.access.guard import Guard
from serving.access.keys import Key, KeySet, Tenant, WatchedKeys
from serving.access.quotas import Quotas

NOW = datetime.datetime(2026, 11, 23, 22, 30, tzinfo=datetime.UTC)


class Keyring:
    """A keys file that grows, a clock that is set by hand, and an audit file."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.path = folder / "keys.json"
        self.audit_path = folder / "audit.jsonl"
        self.now = NOW.timestamp()
        self._numbers = itertools.count()
        self._logs: list[AuditLog] = []
        with keys.changed(self.path):
            pass

    def add(self, role: str = "user", **fields: Any) -> str:
        """A new key's secret; its id is `key-0`, `key-1` …"""
        secret = keys.new_secret()
        proof = {} if "certificate" in fields else {"sha256": keys.hashed(secret)}
        made = {"id": f"key-{next(self._numbers)}", "name": "测试", "role": role, "created": NOW}
        key = Key(**{**made, **proof, **fields})
        with keys.changed(self.path) as holder:
            holder[0] = KeySet(keys=(*holder[0].keys, key), tenants=holder[0].tenants)
        return secret

    def change(self, key_id: str, **fields: Any) -> None:
        """Changes a key."""
        with keys.changed(self.path) as holder:
            changed = tuple(k.model_copy(update=fields) if k.id == key_id else k for k in holder[0].keys)
            holder[0] = KeySet(keys=changed, tenants=holder[0].tenants)

    def quota(self, tenant: str, **fields: int) -> None:
        """Sets a tenant's quota."""
        with keys.changed(self.path) as holder:
            holder[0] = KeySet(keys=holder[0].keys, tenants={**holder[0].tenants, tenant: Tenant(**fields)})

    def guard(self, state_dir: pathlib.Path | None = None) -> Guard:
        """A guard with this file, clock and audit file."""
        audit = AuditLog(self.audit_path)
        self._logs.append(audit)
        return Guard(WatchedKeys(self.path), Quotas(state_dir), audit, lambda: self.now)

    def audited(self) -> list[dict[str, Any]]:
        """The audit lines so far."""
        assert all(audit.flush() for audit in self._logs)
        return [json.loads(line) for line in self.audit_path.read_text().splitlines()]
