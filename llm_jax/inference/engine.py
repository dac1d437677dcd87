"""The device side of serving: weights, page pools and the compiled programs. What to run, the scheduler decides."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import UserError
from llm_jax.inference import lockstep, memory, penalties, programs
from llm_jax.inference.batch import (
    Asked,
    Geometry,
    StepBatch,
    StepShape,
    build,
    choose_shape,
    extras,
    sampling_batch,
    visible_keys,
)
from llm_jax.inference.draft import Draft
from llm_jax.inference.engine_config import EngineConfig, default_dtype, step_shapes, wide_rows
from llm_jax.inference.host_pages import HostPages
from llm_jax.inference.pages import PagePool
from llm_jax.inference.placement import Placement
from llm_jax.inference.programs import Pools
from llm_jax.inference.request import PromptLogprob
from llm_jax.inference.scheduler import Plan, Scheduler
from llm_jax.inference.speculation import Policy
from llm_jax.inference.steps import Drawn, PreparedStep, RunningStep, Score, StepResults
from llm_jax.kernels.backends import choose_backend, make_pools
from llm_jax.models import Decoder, Execution, ModelConfig, unstack
from llm_jax.models.latent_attention import absorbed

# Leaves that stay in float32 (a bfloat16 import is widened, which changes nothing): rounding them would send tokens to
# other experts.
ROUTING = ("router", "selection_bias")


class Engine:
    """Weights and pools on the device; `prepare`, `dispatch` and `collect` carry out one plan."""

    def __init__(self, config: ModelConfig, params: Any, options: EngineConfig, *,
                 available_bytes: int | None = None, free_params: bool = False,
                 devices: Sequence[jax.Device] | None = None, draft: tuple[ModelConfig, Any] | None = None):
        """Lays out weights and pools; `compile` must be called before `dispatch`.

        Args:
          config: the model's.
          params: its parameters, stacked or per layer; arrays of the engine's dtype are used as they are, others are
            cast (but for `ROUTING`).
          options: see `EngineConfig`.
          available_bytes: memory for the pages; default what is free.
          free_params: whether the stacked arrays may be deleted as they are taken apart, so that the weights are never
            there twice.
          devices: what `options.tensor` takes its devices from; default all.
          draft: a smaller model, and its parameters, that proposes up to `options.max_proposed` tokens; without one
            they are looked up in the sequence itself.
        Raises:
          UserError: the pages do not fit, the context is longer than the model's, the devices are too few, or it does
            not generate text.
        """
        check_generates(config)
        self.options = options
        self.config = config
        self.dtype = options.dtype or default_dtype()
        self.cache_dtype = options.cache_dtype or self.dtype
        self.max_context = options.max_context or config.max_context
        if self.max_context > config.longest_context:
            raise UserError(f"max_context={self.max_context} is more than the model's {config.longest_context}")
        # With the rope context fixed, a token's keys do not depend on how long its sequence becomes.
        self.model = Decoder(config, Execution(dtype=self.dtype, scan_layers=False, rope_context=self.max_context))
        self.placement = Placement(config, options.tensor, devices, backend=self._backend())
        self.params = self.placement.params(_serving_params(config, params, self.dtype, free_params))
        self.shapes = step_shapes(options)
        beside = 0 if draft is None else memory.page_bytes(draft[0], options.page_size, self.cache_dtype)
        num_pages = memory.plan_pages(
            config, beside=beside, page_size=options.page_size, dtype=self.cache_dtype, max_context=self.max_context,
            max_rows=options.max_rows, requested=options.num_pages, backend=self._backend(),
            devices=self.placement.pool_parts,
            available=lockstep.least(memory.free_bytes() if available_bytes is None else available_bytes))
        self.geometry = Geometry(
            num_pages, options.page_size, options.chunk, -(-self.max_context // options.page_size),
            num_slots=options.max_rows, vocab_size=config.vocab_size, backend=self._backend(),
            deterministic=options.deterministic, **visible_keys(config))
        self.wide_rows = wide_rows(options)
        self.policy = Policy(options.max_proposed)  # measured by `compile`
        self.draft: Draft | None = None
        if draft is not None:
            check_generates(draft[0])
            if not options.max_proposed:
                raise UserError("a draft model proposes nothing with max_proposed=0; set it to 3 or so")
            self.draft = Draft(
                draft[0], _serving_params(*draft, self.dtype, free_params), config, self.geometry, dtype=self.dtype,
                cache_dtype=self.cache_dtype, max_context=self.max_context, rows=sorted({1, self.wide_rows}),
                most=options.max_proposed, tensor=options.tensor, devices=devices, backend=self._backend(draft[0]))
        self.pools: Pools = []
        self._last_S: Any = None
        self._counts: Any = None
        self.reset()
        # Rooms on the host for the pages of the pools, and of the draft's, which move with them.
        self._swaps = [(HostPages(options.swap_pages, holder.pools, num_pages, holder.geometry.backend,
                                  self.placement.whole), holder)
                       for holder in (self, self.draft) if holder is not None and options.swap_pages]
        self._programs = self._jitted()
        self.num_steps = 0

    def make_scheduler(self, max_queue: int, scheduler: type[Scheduler] = Scheduler, **more: Any) -> Scheduler:
        """A scheduler of this engine's layout."""
        o, g = self.options, self.geometry
        return scheduler(PagePool(g.num_pages, g.page_size), max_rows=o.max_rows, prefill_rows=o.prefill_rows,
                         chunk=o.chunk, max_context=self.max_context, max_queue=max_queue, prefix_cache=o.prefix_cache,
                         shared_prefixes=o.shared_prefixes, swap_pages=o.swap_pages, max_proposed=o.max_proposed,
                         **more)

    def compile(self, progress: Callable[[str], None] = lambda line: None) -> float:
        """Compiles every program by running it on padding; afterwards nothing compiles. Returns the seconds it took."""
        began = time.perf_counter()
        for shape in self.shapes:
            at = time.perf_counter()
            with _out_of_memory_said("compiling the steps"):
                self._run_all(shape)
            rows = f"{shape.decode_rows} decode rows" + (f" of {shape.width} tokens" if shape.width > 1 else "")
            progress(f"compiled step: {rows}, {shape.prefill_rows} prompts of up to "
                     f"{self.options.chunk} tokens ({time.perf_counter() - at:.1f} s)")
        for host, holder in self._swaps:
            holder.pools = host.compile(holder.pools)
        if self.draft is not None:
            self.draft.compile()
        if self.wide_rows:
            self.policy = self._measured_policy()
        return time.perf_counter() - began

    def lower(self, shape: StepShape) -> jax.stages.Lowered:
        """The forward pass of that shape, traced with this engine's arrays."""
        batch, _ = build(Plan((), ()), shape, self.geometry)
        return self._programs["forward"].lower(self.params, self.pools, self._last_S, batch)

    def prepare(self, plan: Plan, asked: Mapping[int, Asked], *, scores: Mapping[int, Sequence[int]] = {},  # noqa: B006
                hidden: Container[int] = ()) -> PreparedStep:
        """The plan as arrays.

        Args:
          plan: what to run.
          asked: by sequence id, what is asked of its draws; those that are not in it take the likeliest token.
          scores: by sequence id, the prompts whose tokens' log-probabilities are wanted.
          hidden: ids of sequences whose hidden states are wanted.
        """
        g = self.geometry
        shape = choose_shape(plan, self.shapes)
        batch, draws = build(plan, shape, g)
        shaped = extras(draws, asked, shape.rows, g)
        sampling, changes = shaped or (sampling_batch(draws, asked, shape.rows), None)
        found_scores, found_hidden = [], []
        if scores or hidden:
            for row, chunk in enumerate(plan.prefill):
                i, at = chunk.sequence.id, shape.decode_rows * shape.width + row * g.chunk
                if i in scores:
                    targets = tuple(scores[i][chunk.start + 1:chunk.start + chunk.count + 1])
                    found_scores.append(Score(i, at, targets))
                if i in hidden:
                    found_hidden.append((i, slice(at, at + chunk.count)))
            for row, chunk in enumerate(plan.decode):  # a prompt of one token
                if chunk.sequence.id in hidden:
                    found_hidden.append((chunk.sequence.id, slice(row * shape.width, row * shape.width + 1)))
        return PreparedStep(
            shape, batch, draws, sampling, changes,
            draft_batch=self._draft_batch(plan, shape),
            entering=tuple((a.slot, a.entering, a.num_prompt) for d in draws
                           if (a := asked.get(d.sequence_id)) is not None and a.entering),
            with_top=any(asked[d.sequence_id].params.logprobs for d in draws if d.sequence_id in asked),
            scores=tuple(found_scores), hidden=tuple(found_hidden),
            swap_out=tuple((s.pages, s.host_pages) for s in plan.swap_out),
            swap_in=tuple((s.pages, s.host_pages) for s in plan.swap_in))

    def dispatch(self, step: PreparedStep) -> RunningStep:
        """Gives the device a step, and returns before it is done.

        If the device fails, here or in `collect`, the pools are lost: call `reset`, after which no sequence is computed
        any more.
        """
        run = self._programs
        for host, holder in self._swaps:
            for device_pages, host_pages in step.swap_out:
                host.save(holder.pools, device_pages, host_pages)
            for device_pages, host_pages in step.swap_in:
                holder.pools = host.load(holder.pools, device_pages, host_pages)
        if self.draft is not None and step.draft_batch is not None:
            self.draft.follow(self._last_S, step.draft_batch)
        self.pools, self._last_S, token_R, logprob_R, logits_RV, x_ND = run["forward"](
            self.params, self.pools, self._last_S, step.batch)
        for slot, tokens, num_prompt in step.entering:
            token_C = np.zeros(self.max_context, np.int32)
            token_C[:len(tokens)] = tokens
            self._counts = run["enter"](self._counts, np.int32(slot), token_C, np.int32(num_prompt),
                                        np.int32(len(tokens)))
        if step.sampling is not None:
            shaped_RV = logits_RV
            if step.extras is not None:
                shaped_RV = run["shaped"](logits_RV, step.extras, self._counts)
            self._last_S, token_R, logprob_R = run["draw"](self._last_S, shaped_RV, logits_RV, step.batch.slot_R,
                                                           step.sampling)
            if step.extras is not None:
                self._counts = run["counted"](self._counts, step.extras.slot_R, token_R)
        top = run["top"](logits_RV) if step.with_top else None
        scores = tuple(run["score"](self.params, x_ND, np.int32(s.start), self._padded(s.targets)) for s in step.scores)
        self.num_steps += 1
        return RunningStep(step, (token_R, logprob_R), top, scores, x_ND if step.hidden else None)

    def collect(self, running: RunningStep) -> StepResults:
        """Waits for a step, and returns what it drew."""
        step = running.step
        tokens, logprobs = (np.asarray(a).tolist() for a in running.tokens)
        drawn = {d.sequence_id: Drawn(tuple(tokens[d.row:d.row + d.count]), tuple(logprobs[d.row:d.row + d.count]))
                 for d in step.draws}
        if running.top is not None:
            ids, values = (np.asarray(a).tolist() for a in running.top)
            for d in step.draws:
                best = tuple(tuple(zip(ids[row], values[row], strict=True)) for row in range(d.row, d.row + d.count))
                drawn[d.sequence_id] = dataclasses.replace(drawn[d.sequence_id], top=best)
        scores = {}
        for s, found in zip(step.scores, running.scores, strict=True):
            own, ids_, values_ = (np.asarray(a).tolist() for a in found)
            scores[s.sequence_id] = tuple(
                PromptLogprob(token, own[i], tuple(zip(ids_[i], values_[i], strict=True)))
                for i, token in enumerate(s.targets))
        hidden = {}
        if running.hidden is not None:
            x_ND = np.asarray(running.hidden)
            hidden = {i: x_ND[span].astype(np.float32) for i, span in step.hidden}
        return StepResults(drawn, scores, hidden)

    def execute(self, step: PreparedStep) -> StepResults:
        """`dispatch`, then `collect`."""
        return self.collect(self.dispatch(step))

    def set_params(self, params: Any) -> None:
        """Other weights of the same model; what the pools hold is of the old ones.

        Args:
          params: stacked or per layer, of any float dtype; both sets are in memory until it returns.
        Raises:
          UserError: they are not of this model; the engine keeps the weights it has.
        """
        made = self.placement.params(_serving_params(self.config, params, self.dtype, False))
        old, new = (jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree) for tree in (self.params, made))
        if old != new:
            raise UserError("the new weights are not of the model that is served: their names or shapes differ")
        self.params = made

    def reset(self) -> None:
        """Fresh pools, also after a step that failed with the old ones donated."""
        g, c = self.geometry, self.config
        self.pools = []  # first: there is no room for two
        with _out_of_memory_said(f"the cache of {g.num_pages} pages"):
            self.pools = self.placement.pools(
                lambda: make_pools(c.num_layers, g.num_pages, g.page_size, c.cache_widths(), self.cache_dtype,
                                   g.backend))
            if self.draft is not None:
                self.draft.reset()
            self._last_S, self._counts = self.placement.replicated(
                (jnp.zeros(g.num_slots + 1, jnp.int32), penalties.make_counts(g.num_slots, c.vocab_size)))

    def _backend(self, config: ModelConfig | None = None) -> str:
        o, c = self.options, config or self.config
        if o.deterministic or o.tensor > 1:  # the kernels promise no order of sums, and are not cut along a mesh
            return "xla"
        return choose_backend(c.cache_widths(), c.num_heads, self.cache_dtype, max(o.max_rows, o.prefill_rows),
                              -(-self.max_context // o.page_size))

    def _jitted(self) -> dict[str, Any]:
        model, place = self.model, self.placement
        whole = place.whole

        def forward(params: Any, pools: Pools, last_S: jax.Array, batch: StepBatch) -> Any:
            with place.tracing():
                return programs.forward(model, params, pools, last_S, batch)

        def score(params: Any, x_ND: jax.Array, start: jax.Array, target_C: jax.Array) -> Any:
            with place.tracing():
                return programs.score(model, params, x_ND, start, target_C)

        outputs = None if whole is None else (place.pool_shardings(self.pools), *(whole,) * 5)
        return {"forward": jax.jit(forward, donate_argnums=1, out_shardings=outputs),
                "draw": jax.jit(programs.draw, out_shardings=whole),
                "shaped": jax.jit(penalties.shaped, out_shardings=whole),
                "counted": jax.jit(penalties.counted, donate_argnums=0, out_shardings=whole),
                "top": jax.jit(programs.top, out_shardings=whole),
                "score": jax.jit(score, out_shardings=whole),
                "enter": jax.jit(penalties.enter, donate_argnums=0, out_shardings=whole)}

    def _draft_batch(self, plan: Plan, shape: StepShape) -> StepBatch | None:
        return None if self.draft is None else build(plan, shape, self.draft.geometry)[0]

    def _run_all(self, shape: StepShape) -> None:
        """Every program of a shape, on padding."""
        g = self.geometry
        batch, _ = build(Plan((), ()), shape, g)
        made = extras((), {}, shape.rows, g, always=True)
        assert made is not None
        sampling, changes = made
        self.execute(PreparedStep(shape, batch, (), sampling, changes, with_top=True,
                                  draft_batch=self._draft_batch(Plan((), ()), shape),
                                  entering=((g.num_slots, (), 0),),
                                  scores=(Score(-1, 0, ()),) if shape.prefill_rows else ()))
        self.num_steps = 0

    def _measured_policy(self) -> Policy:
        """What checking proposed tokens costs on this device, and proposing them."""
        empty = Plan((), ())

        def run(shape: StepShape) -> Callable[[], Any]:
            step = PreparedStep(shape, *build(empty, shape, self.geometry))
            return lambda: self.execute(step)

        def proposing(shape: StepShape) -> Callable[[], Any]:
            check = run(shape)

            def both() -> None:
                if self.draft is not None:
                    self.draft.run_empty(shape.decode_rows)
                check()

            return both

        costs = []
        for wide in (s for s in self.shapes if s.width > 1 and not s.prefill_rows):  # by rows
            narrow = next(s for s in self.shapes if s.width == 1 and not s.prefill_rows
                          and s.decode_rows == wide.decode_rows)
            with_and_without = proposing(wide), run(narrow)
            times: list[list[float]] = [[], []]
            for _ in range(9):  # in turn, so that what else the machine does falls on both
                for one, found in zip(with_and_without, times, strict=True):
                    at = time.perf_counter()
                    one()
                    found.append(time.perf_counter() - at)
            costs.append((wide.decode_rows, statistics.median(times[0]) / statistics.median(times[1])))
        self.num_steps = 0
        return Policy(self.options.max_proposed, tuple(costs))

    def _padded(self, targets: Sequence[int]) -> np.ndarray:
        target_C = np.zeros(self.options.chunk, np.int32)
        target_C[:len(targets)] = targets
        return target_C


@contextlib.contextmanager
def _out_of_memory_said(what: str) -> Iterator[None]:
    """Turns the device's own out-of-memory error into a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the device's memory does not hold {what}; lower num_pages, max_rows or max_context "
                        f"({str(error).splitlines()[0]})") from error


def check_generates(config: ModelConfig) -> None:
    """UserError unless the model is one that continues text."""
    if config.architecture != "decoder":
        raise UserError(f"the engine generates text with decoders, and this model's architecture is "
                        f"{config.architecture!r}; call the model itself instead: model.apply({{'params': params}}, …)")
    if config.head is not None:
        raise UserError(f"the engine generates text, and this model has a {config.head.kind} head instead of an output "
                        f"vocabulary; call the model itself instead: model.apply({{'params': params}}, …)")


def leaf_dtype(path: tuple[Any, ...], dtype: str) -> str:
    """The dtype in which an engine of `dtype` keeps the parameter at `path` (of `jax.tree_util`'s keys)."""
    return "float32" if path[-1].key in ROUTING else dtype


def _serving_params(config: ModelConfig, params: Any, dtype: str, free: bool) -> Any:
    """Per-layer parameters as a step multiplies them, each leaf cast once."""
    if "layers_0" not in params:
        params = unstack(params, config, free=free)
    if config.latent is not None and "kv_b" in params["layers_0"]["attention"]:
        params = absorbed(params, config)

    def cast(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        wanted = leaf_dtype(path, dtype)
        made = jnp.asarray(leaf, wanted)
        if free and isinstance(leaf, jax.Array) and leaf.dtype != wanted:
            made.block_until_ready()
            leaf.delete()
        return made

    return jax.tree_util.tree_map_with_path(cast, params)
