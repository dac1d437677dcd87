"""Continuous batching: requests come and go between the steps of one engine, which one thread drives."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.generation_config import SamplingDefaults
from llm_jax.inference.intake import Intake, deadline_of
from llm_jax.inference.pace import Pace
from llm_jax.inference.proposing import Proposer
from llm_jax.inference.request import Delta, InvalidRequest, QueueFull, SamplingParams, Unavailable
from llm_jax.inference.requests import POOLINGS, Listener, Request
from llm_jax.inference.scheduler import Plan, Scheduler
from llm_jax.inference.statistics import Statistics
from llm_jax.inference.steps import Flight

log = logging.getLogger(__name__)


class Service:
    """Completions from one engine.

    `submit` and `cancel` may be called from any thread; listeners are called from the engine's thread, in order, the
    last delta of each request having a `finish_reason`. A listener must not block: every request waits for it.

    While the device runs a step, the next is planned and sent, and only then are the first one's tokens read, so that
    the device does not wait for Python. A request that ends is found out one step late; what that step drew for it is
    dropped. Where a request's next step depends on its last token (a constraint, proposed tokens), the steps follow one
    another instead.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, max_queue: int = 256,
                 defaults: SamplingDefaults = SamplingDefaults(),  # noqa: B008 (frozen)
                 scheduler: type[Scheduler] = Scheduler, max_wait_s: float | None = None, ageing_s: float = 30.0,
                 clock: Callable[[], float] = time.monotonic):
        """Starts the thread; the engine must be compiled.

        Args:
          engine: compiled engine, from now on this service's own.
          tokenizer: the model's.
          max_queue: most requests that may wait; one more is refused.
          defaults: how to sample where a request does not say.
          scheduler: the policy.
          max_wait_s: longest that a request may wait for its first step, seconds; None is for ever.
          ageing_s: a waiting request's priority grows by 1 in so many seconds.
          clock: seconds, as the scheduler is to see them.
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.ready_seconds = 0.0
        self.weights_version = 0  # how often they were replaced
        self.statistics = Statistics()
        self._max_queue = max_queue
        self._make_scheduler = lambda: engine.make_scheduler(max_queue, scheduler, max_wait_s=max_wait_s,
                                                             ageing_s=ageing_s, clock=clock)
        self._scheduler = self._make_scheduler()
        self._intake = Intake(engine, tokenizer)
        self._proposer = Proposer(engine)
        self._pace = Pace()
        self._requests: dict[int, Request] = {}
        self._coming = 0  # requests that are taken in: a grammar may take seconds to compile
        self._ids = itertools.count()
        self._changed = threading.Condition()  # guards everything above
        self._new_params: tuple[Any, list[BaseException | None]] | None = None
        self._draining = False
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_run(cls, run_dir: str, options: EngineConfig | None = None, *, draft_run_dir: str | None = None,
                 step: int | str | None = None, max_queue: int = 256,
                 on_event: Callable[[str], None] = lambda line: None, **more: Any) -> Service:
        """Loads a run directory and compiles everything; ready when it returns.

        Args:
          run_dir: the run directory; it may be read-only.
          options: the engine's layout; None takes the defaults.
          draft_run_dir: of a smaller model with the same tokenizer, which proposes tokens.
          step: which checkpoint, as `runs.load` takes it.
          max_queue: most requests that may wait.
          on_event: receives lines of progress.
          **more: other arguments of the service.
        Raises:
          UserError: the run directory is damaged, or the model or its cache does not fit.
        """
        from llm_jax import compile_cache, runs

        began = time.perf_counter()
        compile_cache.enable_compile_cache()
        run = runs.load(run_dir, step)
        defaults = run.sampling_defaults
        for note in defaults.notes:
            on_event(f"note: {note}")
        engine, tokenizer = run.engine(options or EngineConfig(), draft_run_dir)
        g = engine.geometry
        on_event(f"loaded {run_dir}: {engine.config.num_params():,} parameters in {engine.dtype}, cache of "
                 f"{g.num_pages} pages of {g.page_size} tokens in {engine.cache_dtype} "
                 f"({time.perf_counter() - began:.1f} s)")
        engine.compile(on_event)
        service = cls(engine, tokenizer, max_queue=max_queue, defaults=defaults, **more)
        service.ready_seconds = time.perf_counter() - began
        return service

    @property
    def max_context(self) -> int:
        """Longest sequence, prompt and completion, in tokens."""
        return self._scheduler.max_context

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt, in tokens."""
        return self._scheduler.max_prompt

    @property
    def max_requests(self) -> int:
        """Requests that may run and wait together; more at once are always refused."""
        return self._max_queue + self.engine.options.max_rows

    @property
    def is_live(self) -> bool:
        """Whether new requests are taken."""
        return not self._draining and not self._closed and self._thread.is_alive()

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of a prompt, with BOS in front if the model expects one, unless told otherwise."""
        return self.tokenizer.prompt_ids(text) if add_bos else self.tokenizer.encode(text)

    def submit(self, prompt_ids: SequenceOf[int], params: SamplingParams, listener: Listener, priority: int = 0, *,
               tenant: str = "", deadline_s: float | None = None) -> int:
        """Queues a request and returns its id.

        Args:
          prompt_ids: tokens, BOS included if the model wants one; at least one.
          params: how to draw.
          listener: receives the deltas.
          priority: higher goes first.
          tenant: whose request it is; pages of the prefix cache are reused within a tenant.
          deadline_s: seconds from now after which it ends with "deadline", whatever it has; None is never.
        Raises:
          InvalidRequest: no prompt, ids outside the vocabulary, or a constraint that is none.
          PromptTooLong, QueueFull, Unavailable: as they say.
        """
        return self.submit_samples(prompt_ids, [params], [listener], priority, tenant=tenant, deadline_s=deadline_s)[0]

    def submit_samples(self, prompt_ids: SequenceOf[int], params: SequenceOf[SamplingParams],
                       listeners: SequenceOf[Listener], priority: int = 0, *, tenant: str = "",
                       deadline_s: float | None = None) -> list[int]:
        """Queues several completions of one prompt, all or none of them; the prompt is computed once.

        Arguments as of `submit`, with parameters (`sample` set in each) and a listener for each. Returns their ids.
        """
        deadline = deadline_of(deadline_s)
        requests = self._take_in(len(params), lambda: [
            self._intake.request(next(self._ids), prompt_ids, p, listener, priority, tenant, deadline)
            for p, listener in zip(params, listeners, strict=True)])
        return [r.id for r in requests]

    def embed(self, prompt_ids: SequenceOf[int], pooling: str, listener: Listener, priority: int = 0) -> int:
        """Queues a request for the embedding of a text; it ends with one delta that carries it.

        Args:
          prompt_ids: tokens.
          pooling: "mean" or "last": of the model's normalised hidden states.
          listener, priority: as of `submit`.
        """
        if pooling not in POOLINGS:
            raise InvalidRequest(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}", "pooling")

        def make() -> list[Request]:
            request = self._intake.request(next(self._ids), prompt_ids, SamplingParams(max_tokens=1), listener,
                                           priority, "", None)
            request.pooling, request.sequence.reuse = pooling, False
            return [request]

        return self._take_in(1, make)[0].id

    def cancel(self, request_id: int) -> None:
        """Ends a request; its pages are free before the next step begins. Nothing happens if it has ended."""
        with self._changed:
            if (request := self._requests.get(request_id)) is not None:
                self._finish(request, Delta(finish_reason="cancelled"))

    def replace_weights(self, params: Any) -> None:
        """Serves other weights of the same model from the next step on, without a restart.

        What runs goes on with the tokens it has, computed anew; the prefix cache is dropped. Returns when it is done.

        Args:
          params: stacked or per layer.
        Raises:
          UserError: they are not of this model; nothing has changed.
          Unavailable: the service is closed.
        """
        done: list[BaseException | None] = []
        with self._changed:
            self._changed.wait_for(lambda: self._new_params is None or self._closed)
            if self._closed:
                raise Unavailable("the server is closed")
            self._new_params = (params, done)
            self._changed.notify_all()
            self._changed.wait_for(lambda: done or self._closed)
            if not done:
                raise Unavailable("the server was closed before it took the new weights")
        if done[0] is not None:
            raise done[0]

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and what is under way: see `Statistics.snapshot`."""
        with self._changed:
            return self.statistics.snapshot(self._scheduler, self.engine, self._proposer.total)

    def begin_drain(self) -> None:
        """From now on new requests are refused; those under way go on."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def wait_drained(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is under way; False if that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._requests, timeout_s)

    def close(self) -> None:
        """Cancels what is under way and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            for request in list(self._requests.values()):
                self._finish(request, Delta(finish_reason="cancelled"))

    def _take_in(self, count: int, make: Callable[[], SequenceOf[Request]]) -> SequenceOf[Request]:
        """Queues the requests that `make` makes; meanwhile they count like those that wait.

        Raises:
          QueueFull: there are not so many places, before `make` has been called.
          Unavailable: the service takes none.
        """
        with self._changed:
            self._check_live()
            under_way = self._under_way() + self._coming
            if under_way + count > self.max_requests:
                raise QueueFull(f"{under_way} requests run and wait already, of at most {self.max_requests}; try again "
                                "later")
            self._coming += count
        try:
            requests = make()
        except BaseException:
            with self._changed:
                self._coming -= count
            raise
        with self._changed:
            self._coming -= count
            self._check_live()
            self._enter(requests)
            self._changed.notify_all()
        return requests

    def _under_way(self) -> int:
        """Requests that have, or wait for, a row; called under the lock."""
        return len(self._scheduler.waiting) + len(self._scheduler.running)

    def _enter(self, requests: SequenceOf[Request]) -> None:
        """Queues all of them or raises; called under the lock."""
        added: list[Request] = []
        try:
            for request in requests:
                self._scheduler.add(request.sequence)
                added.append(request)
        except UserError:
            for request in added:
                self._scheduler.remove(request.sequence)
            raise
        self._requests |= {r.id: r for r in requests}

    def _has_work(self) -> bool:
        return bool(self._requests) or self._new_params is not None

    def _check_live(self) -> None:
        if not self.is_live:
            raise Unavailable("the server is shutting down and takes no new requests")

    def _loop(self) -> None:
        flight: Flight | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._has_work())
                if self._closed:
                    return
            try:
                if flight is not None:
                    self._hold(flight)
                flight = self._turn(flight)
            except Exception as error:  # noqa: BLE001 - a failed step must not end the service
                log.exception("a step failed")
                flight = None
                self._pace = Pace()
                self._fail_all(error)

    def _hold(self, flight: Flight) -> None:
        """Waits while the device is busy with `flight` anyway: who comes now has a place in the next step."""
        shape = flight.running.step.shape
        if (seconds := self._pace.hold_s(shape)) > 0.0:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, seconds)
            if flight.running.is_done():
                self._pace.overslept(shape)

    def _turn(self, flight: Flight | None) -> Flight | None:
        """Sends the next step, then reads the one before it; returns the step that is under way now."""
        began = time.monotonic()
        with self._changed:
            speculates = self._proposer.decide(self._running())
            in_order = speculates or self._new_params is not None or any(
                r.sequence.needs_host for r in self._requests.values())
        if in_order and flight is not None:
            self._land(flight)
            flight = None
        with self._changed:
            self._take_new_params()
            self._expire()
            if speculates:
                self._proposer.propose(self._running(), self._scheduler)
            plan = self._scheduler.schedule()
            prepared = None
            if plan is not None:
                # Under the lock: a cancel may take the sequences' pages while the step runs.
                prepared = self._prepare(plan)
                self._scheduler.dispatched(plan)
            elif flight is None and self._requests:
                self._changed.wait(0.01)  # nothing can run before something changes
        following = Flight(plan, self.engine.dispatch(prepared)) if plan is not None and prepared is not None else None
        if following is not None:
            self._pace.sent(time.monotonic() - began)
        if flight is not None:
            self._land(flight)
        return following

    def _running(self) -> list[Request]:
        """The requests that tokens may be proposed for; none where nobody proposes."""
        return [self._requests[s.id] for s in self._scheduler.running] if self.engine.wide_rows else []

    def _prepare(self, plan: Plan) -> Any:
        requests, now = self._requests, time.monotonic()
        for c in plan:
            if requests[c.sequence.id].started is None:
                requests[c.sequence.id].started = now
        drawing = [requests[c.sequence.id] for c in plan if c.samples]
        scores = {c.sequence.id: c.sequence.tokens[:c.sequence.num_prompt] for c in plan.prefill
                  if requests[c.sequence.id].wants_scores}
        hidden = {c.sequence.id for c in plan if requests[c.sequence.id].pooling is not None}
        self.statistics.planned(plan)
        return self.engine.prepare(plan, {r.id: r.asked() for r in drawing}, scores=scores, hidden=hidden)

    def _land(self, flight: Flight) -> None:
        """Reads a step's results and tells the listeners."""
        results = self.engine.collect(flight.running)
        self._pace.landed(flight.running.step.shape)
        with self._changed:
            starts = {c.sequence.id: c.start for c in flight.plan}
            for i, found in results.scores.items():
                if i in self._requests:
                    self._requests[i].scored(found, starts[i])
            for i, hidden_TD in results.hidden.items():
                if i in self._requests:
                    self._requests[i].computed(hidden_TD, starts[i])
            accepted = {}
            ends: dict[int, Delta] = {}
            for i, drawn in results.drawn.items():
                request = self._requests.get(i)
                if request is not None:
                    ends[i], taken = request.advance(self._proposer.checked(request, drawn))
                    accepted[i] = list(drawn.tokens[:taken])
            self._scheduler.resolve(flight.plan, accepted)
            self.statistics.drew(sum(map(len, accepted.values())))
            for i, delta in ends.items():
                request = self._requests.get(i)
                if request is None:  # a listener may have cancelled another request
                    continue
                if request.pooling is not None:
                    self._finish(request, Delta(finish_reason="stop", embedding=request.embedding()))
                elif delta.finish_reason is not None:
                    self._finish(request, delta)
                elif delta.token_ids or delta.prompt_logprobs:
                    self._tell(request, delta)

    def _expire(self) -> None:
        for sequence in self._scheduler.expired():
            if (request := self._requests.get(sequence.id)) is not None:
                self._finish(request, Delta(text=request.text.flush(), finish_reason="deadline"))

    def _take_new_params(self) -> None:
        if self._new_params is None:
            return
        params, done = self._new_params
        try:
            self.engine.set_params(params)
            self._scheduler.restart()
            self._scheduler.forget_prefixes()
            self.weights_version += 1
            done.append(None)
        except Exception as error:  # noqa: BLE001 - it is the caller's
            done.append(error)
        self._new_params = None
        self._changed.notify_all()

    def _finish(self, request: Request, delta: Delta) -> None:
        del self._requests[request.id]
        self._scheduler.remove(request.sequence)
        self._tell_last(request, delta)
        self._changed.notify_all()

    def _tell_last(self, request: Request, delta: Delta) -> None:
        self._tell(request, dataclasses.replace(delta, usage=request.usage()))

    def _tell(self, request: Request, delta: Delta) -> None:
        try:
            request.listener(delta)
        except Exception:  # noqa: BLE001 - a listener's fault is its request's alone
            log.exception("the listener of request %d failed; the request is dropped", request.id)
            self._drop(request)

    def _drop(self, request: Request) -> None:
        if self._requests.pop(request.id, None) is not None:
            self._scheduler.remove(request.sequence)

    def _fail_all(self, error: Exception) -> None:
        """Ends every request and starts anew: the cache went with the donated pools, the bookkeeping may be torn."""
        with self._changed:
            failed, self._requests = self._requests, {}
            self._scheduler = self._make_scheduler()
            for request in failed.values():
                self._tell_last(request, Delta(finish_reason="error",
                                               error=f"the step failed: {type(error).__name__}: {error}"))
            self._changed.notify_all()
            try:
                self.engine.reset()
            except Exception:  # noqa: BLE001 - there is nothing left to serve with, and everyone has been told
                log.exception("the engine could not be restarted; the service is closed")
                self._closed = True
