"""Processes that take the same steps: what process 0 says in each turn, all of them hear.

The messages go over sockets and not through the devices: a collective would wait there behind the step that runs, and
the device would then wait for the plan of the next.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.errors import UserError
from llm_jax.inference.request import Constraint, SamplingParams
from llm_jax.inference.sequence import Plan

_LENGTH = struct.Struct("<Q")
_HELLO = struct.Struct("<32sI")
_SECONDS = 60.0  # to find one another
_MOST_BYTES = 2**30  # of one message
_OTHER_PLAN = "this process has planned another step than process 0, and stops"


class Disconnected(UserError):
    """Another process has ended."""


class Lockstep:
    """The line from process 0 to the others.

    Messages are JSON. Before each step they carry a digest of its plan, so that a process whose plan differs stops, and
    does not compute something else than its peers. Whoever reaches the port and does not know the secret,
    which goes through the devices, is hung up on; the messages are not encrypted, no more than JAX's own traffic.

    Attributes:
      leads: whether this is process 0.
      closed: whether this process has hung up.
      plans: a digest of the plans so far.
    """

    def __init__(self, host: str | None = None):
        """Meets the other processes; each must call it, at the same point of its program.

        Args:
          host: the name or address at which they reach process 0, asked of process 0 alone; None tries that of
            `JAX_COORDINATOR_ADDRESS` and those that the machine gives itself.
        Raises:
          UserError: one of them can't be reached.
        """
        self.leads = jax.process_index() == 0
        self.closed = False
        self._now = 0.0
        self.plans = 0
        self._peers: list[socket.socket] = []
        if jax.process_count() == 1:
            return
        if not self.leads:
            self._peers = [_connect(_broadcast(None))]
            return
        with socket.create_server((host or "", 0)) as server:
            call = {"hosts": [host] if host else _addresses(), "port": server.getsockname()[1],
                    "secret": secrets.token_hex(32)}
            _broadcast(call)
            self._peers = _accept(server, bytes.fromhex(call["secret"]), jax.process_count() - 1)

    def clock(self) -> float:
        """Seconds on process 0's clock at the last `exchange`: all that a decision may know of the time."""
        return self._now

    def planned(self, plan: Plan) -> None:
        """To be called with the plan of a step before it is sent: UserError if process 0 has made another."""
        what = [(c.sequence.id, c.start, c.count, c.proposed, c.sequence.pages[-1]) for c in plan]
        self.plans = zlib.crc32(repr(what).encode(), self.plans)
        if self.agree({"plans": self.plans}) != {"plans": self.plans}:
            raise UserError(_OTHER_PLAN)

    def exchange(self, events: list[dict[str, Any]], now: float) -> list[dict[str, Any]]:
        """Process 0's events, at every process; the others wait for it.

        Args:
          events, now: what has happened and the time, in seconds; asked of process 0 alone.
        Raises:
          Disconnected: a process has ended.
          UserError: process 0 has planned a step where this process has none.
        """
        message = self.agree({"events": events, "now": now})
        if "events" not in message:
            raise UserError(_OTHER_PLAN)
        self._now = message["now"]
        return message["events"]

    def agree(self, value: Any) -> Any:
        """Process 0's value, which is JSON, at every process."""
        try:
            if not self.leads:
                return json.loads(_receive(self._peers[0]))
            payload = json.dumps(value).encode()
            for peer in self._peers:
                peer.sendall(_LENGTH.pack(len(payload)) + payload)
            return json.loads(payload)  # what the others have, to the type
        except OSError as error:
            raise Disconnected(f"the {'other processes' if self.leads else 'lead process'} can't be reached any more: "
                               f"{error}") from None

    def close(self) -> None:
        """Hangs up, also on an `exchange` that another thread waits in."""
        self.closed = True
        for peer in self._peers:
            try:
                peer.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has hung up
            peer.close()


