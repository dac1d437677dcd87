"""Responses that tenants may ask for again, or go on from: kept in memory, for a while, so many bytes."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

from serving.errors import Reason, Rejected

KEPT_S = 86_400.0
MAX_BYTES = 256 << 20
MAX_TENANT_BYTES = 64 << 20


@dataclasses.dataclass
class Kept:
    """A response.

    Attributes:
      body: the object, as it was when it ended; while it is made, what `snapshot` gives counts.
      input: its input's items.
      messages: the conversation up to its end, without instructions; what goes on from here begins with them.
      task: what makes it, in the background; None if nothing does.
      snapshot: its object while it is made.
    """

    body: dict[str, Any]
    input: list[dict[str, Any]]
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    task: asyncio.Task[Any] | None = None
    snapshot: Callable[[], dict[str, Any]] | None = None
    at: float = 0.0
    bytes: int = 0

    def now(self) -> dict[str, Any]:
        """The object as it is now."""
        return self.snapshot() if self.snapshot else self.body


class ResponseStore:
    """By tenant and id; the oldest of a tenant's go first, then the oldest of all.

    Args:
      kept_s: seconds that one is kept.
      max_bytes: of all together, about.
      max_tenant_bytes: of one tenant's.
      clock: seconds.
    """

    def __init__(self, *, kept_s: float = KEPT_S, max_bytes: int = MAX_BYTES, max_tenant_bytes: int = MAX_TENANT_BYTES,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._kept_s = kept_s
        self._max_bytes = max_bytes
        self._max_tenant_bytes = max_tenant_bytes
        self._clock = clock
        self._tenants: dict[str, collections.OrderedDict[str, Kept]] = {}
        self._tenant_bytes: collections.Counter[str] = collections.Counter()
        self._bytes = 0

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    def put(self, tenant: str, kept: Kept) -> None:
        """Keeps a response, or keeps it anew when it has changed."""
        response_id = kept.body["id"]
        self._drop(tenant, response_id)
        kept.at = self._clock()
        kept.bytes = len(json.dumps((kept.body, kept.input, kept.messages), ensure_ascii=False).encode())
        self._tenants.setdefault(tenant, collections.OrderedDict())[response_id] = kept
        self._tenant_bytes[tenant] += kept.bytes
        self._bytes += kept.bytes
        while self._tenant_bytes[tenant] > self._max_tenant_bytes:
            self._drop(tenant, next(iter(self._tenants[tenant])))
        self._forget_old()

    def get(self, tenant: str, response_id: str, field: str | None = None) -> Kept:
        """A response of this tenant.

        Raises:
          Rejected: there is none, or not any more; `field` is where the request names it.
        """
        self._forget_old()
        entries = self._tenants.get(tenant)
        kept = entries.get(response_id) if entries else None
        if kept is None:
            reason = Reason.INVALID if field else Reason.NOT_FOUND
            raise Rejected(reason, f"there is no response {response_id!r:.80}, or it is not kept any more", field=field)
        return kept

    def delete(self, tenant: str, response_id: str) -> Kept:
        """Forgets a response.

        Raises:
          Rejected: there is none.
        """
        kept = self.get(tenant, response_id)
        self._drop(tenant, response_id)
        return kept

    def _forget_old(self) -> None:
        least = self._clock() - self._kept_s
        while self._tenants:
            tenant, entries = min(self._tenants.items(), key=lambda one: next(iter(one[1].values())).at)
            response_id, oldest = next(iter(entries.items()))
            if oldest.at >= least and self._bytes <= self._max_bytes:
                return
            self._drop(tenant, response_id)

    def _drop(self, tenant: str, response_id: str) -> None:
        entries = self._tenants.get(tenant)
        kept = entries.pop(response_id, None) if entries else None
        if kept is None or entries is None:
            return
        self._bytes -= kept.bytes
        self._tenant_bytes[tenant] -= kept.bytes
        if not entries:
            del self._tenants[tenant], self._tenant_bytes[tenant]
