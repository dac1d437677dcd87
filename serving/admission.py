"""From a caller to a request that may run: who it is, whether it may, and what is written down when it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import grpc

from llm_jax.inference.request import Usage
from serving import logs
from serving.access.audit import AuditEntry
from serving.access.guard import Guard, Place
from serving.access.identity import Caller, Identity
from serving.access.policy import MIN_PRIORITY, max_priority
from serving.errors import Reason, as_rejected, invalid
from serving.metrics import Metrics
from serving.room import Entrant
from serving.tracing import Span, Traces

MAX_TENANT_CHARACTERS = 256
BATCH_PRIORITY = MIN_PRIORITY  # of a batch's lines, whatever they ask for
# Not failures of the request: the client left, the door has let go of it, or gRPC was told already.
_LEFT = (asyncio.CancelledError, GeneratorExit, grpc.aio.BaseError)


class Admission:
    """A request that may run, and what it has used so far.

    Attributes:
      caller: as the door described it.
      identity: who that is.
      tenant: whose prefix cache, response cache, files and quota these are: the identity's, or the one that the
        caller names where no keys are set.
      began: when it came, on `time.monotonic`.
      entrant: how far its parts have come into the engine's queue.
      usage: tokens so far, of all its parts and their samples; `add_usage` adds to it.
      span: its OpenTelemetry span; one that tells nobody where no traces are asked for.
    """

    def __init__(self, caller: Caller, span: Span) -> None:
        self.caller = caller
        self.identity: Identity | None = None
        self.tenant = caller.tenant
        self.began = time.monotonic()
        self.entrant = Entrant()
        self.usage = Usage(0, 0)
        self.span = span
        self._place: Place | None = None
        self._ahead = 0  # tokens that are set aside for parts to come

    def enter(self, guard: Guard, action: str, entered: contextlib.ExitStack, counted: bool) -> None:
        """Finds out who it is and takes its place.

        Raises:
          Rejected: nobody known, or one who may not do this, or not now.
        """
        caller = self.caller
        try:
            identity = (guard.resume(caller.key_id) if caller.interface == "batch"
                        else guard.identify(caller.credential, caller.certificate, caller.page))
        except Exception as error:
            self.identity = getattr(error, "identity", None)  # of an expired key
            raise
        self.identity = identity
        if not guard.is_open:
            self.tenant = identity.tenant
        guard.authorize(identity, action)
        counted = counted and caller.interface != "batch"
        self._place = entered.enter_context(guard.enter(identity, action, counted=counted))

    def priority(self, asked: int) -> int:
        """What the engine is told: lines of a batch go behind everything else.

        Raises:
          Rejected: INVALID; the caller's role may not ask for so much, or nobody for so little.
        """
        if self.caller.interface == "batch":
            return BATCH_PRIORITY
        role = (self.identity or Identity()).role
        most = max_priority(role)
        if not MIN_PRIORITY <= asked <= most:
            raise invalid(f"priority={asked} must lie between {MIN_PRIORITY} and {most} for the role {role!r}",
                          "priority")
        return asked

    def reserve(self, tokens: int) -> None:
        """Sets aside what a part of the request may use at most, unless `reserve_all` has; see `Place.reserve`."""
        ahead = min(self._ahead, tokens)
        if self._place is not None and tokens > ahead:
            self._place.reserve(tokens - ahead)
        self._ahead -= ahead

    def reserve_all(self, tokens: int) -> None:
        """Sets aside what all parts may use at most, before the first begins: or a later one might find nothing left.

        Raises:
          Rejected: OVER_QUOTA; so many are not left, and nothing has run.
        """
        self.reserve(tokens)
        self._ahead += tokens

    def add_usage(self, usage: Usage) -> None:
        """Adds what a part of this request has used to `usage`, and charges its tokens to the caller's quotas.

        `Calls` does it itself for what goes through `stream`, `collect` and `embed`, also for a part that was cut
        short; others only for tokens that `Calls` knows nothing of. What was added is not taken back.

        Args:
          usage: of that part alone. Its tokens are added up; the longest of the times in the queue counts.
        """
        u = self.usage
        self.usage = Usage(u.prompt_tokens + usage.prompt_tokens, u.completion_tokens + usage.completion_tokens,
                           u.cached_tokens + usage.cached_tokens, max(u.queue_seconds, usage.queue_seconds))
        self.span.used(usage)
        if self._place is not None:
            self._place.charge(usage.prompt_tokens + usage.completion_tokens)


@contextlib.asynccontextmanager
async def admitted(caller: Caller, action: str, *, guard: Guard | None, metrics: Metrics | None, traces: Traces | None,
                   counted: bool = True) -> AsyncIterator[Admission]:
    """A request from its arrival to its end, whatever that is; see `Calls.admitted`."""
    logs.request_id.set(caller.request_id)
    if metrics is not None:
        metrics.started(caller.interface, caller.method)
    span = traces.start(caller, action, caller.traceparent) if traces is not None else Span()
    admission = Admission(caller, span)
    reason: Reason | None = None
    try:
        with contextlib.ExitStack() as entered:
            if len(caller.tenant) > MAX_TENANT_CHARACTERS:
                raise invalid(f"tenant must have at most {MAX_TENANT_CHARACTERS} characters", "tenant")
            if guard is not None:
                admission.enter(guard, action, entered, counted)
            yield admission
    except _LEFT:
        reason = Reason.CANCELLED
        raise
    except Exception as error:
        rejected = as_rejected(error)
        reason = rejected.reason
        if rejected is error:
            raise
        raise rejected from error
    finally:
        _write_down(admission, reason, time.monotonic() - admission.began, guard, metrics)


def _write_down(admission: Admission, reason: Reason | None, seconds: float, guard: Guard | None,
                metrics: Metrics | None) -> None:
    caller, identity, usage = admission.caller, admission.identity, admission.usage
    status = "ok" if reason is None else reason.value.code
    admission.span.end(status)
    if metrics is not None:
        if reason not in (None, Reason.CANCELLED):
            metrics.rejected(reason)
        metrics.finished(caller.interface, caller.method, status, seconds)
    if guard is not None:
        guard.audit(AuditEntry(
            caller.request_id, caller.interface, caller.method, "ok" if reason is None else reason.name.lower(),
            seconds, identity.key_id if identity else "", admission.tenant if identity else "",
            identity.role if identity else "", caller.peer, usage.prompt_tokens, usage.completion_tokens))
