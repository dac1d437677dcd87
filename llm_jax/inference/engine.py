"""The device side of serving: weights, page pools and the compiled steps. What to run, the scheduler decides."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import UserError
from llm_jax.inference import memory
from llm_jax.inference.batch import Geometry, StepBatch, StepShape, build, choose_shape
from llm_jax.inference.request import SamplingParams
from llm_jax.inference.sampling import sample
from llm_jax.inference.scheduler import Plan
from llm_jax.kernels.paged import make_pool
from llm_jax.models import Decoder, Execution, ModelConfig, unstack
from llm_jax.models.latent_attention import absorbed
from llm_jax.models.layout import layer_kinds

Pools = list[tuple[jax.Array, ...]]

# Leaves that stay in float32 (a bfloat16 import is widened, which changes nothing): rounding them would send tokens to
# other experts.
ROUTING = ("router", "selection_bias")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How an engine is laid out.

    Attributes:
      max_rows: sequences that run at once.
      prefill_rows: most sequences whose prompts advance in one step.
      chunk: most prompt tokens of one sequence in one step.
      page_size: tokens of a page.
      num_pages: pages of the pool; None takes what free memory and max_rows full contexts allow.
      max_context: longest sequence served; None takes the model's. Rope scalings that switch on length ("dynamic",
        "longrope") are computed for it.
      dtype: of weights and cache; None takes float32 on a CPU (where bfloat16 is emulated) and bfloat16 elsewhere.
    """

    max_rows: int = 32
    prefill_rows: int = 4
    chunk: int = 64
    page_size: int = 16
    num_pages: int | None = None
    max_context: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")
        for name in ("max_rows", "prefill_rows", "chunk", "page_size", "num_pages", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")


def step_shapes(config: EngineConfig) -> tuple[StepShape, ...]:
    """The shapes that are compiled: a lone row, a few, and all; few or all beside a prompt; all beside all prompts.

    Each costs seconds of compiling at start; between two of them, empty rows are computed in vain.
    """
    few, most = min(8, config.max_rows), config.max_rows
    shapes = {StepShape(0, 1), StepShape(0, few), StepShape(0, most), StepShape(1, few), StepShape(1, most),
              StepShape(config.prefill_rows, most)}
    return tuple(sorted(shapes))


@dataclasses.dataclass(frozen=True)
class PreparedStep:
    """A step ready to run: its compiled shape, its arrays, and which row draws for which sequence id."""

    shape: StepShape
    batch: StepBatch
    sampling: tuple[tuple[int, int], ...]


def serving_step(model: Decoder, params: Any, pools: Pools, batch: StepBatch) -> tuple[Pools, jax.Array, jax.Array]:
    """One step: writes the tokens' keys and values, and draws one token a row.

    Args:
      model: with unrolled layers.
      params: per-layer parameters (`models.unstack`).
      pools: what `kernels.paged.make_pool` makes, one entry a layer; donated.
      batch: see `StepBatch`.
    Returns:
      the pools, int32 tokens [R], float32 log-probabilities [R].
    """
    x_1ND, pools = model.apply({"params": params}, batch.token_N[None], batch.context.position_N[None], batch.context,
                               pools, method="hidden")
    logits_RV = model.apply({"params": params}, x_1ND[0, batch.out_R], method="logits")
    return pools, *sample(logits_RV, batch.sampling)


class Engine:
    """Weights and pools on the device, and `prepare` and `execute`, which carry out one plan."""

    def __init__(self, config: ModelConfig, params: Any, options: EngineConfig, *,
                 available_bytes: int | None = None, free_params: bool = False):
        """Lays out weights and pools; `compile` must be called before `execute`.

        Args:
          config: the model's.
          params: its parameters, stacked or per layer; arrays of the engine's dtype are used as they are, others are
            cast (but for `ROUTING`).
          options: see `EngineConfig`.
          available_bytes: memory for the pages; default what is free.
          free_params: whether the stacked arrays may be deleted as they are taken apart, so that the weights are never
            there twice.
        Raises:
          UserError: the pages do not fit, the context is longer than the model's, or it does not generate text.
        """
        check_generates(config)
        self.options = options
        self.config = config
        self.dtype = options.dtype or default_dtype()
        self.max_context = options.max_context or config.max_context
        if self.max_context > config.longest_context:
            raise UserError(f"max_context={self.max_context} is more than the model's {config.longest_context}")
        # With the rope context fixed, a token's keys do not depend on how long its sequence becomes.
        self.model = Decoder(config, Execution(dtype=self.dtype, scan_layers=False, rope_context=self.max_context))
        self.params = _serving_params(config, params, self.dtype, free_params)
        self.shapes = step_shapes(options)
        num_pages = memory.plan_pages(
            config, page_size=options.page_size, itemsize=jnp.dtype(self.dtype).itemsize,
            max_context=self.max_context, max_rows=options.max_rows,
            available=memory.free_bytes() if available_bytes is None else available_bytes, requested=options.num_pages)
        kinds = {kind.attention for kind in layer_kinds(config)}
        self.geometry = Geometry(
            num_pages, options.page_size, options.chunk, -(-self.max_context // options.page_size),
            window=config.sliding_window if "local" in kinds else None, has_global="global" in kinds)
        self.pools: Pools = []
        self.reset()
        self._steps: dict[StepShape, Callable[..., Any]] = {}
        self.num_steps = 0

    def compile(self, progress: Callable[[str], None] = lambda line: None) -> float:
        """Compiles every step shape; afterwards nothing compiles. Returns the seconds it took."""
        began = time.perf_counter()
        for shape in self.shapes:
            at = time.perf_counter()
            with _out_of_memory_said("compiling the steps"):
                self._steps[shape] = self.lower(shape).compile()
            progress(f"compiled step: {shape.decode_rows} decode rows, {shape.prefill_rows} prompts of up to "
                     f"{self.options.chunk} tokens ({time.perf_counter() - at:.1f} s)")
        return time.perf_counter() - began

    def lower(self, shape: StepShape) -> jax.stages.Lowered:
        """The step of that shape, traced with this engine's arrays."""
        def step(params: Any, pools: Pools, batch: StepBatch) -> tuple[Pools, jax.Array, jax.Array]:
            return serving_step(self.model, params, pools, batch)

        batch = build(Plan((), ()), shape, self.geometry, {})
        return jax.jit(step, donate_argnums=1).lower(self.params, self.pools, batch)

    def prepare(self, plan: Plan, params: Mapping[int, SamplingParams]) -> PreparedStep:
        """The plan as arrays; afterwards its sequences may change, the step is what it was."""
        shape = choose_shape(plan, self.shapes)
        rows = [*enumerate(plan.decode), *enumerate(plan.prefill, start=shape.decode_rows)]
        return PreparedStep(shape, build(plan, shape, self.geometry, params),
                            tuple((row, c.sequence.id) for row, c in rows if c.samples))

    def execute(self, step: PreparedStep) -> dict[int, tuple[int, float]]:
        """Runs one step; returns (token, log-probability) by sequence id for the chunks that sample.

        If the device fails, the pools are lost: call `reset`, after which no sequence is computed any more.
        """
        self.pools, token_R, logprob_R = self._steps[step.shape](self.params, self.pools, step.batch)
        tokens, logprobs = np.asarray(token_R), np.asarray(logprob_R)
        self.num_steps += 1
        return {i: (int(tokens[row]), float(logprobs[row])) for row, i in step.sampling}

    def reset(self) -> None:
        """Fresh pools, also after a step that failed with the old ones donated."""
        g, c = self.geometry, self.config
        self.pools = []  # first: there is no room for two
        with _out_of_memory_said(f"the cache of {g.num_pages} pages"):
            self.pools = [make_pool(g.num_pages, g.page_size, c.cache_widths(), self.dtype)
                          for _ in range(c.num_layers)]


def default_dtype() -> str:
    """float32 on a CPU, which converts bfloat16 back and forth at every product; bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


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
