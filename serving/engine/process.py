"""What runs in the engine's process (`python -m serving.engine FD`), which `EngineProcess` starts.

It takes messages from the doors' process over a socket that it has inherited, and ends with that process, however that
one ends. Signals are the doors' business: they come here blocked.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from llm_jax.errors import UserError
from llm_jax.inference.request import DeadlineExceeded, Delta, QueueFull, SamplingParams
from serving import logs
from serving.engine import wire
from serving.engine.front import MAX_PREPARING, takes_long
from serving.engine.outbox import Outbox
from serving.following import follow
from serving.reporting import reporting

PERIOD_S = 0.25  # between two looks at whether the service is still alive
FLUSH_S = 5.0  # for the last words

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Which service the process is to run.

    Attributes:
      make: "module:function" that makes it, ready to answer; called with the arguments and with `say=`, which prints a
        line. It returns `Made`.
      arguments: picklable.
      stats_seconds: see `reporting`.
      log_format: see `logs.set_up`.
    """

    make: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    stats_seconds: float = 0.0
    log_format: str = "text"


@dataclasses.dataclass(frozen=True)
class Made:
    """A service, and what the doors have to know of it.

    Attributes:
      service: a `Service`, or what behaves like one.
      source: folder of its tokenizer.
      created: see `Facts`.
      follows: whether it only takes part in another process's steps.
    """

    service: Any
    source: str = ""
    created: int = 0
    follows: bool = False


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the doors are told of a service that is ready: the properties of `Front`, and where its tokenizer lies.

    Attributes:
      created: when the model was made, seconds since 1970; 0 is not known.
    """

    defaults: Any
    max_context: int
    max_prompt_tokens: int
    max_requests: int
    source: str
    created: int = 0


class Requests:
    """The doors' requests to a service: theirs have numbers that the doors give them, before the service has.

    What is taken in by another thread counts from its arrival among the requests that may run and wait together; so
    does what was cancelled meanwhile, until that thread has done with it. So nothing piles up before the service.
    """

    def __init__(self, service: Any, outbox: Outbox) -> None:
        self._service = service
        self._outbox = outbox
        self._open: dict[int, int | None] = {}  # the service's number; None while it is taken in
        self._given_up: set[int] = set()  # cancelled while they are taken in
        self._lock = threading.Lock()  # guards both; nothing is called under it
        self._preparing = concurrent.futures.ThreadPoolExecutor(MAX_PREPARING, thread_name_prefix="intake")

    def submit(self, ids: Sequence[int], prompt_ids: Sequence[int], params: Sequence[SamplingParams], priority: int,
               tenant: str, deadline_s: float | None) -> None:
        """Queues the samples, and answers "accepted" or "refused"; what takes long is done by another thread."""
        due = None if deadline_s is None else time.monotonic() + deadline_s
        take_in = functools.partial(
            self._take_in, ids, lambda listeners: self._service.submit_samples(
                prompt_ids, params, listeners, priority, tenant=tenant, deadline_s=_left_s(due)))
        if not self._opened(ids):
            return
        if takes_long(prompt_ids, params):
            self._preparing.submit(take_in)
        else:
            take_in()

    def embed(self, request_id: int, prompt_ids: Sequence[int], pooling: str, priority: int) -> None:
        """The same, of an embedding."""
        if self._opened([request_id]):
            self._take_in([request_id],
                          lambda listeners: [self._service.embed(prompt_ids, pooling, *listeners, priority)])

    def cancel(self, ids: Sequence[int]) -> None:
        """Ends requests, also those that are being taken in; nobody hears of them any more."""
        with self._lock:
            self._given_up.update(i for i in ids if self._open.get(i, 0) is None)
            found = [self._open.pop(i, None) for i in ids]
        for i, number in zip(ids, found, strict=True):
            self._outbox.drop(i)
            if number is not None:
                self._service.cancel(number)

    def _opened(self, ids: Sequence[int]) -> bool:
        """Whether there are places for so many requests; they are refused if not."""
        with self._lock:
            most, under_way = self._service.max_requests, len(self._open) + len(self._given_up)
            if has_room := under_way + len(ids) <= most:
                self._open.update(dict.fromkeys(ids))
        if not has_room:
            self._outbox.answer("refused", ids[0], QueueFull(
                f"{under_way} requests run and wait already, of at most {most}; try again later"))
        return has_room

    def _take_in(self, ids: Sequence[int], submit: Callable[[list[Callable[[Delta], None]]], list[int]]) -> None:
        try:
            with self._lock:
                if not any(i in self._open for i in ids):
                    return  # cancelled before its turn came
            self._submit(ids, submit)
        finally:
            with self._lock:
                self._given_up.difference_update(ids)

    def _submit(self, ids: Sequence[int], submit: Callable[[list[Callable[[Delta], None]]], list[int]]) -> None:
        try:
            numbers = submit([functools.partial(self._hear, i) for i in ids])
        except Exception as error:  # noqa: BLE001 - it is the caller's
            if not isinstance(error, UserError):
                log.exception("a request could not be taken in")
                error = RuntimeError(f"{type(error).__name__}: {error}")
            with self._lock:
                for i in ids:
                    self._open.pop(i, None)
            self._outbox.answer("refused", ids[0], error)
            return
        cancelled = []
        with self._lock:
            for i, number in zip(ids, numbers, strict=True):
                if i in self._open:
                    self._open[i] = number
                else:  # or it has ended already
                    cancelled.append(number)
        for number in cancelled:
            self._service.cancel(number)
        self._outbox.answer("accepted", ids[0])

    def _hear(self, request_id: int, delta: Delta) -> None:
        with self._lock:
            if request_id not in self._open:
                return
            if delta.finish_reason is not None:
                del self._open[request_id]
        self._outbox.push(request_id, delta)


class Engine:
    """The process's main parts: a thread that reads what the doors say, and the service between them and the outbox."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._outbox = Outbox(line)
        self._requests: Requests | None = None
        self._service: Any = None
        self._draining = False
        self._ended = threading.Event()

    def run(self) -> int:
        """Makes the service that the first message asks for, and serves the doors until they say that it is enough.

        Returns:
          The exit status: 0; 2 if it could not be made, for the user's reasons; as of `follow` for one that follows.
        """
        first = wire.receive(self._line)
        if first is None:
            return 1
        spec: Spec = first[1]
        logs.set_up(spec.log_format, level=logging.WARNING)
        threading.Thread(target=self._read, name="doors", daemon=True).start()
        try:
            module, _, name = spec.make.partition(":")
            made = getattr(importlib.import_module(module), name)(**spec.arguments, say=_say)
        except UserError as error:
            self._outbox.answer("failed", str(error))
            self._outbox.close(FLUSH_S)
            return 2
        if made.follows:
            self._outbox.answer("follows")
            return follow(made.service, _say)
        with reporting(made.service, spec.stats_seconds, _say):
            return self._serve(made)

    def _serve(self, made: Made) -> int:
        service = made.service
        self._service = service
        self._requests = Requests(service, self._outbox)
        self._outbox.answer("ready", Facts(service.defaults, service.max_context, service.max_prompt_tokens,
                                           service.max_requests, made.source, made.created))
        lost = ""
        while not self._ended.wait(PERIOD_S):
            if not service.is_live and not self._draining:
                lost = getattr(service, "failure", "") or "it could not go on after a failed step"
                break
        service.close()
        if lost:
            self._outbox.answer("lost", lost)
        self._outbox.close(FLUSH_S)
        if lost:
            os._exit(1)  # JAX would wait a minute for processes that are gone
        return 0

    def _read(self) -> None:
        """Does what the doors say; when they hang up, the process ends."""
        try:
            while (message := wire.receive(self._line)) is not None:
                self._do(*message)
        except Exception:  # noqa: BLE001 - an engine that hears nobody is none
            log.exception("the engine's process ends")
        os._exit(1)  # whoever waited for answers is gone

    def _do(self, kind: str, *values: Any) -> None:
        if kind == "close":
            if self._requests is None:
                os._exit(0)  # nothing is served yet, and what compiles can't be stopped
            self._ended.set()
        elif self._requests is None:
            raise RuntimeError(f"{kind!r} came before the engine was ready")
        elif kind == "submit":
            self._requests.submit(*values)
        elif kind == "embed":
            self._requests.embed(*values)
        elif kind == "cancel":
            self._requests.cancel(*values)
        elif kind == "stats":
            self._outbox.answer("stats", *values, self._service.stats())
        elif kind == "drain":
            self._draining = True
            self._service.begin_drain()


def _left_s(due: float | None) -> float | None:
    """Seconds until a deadline that counts while a request is taken in.

    Raises:
      DeadlineExceeded: there are none.
    """
    left_s = None if due is None else due - time.monotonic()
    if left_s is not None and left_s <= 0:
        raise DeadlineExceeded("the request's deadline passed before it was taken in")
    return left_s


def _say(line: str) -> None:
    print(line, flush=True)  # a launcher waits for `ready:` at the other end of a pipe
