"""How an engine is laid out, and the step shapes that follow from it."""

from __future__ import annotations

import dataclasses

import jax

from llm_jax.errors import UserError
from llm_jax.inference.batch import StepShape

DTYPES = ("float32", "bfloat16")
_FEW = 8  # rows between a lone one and all
CACHE_DTYPES = (*DTYPES, "int8", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How an engine is laid out.

    Attributes:
      max_rows: sequences that run at once.
      prefill_rows: most sequences whose prompts advance in one step.
      chunk: most prompt tokens of one sequence in one step. A step carries `max_rows + prefill_rows · chunk` tokens at
        most, and running sequences wait for no prompt longer than that.
      page_size: tokens of a page.
      num_pages: pages of the pool; None takes what free memory and max_rows full contexts allow.
      max_context: longest sequence served; None takes the model's. Rope scalings that switch on length ("dynamic",
        "longrope") are computed for it.
      dtype: of weights and cache; None takes float32 on a CPU (where bfloat16 is emulated) and bfloat16 elsewhere.
      cache_dtype: of the cache alone: float32, bfloat16, int8 or float8_e4m3fn; None takes `dtype`.
      tensor: devices that share each matrix product and the heads of the cache.
      prefix_cache: whether pages of a prompt that are in the cache already are used again.
      shared_prefixes: whether tenants may use one another's pages. How long a request takes then tells one tenant what
        another has asked before.
      swap_pages: pages of host memory to which sequences that give way are copied; 0: they are computed again.
      deterministic: every step in one compiled shape, in which a token's logits do not depend, to the bit, on what else
        is in the batch or how its prompt was cut. Slow: see docs/serving.md.
      max_proposed: most tokens proposed for a sequence and checked in one step (speculative decoding); 0 is none.
    """

    max_rows: int = 32
    prefill_rows: int = 4
    chunk: int = 64
    page_size: int = 16
    num_pages: int | None = None
    max_context: int | None = None
    dtype: str | None = None
    cache_dtype: str | None = None
    tensor: int = 1
    prefix_cache: bool = True
    shared_prefixes: bool = False
    swap_pages: int = 0
    deterministic: bool = False
    max_proposed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("cache_dtype", CACHE_DTYPES)):
            if getattr(self, name) not in (None, *known):
                raise UserError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("max_rows", "prefill_rows", "chunk", "page_size", "num_pages", "max_context", "tensor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        for name in ("swap_pages", "max_proposed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.deterministic and self.max_proposed:
            raise UserError("deterministic=True has one shape of step, in which no proposed tokens can be checked; set "
                            "max_proposed=0")


def wide_rows(config: EngineConfig) -> int:
    """Most rows of a step in which proposed tokens are checked."""
    return min(_FEW, config.max_rows) if config.max_proposed else 0


def step_shapes(config: EngineConfig) -> tuple[StepShape, ...]:
    """The shapes that are compiled: a lone row, a few, and all; few or all beside a prompt; all beside all prompts.

    Each costs seconds of compiling at start; between two of them, empty rows are computed in vain. Where tokens are
    proposed, rows of all of them come beside those of one, but no more than a few: a full batch has no time to spare.
    """
    few, most = min(_FEW, config.max_rows), config.max_rows
    if config.deterministic:
        return (StepShape(config.prefill_rows, most),)
    beside = most + config.prefill_rows
    shapes = {StepShape(0, 1), StepShape(0, most), StepShape(1, most, least_rows=beside),
              StepShape(config.prefill_rows, most, least_rows=beside)}
    if few < most:
        shapes |= {StepShape(0, few, least_rows=few + 1), StepShape(1, few)}
    if config.max_proposed:
        wide = config.max_proposed + 1
        shapes |= {StepShape(0, 1, wide), StepShape(config.prefill_rows, few, wide)}
        if few > 1:
            shapes.add(StepShape(0, few, wide, few * wide + config.prefill_rows))
    return tuple(sorted(shapes))


def default_dtype() -> str:
    """float32 on a CPU, which converts bfloat16 back and forth at every product; bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
