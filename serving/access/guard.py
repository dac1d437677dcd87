"""The one place that says who may come in: every door asks it, and all of them pass on its words.

    identity = guard.identify(caller.credential, caller.certificate)
    guard.authorize(identity, "generate")
    with guard.enter(identity, "generate") as place:
        place.reserve(len(prompt_ids) + max_tokens)
        …
        place.charge(tokens)   # whatever was drawn, also if the client left before it came
    guard.audit(AuditEntry(…))

Each of the first four raises `Rejected` with a message that is the same on every interface.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from serving.access import policy
from serving.access.audit import AuditEntry, AuditLog
from serving.access.identity import ROLES, Identity
from serving.access.keys import Key, Tenant, WatchedKeys, utc
from serving.access.limits import Concurrency, Rates
from serving.access.quotas import Quota, Quotas, Shortage
from serving.errors import Reason, Rejected

if TYPE_CHECKING:
    from serving.options import ServerOptions

NO_KEY = "an API key is needed: send it as 'authorization: Bearer KEY'"
WRONG_KEY = "the API key is not valid"
_AUDIT_FILE = "audit.jsonl"
SPENDING = ("generate", "embed")  # the actions that use tokens


class Refused(Rejected):
    """Rejected, though it is known who it was: for the audit line.

    Attributes:
      identity: whose key it is that may not do this any more.
    """

    def __init__(self, reason: Reason, message: str, identity: Identity) -> None:
        super().__init__(reason, message)
        self.identity = identity


class Place:
    """A request's place among those that run; made by `Guard.enter`, which gives back what it holds.

    Attributes:
      reserved, charged: tokens.
    """

    def __init__(self, reserve: Callable[[int], None]) -> None:
        self.reserved = 0
        self.charged = 0
        self._reserve = reserve

    def reserve(self, tokens: int) -> None:
        """Sets aside what the request may use at most, of all its samples: its prompt's tokens and its new ones.

        Without this, requests that run together could each use what is left.

        Raises:
          Rejected: OVER_QUOTA; so many are not left.
        """
        self._reserve(tokens)
        self.reserved += tokens

    def charge(self, tokens: int) -> None:
        """Counts tokens as used; they are written down when the place is given back."""
        self.charged += tokens


class Guard:
    """Who may come in, how often, and for how much. Safe for several threads.

    Args:
      keys: None lets everybody do everything: for a server that only this machine can reach.
      quotas: where used tokens are counted.
      audit: where the lines go.
      now: the wall clock, in seconds since 1970.
    """

    def __init__(self, keys: WatchedKeys | None, quotas: Quotas, audit: AuditLog,
                 now: Callable[[], float] = time.time) -> None:
        self._keys = keys
        self._quotas = quotas
        self._audit = audit
        self._now = now
        self._lock = threading.Lock()
        self._rates = Rates() if keys else None
        self._concurrency = Concurrency()
        self._allowed = policy.allowed()
        quotas.forget_old(utc(now()))

    @staticmethod
    def open() -> Guard:
        """Nobody is asked for a key, nothing is limited or written down."""
        return Guard(None, Quotas(), AuditLog(None))

    @staticmethod
    def from_options(options: ServerOptions) -> Guard:
        """What the command line asks for.

        Audit lines go to `audit_file`, else into `state_dir`, else, if there are keys, to standard error.

        Raises:
          UserError: a file can't be read, written, or is wrong.
        """
        audit_file = options.audit_file
        if audit_file is None and options.state_dir is not None:
            audit_file = os.path.join(options.state_dir, _AUDIT_FILE)
        if audit_file is None and options.keys_file is not None:
            audit_file = "-"
        return Guard(None if options.keys_file is None else WatchedKeys(options.keys_file),
                     Quotas(options.state_dir), AuditLog(audit_file))

    @property
    def is_open(self) -> bool:
        """Whether no keys are set. A keys file without a key in it is not open: it lets nobody in."""
        return self._keys is None

    def identify(self, credential: str | None, certificate: str | None = None, page: str = "") -> Identity:
        """Who it is. A key that was sent counts, also beside a certificate.

        Args:
          credential: the key as it was sent.
          certificate: common name of the client's verified certificate.
          page: see `Caller.page`. A key is as good from any page; without keys, those of other sites are shut out.

        Raises:
          Rejected: UNAUTHENTICATED, or FORBIDDEN for a page of another site.
        """
        if self._keys is None:
            if page:
                raise Rejected(Reason.FORBIDDEN, f"this server has no API keys and is for this machine alone; pages of "
                               f"{page!r:.200} may not use it (with --keys_file, those that send a key may)")
            return Identity()
        keys = self._keys.now
        if credential:
            return _identity(self._good(keys.by_credential(credential)))
        if certificate:
            return _identity(self._good(keys.by_certificate(certificate)))
        raise Rejected(Reason.UNAUTHENTICATED, NO_KEY)

    def resume(self, key_id: str) -> Identity:
        """Who left work behind (a batch) under the key of this id, if that key is still good.

        Raises:
          Rejected: UNAUTHENTICATED; the key was revoked or has expired since.
        """
        return Identity() if self._keys is None else _identity(self._good(self._keys.now.by_id(key_id)))

    def authorize(self, identity: Identity, action: str) -> None:
        """Whether its role may do this.

        Args:
          action: one of `ACTIONS`.

        Raises:
          Rejected: FORBIDDEN.
        """
        roles = self._allowed[action]
        if identity.role not in roles:
            able = ", ".join(role for role in ROLES if role in roles)
            raise Rejected(Reason.FORBIDDEN,
                           f"the role {identity.role!r} may not do this ({action!r}); these may: {able}")

    @contextlib.contextmanager
    def enter(self, identity: Identity, action: str = "generate", *, counted: bool = True) -> Iterator[Place]:
        """A place for one request, given back at the end of the block.

        Args:
          action: as authorized. Whoever has no tokens left may still do what uses none.
          counted: whether it counts for the key's rate and requests at once. The lines of a batch don't: they run
            behind everything else, and the batch itself was a request. Quotas hold in any case.

        Raises:
          Rejected: RATE_LIMITED, OVER_QUOTA, or UNAUTHENTICATED if the key has been revoked meanwhile.
        """
        if self._keys is None:
            yield Place(lambda tokens: None)
            return
        keys = self._keys.now
        key = self._good(keys.by_id(identity.key_id))
        quotas = _quotas(key, keys.tenants.get(key.tenant)) if action in SPENDING else []

        def reserve(tokens: int) -> None:
            now = utc(self._now())
            _refuse_if(self._quotas.reserve(quotas, tokens, now), tokens, now)

        now = utc(self._now())
        _refuse_if(self._quotas.short(quotas, 1, now), 1, now)
        if counted:
            self._count(key)
        place = Place(reserve)
        try:
            yield place
        finally:
            if place.charged > 0:
                self._quotas.charge({"tenant": key.tenant, "key": key.id}, place.charged, utc(self._now()))
            self._quotas.release(quotas, place.reserved)
            if counted:
                with self._lock:
                    self._concurrency.release(key.id)

    def audit(self, entry: AuditEntry) -> None:
        """Writes the line of a request that has ended."""
        self._audit.write(entry)

    def close(self) -> None:
        """Closes the files."""
        self._audit.close()
        self._quotas.close()

    def _good(self, key: Key | None) -> Key:
        if key is None or key.revoked is not None:  # whoever finds an old key learns no more than that it is useless
            raise Rejected(Reason.UNAUTHENTICATED, WRONG_KEY)
        if key.expires is not None and self._now() >= key.expires.timestamp():
            raise Refused(Reason.UNAUTHENTICATED, f"the API key expired on {_written(key.expires)}", _identity(key))
        return key

    def _count(self, key: Key) -> None:
        """Takes a place: both limits in one step, so that requests that come together can't pass them."""
        assert self._rates is not None
        with self._lock:
            if not self._concurrency.take(key.id, key.concurrent):
                raise Rejected(Reason.RATE_LIMITED, f"this key may have {key.concurrent:,} requests at once")
            wait_s = None if key.requests_per_minute is None else self._rates.hit(key.id, key.requests_per_minute)
            if wait_s is not None:
                self._concurrency.release(key.id)
                raise Rejected(Reason.RATE_LIMITED, f"this key may make {key.requests_per_minute:,} requests a minute",
                               retry_after_s=wait_s)


