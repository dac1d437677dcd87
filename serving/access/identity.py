"""Who is calling, as the doors see it and as the guard knows it."""

from __future__ import annotations

import dataclasses
import re
import secrets

from serving.logs import without_keys

INTERFACES = ("grpc", "http", "websocket", "batch")
ROLES = ("admin", "developer", "user", "read-only")
ACTIONS = ("generate", "embed", "read", "files", "batch", "metrics")

_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)


def sane_request_id(sent: str | None) -> str:
    """The id that a client gave its request, if it can stand in a header and a log line (no key can), else a new."""
    if sent and _REQUEST_ID.fullmatch(sent) and without_keys(sent) == sent:
        return sent
    return f"req-{secrets.token_hex(12)}"


@dataclasses.dataclass(frozen=True)
class Caller:
    """What a door knows of a request before anybody has looked at it.

    Attributes:
      interface: one of `INTERFACES`.
      method: the path or full method name, for metrics and the audit line.
      request_id: the door's, also in its answer and in every log line.
      credential: the API key as it was sent, without "Bearer "; None if there is none. Never logged.
      certificate: common name of the client's verified certificate, where mutual TLS is on.
      peer: address the connection came from.
      tenant: the tenant that the request itself names; believed where no keys are set, else the key's own counts.
      traceparent: the W3C header of the trace that the caller counts the request to; "" for none.
      key_id: of the key under which the server itself goes on with work that was left with it (a batch's line), which
        has no credential; "" for requests from outside.
      page: the site whose web page makes the request, where that is not this server's own (`access.browsers`).
    """

    interface: str
    method: str
    request_id: str
    credential: str | None = dataclasses.field(default=None, repr=False)
    certificate: str | None = None
    peer: str = ""
    tenant: str = ""
    traceparent: str = ""
    key_id: str = ""
    page: str = ""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who it is, once that is known.

    Attributes:
      key_id: public id of the key, for logs; "" for nobody in particular (no keys are set).
      name: what its maker called it.
      tenant: whose requests these are: prefix cache, response cache, quotas, files and batches are the tenant's own.
      role: one of `ROLES`.
    """

    key_id: str = ""
    name: str = "anonymous"
    tenant: str = ""
    role: str = "admin"