def least(value: int) -> int:
    """The smallest of the values with which the processes call it; each must."""
    if jax.process_count() == 1:
        return value
    return min(_LENGTH.unpack(found)[0] for found in _gather(_LENGTH.pack(value)))


def alike(value: Any) -> bool:
    """Whether all processes call it with values of the same `repr`; each must."""
    return jax.process_count() == 1 or len(set(_gather(hashlib.sha256(repr(value).encode()).digest()))) == 1


def params_to_json(params: SamplingParams) -> dict[str, Any]:
    """The fields of `params`, for `params_from_json`."""
    made = {name: getattr(params, name) for name in params.__dataclass_fields__}
    if params.constraint is not None:
        made["constraint"] = [params.constraint.kind, params.constraint.text]
    return made


def params_from_json(fields: dict[str, Any]) -> SamplingParams:
    """What `params_to_json` was given, once JSON has made lists of its tuples."""
    made = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    made["logit_bias"] = tuple(map(tuple, made["logit_bias"]))
    if made["constraint"] is not None:
        made["constraint"] = Constraint(*made["constraint"])
    return SamplingParams(**made)


def _gather(data: bytes) -> list[bytes]:
    """What every process gave, all of one length; as bytes, as on devices a whole number has 32 bits."""
    rows = np.asarray(multihost_utils.process_allgather(np.frombuffer(data, np.uint8)))
    return [row.astype(np.uint8).tobytes() for row in rows]


def _broadcast(value: Any) -> Any:
    """Process 0's value, through the devices."""
    payload = json.dumps(value).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(payload))))
    padded = np.frombuffer(payload[:length].ljust(length), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())


def _addresses() -> list[str]:
    """Where this machine may be reached, the best guess first."""
    guesses = [os.environ.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")[0].strip("[]")]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks by which way it would go
            guesses.append(probe.getsockname()[0])
        except OSError:
            pass  # no network but the machine's own
    return [guess for guess in (*guesses, socket.gethostname()) if guess]


def _answer(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _accept(server: socket.socket, secret: bytes, count: int) -> list[socket.socket]:
    peers: dict[int, socket.socket] = {}
    server.settimeout(_SECONDS)
    while len(peers) < count:
        try:
            peer, _ = server.accept()
        except TimeoutError:
            raise UserError(f"{count - len(peers)} of the other {count} processes did not call process 0 within "
                            f"{_SECONDS:.0f} s; tell it, as `host`, the address at which they reach it") from None
        peer.settimeout(_SECONDS)
        try:
            said, index = _HELLO.unpack(_exactly(peer, _HELLO.size))
            if not hmac.compare_digest(said, secret):
                raise OSError("a stranger")
            peer.sendall(_answer(secret))
        except OSError:
            peer.close()
            continue
        peers[index] = _ready(peer)
    return list(peers.values())


def _connect(call: dict[str, Any]) -> socket.socket:
    secret, failed = bytes.fromhex(call["secret"]), []
    for host in call["hosts"]:
        try:
            peer = socket.create_connection((host, call["port"]), timeout=_SECONDS / 6)
            peer.sendall(_HELLO.pack(secret, jax.process_index()))
            if hmac.compare_digest(_exactly(peer, len(_answer(secret))), _answer(secret)):
                return _ready(peer)
            peer.close()
        except OSError as error:
            failed.append(f"{host}: {error}")
    raise UserError(f"process 0 can't be reached at {', '.join(call['hosts'])} (port {call['port']}; "
                    f"{'; '.join(failed)}); tell it, as `host`, the address at which the others reach it")


def _ready(peer: socket.socket) -> socket.socket:
    peer.settimeout(None)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return peer


def _receive(peer: socket.socket) -> bytes:
    length, = _LENGTH.unpack(_exactly(peer, _LENGTH.size))
    if length > _MOST_BYTES:
        raise OSError(f"a message of {length} bytes")
    return _exactly(peer, length)


def _exactly(peer: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = peer.recv(min(count - len(data), 2**16))
        if not part:
            raise OSError("it has hung up")
        data += part
    return bytes(data)
