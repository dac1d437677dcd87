"""The engine as a service: one thread that steps it, requests that come and go from other threads."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.inference.engine import Engine, EngineConfig
from llm_jax.inference.generation_config import SamplingDefaults
from llm_jax.inference.pages import PagePool
from llm_jax.inference.request import Delta, InvalidRequest, SamplingParams, Unavailable, Usage
from llm_jax.inference.scheduler import Plan, Scheduler, Sequence
from llm_jax.inference.text import TextStream

log = logging.getLogger(__name__)

Listener = Callable[[Delta], None]


@dataclasses.dataclass
class _Request:
    sequence: Sequence
    params: SamplingParams
    text: TextStream
    listener: Listener
    completion_tokens: int = 0


class Service:
    """Completions from one engine.

    `submit` and `cancel` may be called from any thread; listeners are called from the engine's thread, in order, the
    last delta of each request having a `finish_reason`. A listener must not block: every request waits for it.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, max_queue: int = 256,
                 defaults: SamplingDefaults = SamplingDefaults()):  # noqa: B008 (frozen)
        """Starts the thread; the engine must be compiled.

        Args:
          engine: compiled engine, from now on this service's own.
          tokenizer: the model's.
          max_queue: most requests that may wait; one more is refused.
          defaults: how to sample where a request does not say.
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.ready_seconds = 0.0
        self._max_queue = max_queue
        self._scheduler = self._make_scheduler()
        self._requests: dict[int, _Request] = {}
        self._ids = itertools.count()
        self._changed = threading.Condition()  # guards everything above
        self._draining = False
        self._closed = False
        self._tokens = 0
        self._most_rows = 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_run(cls, run_dir: str, options: EngineConfig | None = None, *, max_queue: int = 256,
                 on_event: Callable[[str], None] = lambda line: None) -> Service:
        """Loads a run directory and compiles everything; ready when it returns.

        Args:
          run_dir: the run directory; it may be read-only.
          options: the engine's layout; None takes the defaults.
          max_queue: most requests that may wait.
          on_event: receives lines of progress.
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
                 f"{g.num_pages} pages of {g.page_size} tokens ({time.perf_counter() - began:.1f} s)")
        engine.compile(on_event)
        service = cls(engine, tokenizer, max_queue=max_queue, defaults=defaults)
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

    def submit(self, prompt_ids: SequenceOf[int], params: SamplingParams, listener: Listener,
               priority: int = 0) -> int:
        """Queues a request and returns its id.

        Args:
          prompt_ids: tokens, BOS included if the model wants one; at least one.
          params: how to draw.
          listener: receives the deltas.
          priority: higher goes first.
        Raises:
          InvalidRequest: no prompt, or ids outside the vocabulary.
          PromptTooLong, QueueFull, Unavailable: as they say.
        """
        tokens = [int(t) for t in prompt_ids]
        vocabulary = self.engine.config.vocab_size
        if not tokens:
            raise InvalidRequest("the prompt is empty: it needs at least one token")
        bad = next((t for t in tokens if not 0 <= t < vocabulary), None)
        if bad is not None:
            raise InvalidRequest(f"token id {bad} is outside the vocabulary (0 to {vocabulary - 1})")
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(64))
        with self._changed:
            if not self.is_live:
                raise Unavailable("the server is shutting down and takes no new requests")
            sequence = Sequence(next(self._ids), tokens, len(tokens), params.max_tokens, priority)
            self._scheduler.add(sequence)
            self._requests[sequence.id] = _Request(sequence, params, TextStream(self.tokenizer, params.stop), listener)
            self._changed.notify_all()
            return sequence.id

    def cancel(self, request_id: int) -> None:
        """Ends a request; its pages are free before the next step begins. Nothing happens if it has ended."""
        with self._changed:
            request = self._requests.get(request_id)
            if request is not None:
                self._finish(request, Delta(finish_reason="cancelled"))

    def stats(self) -> dict[str, int]:
        """Counts: requests running and waiting, pages used and in all, slots of used pages that hold nothing, steps,
        tokens drawn, preemptions, most requests seen in one step."""
        with self._changed:
            s = self._scheduler
            return {"running": len(s.running), "waiting": len(s.waiting), "pages_used": s.pool.num_used,
                    "pages_total": s.pool.num_pages, "wasted_slots": s.wasted_slots(),
                    "steps": self.engine.num_steps, "tokens": self._tokens, "preemptions": s.preemptions,
                    "most_rows": self._most_rows}

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

    def _make_scheduler(self) -> Scheduler:
        e = self.engine
        return Scheduler(PagePool(e.geometry.num_pages, e.geometry.page_size), max_rows=e.options.max_rows,
                         prefill_rows=e.options.prefill_rows, chunk=e.options.chunk, max_context=e.max_context,
                         max_queue=self._max_queue)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._requests)
                if self._closed:
                    return
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 - a failed step must not end the service
                log.exception("a step failed")
                self._fail_all(error)

    def _step(self) -> None:
        with self._changed:
            plan = self._scheduler.schedule()
            if plan is None:
                return
            params = {c.sequence.id: self._requests[c.sequence.id].params for c in plan}
            self._most_rows = max(self._most_rows, len(params))
            step = self.engine.prepare(plan, params)  # here: a cancel may take the sequences' pages while it runs
        drawn = self.engine.execute(step)
        with self._changed:
            self._deliver(plan, drawn)

    def _deliver(self, plan: Plan, drawn: dict[int, tuple[int, float]]) -> None:
        # A request cancelled during the step is gone from the scheduler; its chunk is passed over.
        alive = Plan(*(tuple(c for c in chunks if c.sequence.id in self._requests)
                       for chunks in (plan.decode, plan.prefill)))
        sampling = [c.sequence.id for c in alive if c.samples]
        self._scheduler.commit(alive, {i: token for i, (token, _) in drawn.items()})
        for request_id in sampling:
            request = self._requests.get(request_id)
            if request is not None:  # a listener may have cancelled another request
                self._advance(request, *drawn[request_id])

    def _advance(self, request: _Request, token: int, logprob: float) -> None:
        self._tokens += 1
        if token in self.tokenizer.end_ids and not request.params.ignore_eos:
            self._finish(request, Delta(text=request.text.flush(), finish_reason="stop"))
            return
        request.completion_tokens += 1
        delta = Delta(request.text.push(token), (token,), (logprob,))
        if request.text.stopped:
            self._finish(request, dataclasses.replace(delta, finish_reason="stop"))
        elif request.sequence.num_generated >= request.sequence.max_tokens:
            text = delta.text + request.text.flush()
            # The last characters, released only now, may complete a stop string.
            reason = "stop" if request.text.stopped else "length"
            self._finish(request, dataclasses.replace(delta, text=text, finish_reason=reason))
        else:
            self._tell(request, delta)

    def _finish(self, request: _Request, delta: Delta) -> None:
        del self._requests[request.sequence.id]
        self._scheduler.remove(request.sequence)
        self._tell_last(request, delta)
        self._changed.notify_all()

    def _tell_last(self, request: _Request, delta: Delta) -> None:
        usage = Usage(request.sequence.num_prompt, request.completion_tokens)
        self._tell(request, dataclasses.replace(delta, usage=usage))

    def _tell(self, request: _Request, delta: Delta) -> None:
        try:
            request.listener(delta)
        except Exception:  # noqa: BLE001 - a listener's fault is its request's alone
            log.exception("the listener of request %d failed; the request is dropped", request.sequence.id)
            if request.sequence.id in self._requests:
                del self._requests[request.sequence.id]
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
