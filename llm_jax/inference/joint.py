"""One service of several processes, whose devices share each step."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence as SequenceOf
from typing import Any

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError
from llm_jax.inference.engine import Engine
from llm_jax.inference.lockstep import Disconnected, Lockstep, alike, params_from_json, params_to_json
from llm_jax.inference.request import Delta, Unavailable
from llm_jax.inference.requests import Request
from llm_jax.inference.scheduler import Plan
from llm_jax.inference.service import Service
from llm_jax.inference.speculation import Policy


class JointService(Service):
    """A `Service` over an engine whose mesh spans processes (`EngineConfig.tensor` is the number of all devices).

    Every process makes one, of the same run directory with the same options. Process 0's takes requests; the others
    refuse them, and `join` waits until process 0 closes its own. Each has a scheduler, and all schedulers do the same:
    they are told the same requests, cancellations and times before the same step, from which, with the tokens drawn,
    all that they do follows. (The prefix cache's hashes differ from process to process; which of them are equal does
    not.) So every process sends its devices the same steps.

    A step that fails, or a process that ends, ends the service on all processes: what the others have computed by then
    can't be known. New weights are not taken while it runs.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, host: str | None = None, **options: Any):
        """Meets the other processes, and starts.

        Args:
          engine, tokenizer, options: as of `Service`.
          host: see `Lockstep`.
        Raises:
          UserError: a process can't be reached, or serves with other options than process 0.
        """
        mine = {"model": engine.config, "engine": (engine.options, engine.geometry), "service": sorted(options.items())}
        differing = [what for what, value in mine.items() if not alike(value)]
        if differing:
            raise UserError(f"the processes differ in the options of the {' and the '.join(differing)}; here these are "
                            f"{', '.join(str(mine[what]) for what in differing)}")
        self.failure = ""  # why the service has ended, unless it was closed
        self._line = Lockstep(host)
        self._events: list[dict[str, Any]] = []  # what the next turn begins with
        self._entering: dict[int, Request] = {}  # requests among them
        # It is measured, so each process has found another.
        engine.policy = Policy(**self._line.agree(dataclasses.asdict(engine.policy)))
        super().__init__(engine, tokenizer, clock=self._line.clock, **options)

    def cancel(self, request_id: int) -> None:
        """Ends a request before the next step. Nothing happens if it has ended."""
        with self._changed:
            if request_id in self._requests or request_id in self._entering:
                self._events.append({"cancel": request_id})
                self._changed.notify_all()

    def replace_weights(self, params: Any) -> None:
        """UserError."""
        raise UserError("a service of several processes takes no new weights; start it anew with them")

    def wait_drained(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is under way; False if that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._requests and not self._entering, timeout_s)

    def join(self) -> None:
        """Waits until the service has ended: on all processes but process 0, all there is to do."""
        self._thread.join()

    def close(self) -> None:
        """Cancels what is under way and ends the service on all processes."""
        if not self._line.leads:
            self._line.close()  # on which this thread waits
        super().close()
        self._line.close()
        with self._changed:
            for request in self._entering.values():
                self._tell_last(request, Delta(finish_reason="cancelled"))
            self._entering = {}

    def _check_live(self) -> None:
        if not self._line.leads:
            raise Unavailable("of several processes that serve together, process 0 takes the requests")
        super()._check_live()

    def _under_way(self) -> int:
        return super()._under_way() + len(self._entering)

    def _enter(self, requests: SequenceOf[Request]) -> None:
        scheduler = self._scheduler
        for request in requests:
            scheduler.check(request.sequence.num_prompt)
        for request in requests:
            s = request.sequence
            self._entering[s.id] = request
            self._events.append({"id": s.id, "tokens": s.tokens, "params": params_to_json(request.params),
                                 "priority": int(s.priority), "tenant": s.tenant, "deadline": s.deadline,
                                 "pooling": request.pooling})

    def _has_work(self) -> bool:
        return not self._line.leads or bool(self._events) or super()._has_work()

    def _loop(self) -> None:
        super()._loop()
        if self._line.leads and not self._line.closed:
            with contextlib.suppress(Disconnected):
                self._line.exchange([{"stop": True}], time.monotonic())

    def _hold(self, flight: Any) -> None:
        if self._line.leads:  # the others wait for what it says
            super()._hold(flight)

    def _turn(self, flight: Any) -> Any:
        with self._changed:
            events, self._events = self._events, []
        events = self._line.exchange(events, time.monotonic())
        with self._changed:
            for event in events:
                self._apply(event)
            if self._closed and not self._line.leads:
                return None
        return super()._turn(flight)

    def _apply(self, event: dict[str, Any]) -> None:
        """Does what has happened; every process does it at this point."""
        if "stop" in event:
            self._closed = True
        elif "cancel" in event:
            request = self._requests.get(event["cancel"])
            if request is not None:
                self._finish(request, Delta(finish_reason="cancelled"))
        else:
            request = self._entering.pop(event["id"], None) or self._followed(event)
            self._scheduler.add(request.sequence)
            self._requests[request.id] = request

    def _followed(self, event: dict[str, Any]) -> Request:
        """A request as process 0 has it, without anybody who listens."""
        request = self._intake.request(event["id"], event["tokens"], params_from_json(event["params"]),
                                       lambda delta: None, event["priority"], event["tenant"], None)
        request.pooling = event["pooling"]
        request.sequence.deadline = event["deadline"]
        request.sequence.reuse = request.sequence.reuse and request.pooling is None
        return request

    def _prepare(self, plan: Plan) -> Any:
        self._line.planned(plan)
        return super()._prepare(plan)

    def _drop(self, request: Request) -> None:
        self.cancel(request.id)

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            self._closed = True
            self.failure = self.failure or str(error)
            self._line.close()
            failed, self._requests = [*self._requests.values(), *self._entering.values()], {}
            self._entering = {}
            for request in failed:
                self._tell_last(request, Delta(finish_reason="cancelled", error=f"the service has ended: {error}"))
            self._changed.notify_all()
