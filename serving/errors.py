"""How a request is refused or fails: one reason, told in each protocol's own way."""

from __future__ import annotations

import dataclasses
import enum
import logging

import grpc

from llm_jax.errors import UserError
from llm_jax.inference.request import DeadlineExceeded, InvalidRequest, QueueFull, Unavailable
from serving import logs

log = logging.getLogger(__name__)

RETRY_S = 1.0  # when a queue may have moved on, or another instance taken over


@dataclasses.dataclass(frozen=True)
class Told:
    """A reason in the protocols' words: gRPC's status, HTTP's, and the `type` and `code` of OpenAI's error objects."""

    grpc: grpc.StatusCode
    http: int
    type: str
    code: str


_Code = grpc.StatusCode


class Reason(enum.Enum):
    """Why a request got no answer, or not all of it."""

    INVALID = Told(_Code.INVALID_ARGUMENT, 400, "invalid_request_error", "invalid_value")
    TOO_LARGE = Told(_Code.INVALID_ARGUMENT, 413, "invalid_request_error", "request_too_large")
    FILTERED = Told(_Code.INVALID_ARGUMENT, 400, "invalid_request_error", "content_filter")
    UNAUTHENTICATED = Told(_Code.UNAUTHENTICATED, 401, "authentication_error", "invalid_api_key")
    FORBIDDEN = Told(_Code.PERMISSION_DENIED, 403, "permission_error", "insufficient_permissions")
    NOT_FOUND = Told(_Code.NOT_FOUND, 404, "invalid_request_error", "not_found")
    CONFLICT = Told(_Code.FAILED_PRECONDITION, 409, "invalid_request_error", "conflict")
    RATE_LIMITED = Told(_Code.RESOURCE_EXHAUSTED, 429, "rate_limit_error", "rate_limit_exceeded")
    OVER_QUOTA = Told(_Code.RESOURCE_EXHAUSTED, 429, "insufficient_quota", "insufficient_quota")
    QUEUE_FULL = Told(_Code.RESOURCE_EXHAUSTED, 429, "server_overloaded", "queue_full")
    CANCELLED = Told(_Code.CANCELLED, 499, "cancelled", "cancelled")
    TOO_SLOW = Told(_Code.DEADLINE_EXCEEDED, 408, "invalid_request_error", "request_timeout")
    DEADLINE = Told(_Code.DEADLINE_EXCEEDED, 504, "deadline_exceeded", "deadline_exceeded")
    UNAVAILABLE = Told(_Code.UNAVAILABLE, 503, "server_unavailable", "unavailable")
    INTERNAL = Told(_Code.INTERNAL, 500, "server_error", "internal_error")


class Rejected(Exception):
    """A request that ends with a status other than success.

    Attributes:
      reason: why.
      message: for the caller: what was wrong, and what would be right. The same on every interface.
      field: of the request, that is at fault; None if it is no single one.
      retry_after_s: seconds after which to try again; None if that would not help, or nobody knows.
    """

    def __init__(self, reason: Reason, message: str, *, field: str | None = None,
                 retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


def as_rejected(error: Exception) -> Rejected:
    """How a request ends that raised `error`; anything unforeseen is INTERNAL, with its traceback in the log."""
    if isinstance(error, Rejected):
        return error
    if isinstance(error, QueueFull):
        return Rejected(Reason.QUEUE_FULL, str(error), retry_after_s=RETRY_S)
    if isinstance(error, DeadlineExceeded):
        return Rejected(Reason.DEADLINE, str(error))
    if isinstance(error, Unavailable):
        return Rejected(Reason.UNAVAILABLE, str(error), retry_after_s=RETRY_S)
    if isinstance(error, InvalidRequest):
        return invalid(str(error), error.field)
    if isinstance(error, UserError):  # the user of whatever raised it is the caller
        return invalid(str(error))
    log.error("a request failed", exc_info=error)
    return Rejected(Reason.INTERNAL, f"the server failed on this request ({logs.request_id.get() or 'no id'}); its log "
                    "tells why")


def invalid(message: str, field: str | None = None) -> Rejected:
    """The same request would fail again."""
    return Rejected(Reason.INVALID, message, field=field)
