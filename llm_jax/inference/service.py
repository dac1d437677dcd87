"""Continuous batching: requests come and go between the steps of one engine, which one thread drives."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError
from llm_jax.inference.batch import Asked
from llm_jax.inference.draft import Wish
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.generation_config import SamplingDefaults
from llm_jax.inference.lookup import Lookup
from llm_jax.inference.request import Delta, InvalidRequest, SamplingParams, Unavailable
from llm_jax.inference.requests import POOLINGS, Listener, Request
from llm_jax.inference.scheduler import PENDING, Plan, Scheduler, Sequence
from llm_jax.inference.speculation import Throttle
from llm_jax.inference.statistics import Statistics
from llm_jax.inference.steps import RunningStep
from llm_jax.inference.text import TextStream

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A step on the device, its plan, and the requests it was made for."""

    plan: Plan
    running: RunningStep


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
                 scheduler: type[Scheduler] = Scheduler, max_wait_s: float | None = None, ageing_s: float = 30.0):
        """Starts the thread; the engine must be compiled.

        Args:
          engine: compiled engine, from now on this service's own.
          tokenizer: the model's.
          max_queue: most requests that may wait; one more is refused.
          defaults: how to sample where a request does not say.
          scheduler: the policy.
          max_wait_s: longest that a request may wait for its first step, seconds; None is for ever.
          ageing_s: a waiting request's priority grows by 1 in so many seconds.
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.ready_seconds = 0.0
        self.statistics = Statistics()
        self._max_queue = max_queue
        self._make_scheduler = lambda: engine.make_scheduler(max_queue, scheduler, max_wait_s=max_wait_s,
                                                             ageing_s=ageing_s)
        self._scheduler = self._make_scheduler()
        self._grammars: Any = None
        self._grammars_lock = threading.Lock()
        self._requests: dict[int, Request] = {}
        self._ids = itertools.count()
        self._changed = threading.Condition()  # guards everything above
        self._new_params: tuple[Any, list[BaseException | None]] | None = None
        self._draining = False
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_run(cls, run_dir: str, options: EngineConfig | None = None, *, max_queue: int = 256,
                 on_event: Callable[[str], None] = lambda line: None, **more: Any) -> Service:
        """Loads a run directory and compiles everything; ready when it returns.

        Args:
          run_dir: the run directory; it may be read-only.
          options: the engine's layout; None takes the defaults.
          max_queue: most requests that may wait.
          on_event: receives lines of progress.
          **more: other arguments of the service.
        Raises:
          UserError: the run directory is damaged, or the model or its cache does not fit.
        """
        from llm_jax import compile_cache, runs

        began = time.perf_counter()
        compile_cache.enable_compile_cache()
        run = runs.load(run_dir)
        defaults = run.sampling_defaults
        for note in defaults.notes:
            on_event(f"note: {note}")
        engine, tokenizer = run.engine(options or EngineConfig())
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
        requests = [self._request(prompt_ids, p, listener, priority, tenant, deadline_s)
                    for p, listener in zip(params, listeners, strict=True)]
        with self._changed:
            self._check_live()
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
            self._changed.notify_all()
        return [r.id for r in requests]

    def embed(self, prompt_ids: SequenceOf[int], pooling: str, listener: Listener, priority: int = 0) -> int:
        """Queues a request for the embedding of a text; it ends with one delta that carries it.

        Args:
          prompt_ids: tokens.
          pooling: "mean" or "last": of the model's normalised hidden states.
          listener, priority: as of `submit`.
        """
        if pooling not in POOLINGS:
            raise InvalidRequest(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")
        request = self._request(prompt_ids, SamplingParams(max_tokens=1), listener, priority, "", None)
        request.pooling, request.sequence.reuse = pooling, False
        with self._changed:
            self._check_live()
            self._scheduler.add(request.sequence)
            self._requests[request.id] = request
            self._changed.notify_all()
        return request.id

    def cancel(self, request_id: int) -> None:
        """Ends a request; its pages are free before the next step begins. Nothing happens if it has ended."""
        with self._changed:
            request = self._requests.get(request_id)
            if request is not None:
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
            return self.statistics.snapshot(self._scheduler, self.engine)

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
            for request in list(self._requests.values()):
                self._finish(request, Delta(finish_reason="cancelled"))
            self._changed.notify_all()
        self._thread.join()

    def _check_live(self) -> None:
        if not self.is_live:
            raise Unavailable("the server is shutting down and takes no new requests")

    def _request(self, prompt_ids: SequenceOf[int], params: SamplingParams, listener: Listener, priority: int,
                 tenant: str, deadline_s: float | None) -> Request:
        tokens = [int(t) for t in prompt_ids]
        vocabulary = self.engine.config.vocab_size
        if not tokens:
            raise InvalidRequest("the prompt is empty: it needs at least one token")
        for name, ids in (("token id", tokens), ("stop_ids:", params.stop_ids),
                          ("logit_bias:", [i for i, _ in params.logit_bias])):
            bad = next((t for t in ids if not 0 <= t < vocabulary), None)
            if bad is not None:
                raise InvalidRequest(f"{name} {bad} is outside the vocabulary (0 to {vocabulary - 1})")
        if deadline_s is not None and not deadline_s > 0:
            raise InvalidRequest(f"deadline_s must be more than 0, not {deadline_s}")
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(64))
        matcher = None if params.constraint is None else self._all_grammars().matcher(params.constraint)
        sequence = Sequence(next(self._ids), tokens, len(tokens), params.max_tokens, priority, tenant=tenant,
                            deadline=None if deadline_s is None else time.monotonic() + deadline_s,
                            needs_host=matcher is not None, reuse=params.prompt_logprobs is None)
        ends = frozenset(() if params.ignore_eos and matcher is None else self.tokenizer.end_ids)
        request = Request(sequence, params, TextStream(self.tokenizer, params.stop), listener,
                          ends | frozenset(params.stop_ids), matcher)
        if self.engine.wide_rows and matcher is None and not Asked(params, 0, 0).is_counted:
            request.throttle = Throttle(self.engine.policy)
            request.lookup = Lookup(tokens) if self.engine.draft is None else None
        return request

    def _all_grammars(self) -> Any:
        with self._grammars_lock:
            if self._grammars is None:  # seconds for a large vocabulary, and most services are never asked
                from llm_jax.inference.constraints import Grammars

                self._grammars = Grammars(self.tokenizer, self.engine.config.vocab_size)
            return self._grammars

    def _loop(self) -> None:
        flight: _Flight | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._requests or self._new_params)
                if self._closed:
                    return
            try:
                flight = self._turn(flight)
            except Exception as error:  # noqa: BLE001 - a failed step must not end the service
                log.exception("a step failed")
                flight = None
                self._fail_all(error)

    def _turn(self, flight: _Flight | None) -> _Flight | None:
        """Sends the next step, then reads the one before it; returns the step that is under way now."""
        with self._changed:
            speculates = self._decide_on_speculation()
            in_order = speculates or self._new_params is not None or any(
                r.sequence.needs_host for r in self._requests.values())
        if in_order and flight is not None:
            self._land(flight)
            flight = None
        with self._changed:
            self._take_new_params()
            self._expire()
            if speculates:
                self._propose()
            plan = self._scheduler.schedule()
            prepared = None
            if plan is not None:
                # Under the lock: a cancel may take the sequences' pages while the step runs.
                prepared = self._prepare(plan)
                self._scheduler.dispatched(plan)
            elif flight is None and self._requests:
                self._changed.wait(0.01)  # nothing can run before something changes
        following = None
        if plan is not None and prepared is not None:
            following = _Flight(plan, self.engine.dispatch(prepared))
        if flight is not None:
            self._land(flight)
        return following

    def _decide_on_speculation(self) -> bool:
        """Whether tokens are proposed in the coming step; if so, it has to wait for the one before."""
        running = self._scheduler.running
        if not self.engine.wide_rows:
            return False
        fits = 0 < len(running) <= self.engine.wide_rows
        for sequence in running:
            request = self._requests[sequence.id]
            request.wanted = request.throttle.proposals(
                len(running), sequence.max_tokens - sequence.num_generated) if (
                fits and request.throttle is not None and request.may_speculate) else 0
            sequence.needs_host = request.matcher is not None or request.wanted > 0
        return fits and any(self._requests[s.id].wanted for s in running)

    def _propose(self) -> None:
        wishes: list[Wish] = []
        for sequence in self._scheduler.running:
            request = self._requests[sequence.id]
            sequence.proposal = []
            if not request.wanted or sequence.remaining != 1 or sequence.tokens[-1] == PENDING:
                continue
            if request.lookup is not None:
                sequence.proposal = request.lookup.propose(request.wanted)
            elif count := self._scheduler.reserve(sequence, request.wanted):
                wishes.append(Wish(sequence, request.asked(), count))
        if self.engine.draft is not None:
            for wish, tokens in zip(wishes, self.engine.draft.propose(wishes), strict=True):
                wish.sequence.proposal = tokens

    def _prepare(self, plan: Plan) -> Any:
        requests = self._requests
        drawing = [requests[c.sequence.id] for c in plan if c.samples]
        scores = {c.sequence.id: c.sequence.tokens[:c.sequence.num_prompt] for c in plan.prefill
                  if requests[c.sequence.id].wants_scores}
        hidden = {c.sequence.id for c in plan if requests[c.sequence.id].pooling is not None}
        self.statistics.planned(plan)
        return self.engine.prepare(plan, {r.id: r.asked() for r in drawing}, scores=scores, hidden=hidden)

    def _land(self, flight: _Flight) -> None:
        """Reads a step's results and tells the listeners."""
        results = self.engine.collect(flight.running)
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
                    ends[i], taken = request.advance(self._checked(request, drawn))
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

    def _checked(self, request: Request, drawn: Any) -> Any:
        """The draws that count: up to the first that differs from what was proposed."""
        proposal = request.sequence.proposal
        if len(drawn.tokens) == 1:
            return drawn
        right = next((k for k, token in enumerate(proposal[:len(drawn.tokens) - 1]) if token != drawn.tokens[k]),
                     len(drawn.tokens) - 1)
        assert request.throttle is not None
        request.throttle.update(len(drawn.tokens) - 1, right)
        self.statistics.checked(len(drawn.tokens) - 1, right)
        return dataclasses.replace(drawn, tokens=drawn.tokens[:right + 1])

    def _expire(self) -> None:
        for sequence in self._scheduler.expired():
            request = self._requests.get(sequence.id)
            if request is not None:
                self._finish(request, Delta(text=request.text.flush(), finish_reason="deadline"))

    def _take_new_params(self) -> None:
        if self._new_params is None:
            return
        params, done = self._new_params
        try:
            self.engine.set_params(params)
            self._scheduler.restart()
            self._scheduler.forget_prefixes()
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
            if request.id in self._requests:
                del self._requests[request.id]
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