def _refuse_if(short: Shortage | None, tokens: int, now: datetime.datetime) -> None:
    if short is None:
        return
    quota, ends = short.quota, short.quota.ends(now)
    whose = f"the tenant {quota.name!r}" if quota.owner == "tenant" else "this key"
    said = f"{whose} has a quota of {quota.tokens:,} tokens a {quota.period}, renewed at {_written(ends)}"
    left = quota.tokens - short.used
    if left <= 0:
        raise Rejected(Reason.OVER_QUOTA, f"{said}: all are used", retry_after_s=(ends - now).total_seconds())
    held = f" ({short.reserved:,} of them set aside for running requests)" if short.reserved else ""
    raise Rejected(Reason.OVER_QUOTA, f"{said}: {left:,} are left{held}, and this request may take {tokens:,}; ask for "
                   "fewer with max_tokens", field="max_tokens")


def _identity(key: Key) -> Identity:
    return Identity(key.id, key.name, key.tenant, key.role)


def _quotas(key: Key, tenant: Tenant | None) -> list[Quota]:
    """What limits the tokens of a key."""
    asked = [("key", key.id, "day", key.tokens_per_day)]
    if tenant is not None:
        asked += [("tenant", key.tenant, "day", tenant.tokens_per_day),
                  ("tenant", key.tenant, "month", tenant.tokens_per_month)]
    return [Quota(owner, name, period, tokens) for owner, name, period, tokens in asked if tokens is not None]


def _written(moment: datetime.datetime) -> str:
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
