"""What a step is computed in: loss scaling for float16, and matrix products in int8 or fp8.

Parameters, gradients' sums and both moments are float32 whatever this says.

Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2): the objective is multiplied by a scale
before the backward pass and the gradients are divided by it, so that small ones are not lost to float16, whose least
number is 6e-8. A gradient that overflows drops its step and halves the scale; enough steps without one double it.
Scales that are powers of two round nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError

Array = jax.Array

SCALING = ("auto", "always", "never")
MATMULS = ("none", "int8", "fp8")


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """How a step keeps its numbers in range, and what it multiplies matrices in.

    Attributes:
      scaling: when the loss is scaled: "auto" where `Execution.dtype` is float16, "always", or "never".
      loss_scale: the scale of a run's first step.
      growth_interval: steps in a row without an overflow after which the scale grows.
      growth_factor: by which it then grows.
      backoff: by which it is multiplied after an overflow.
      min_loss_scale: which it never falls below; a gradient that is not finite at this scale is not the scale's fault,
        and is dealt with as `RecoveryConfig` says.
      max_loss_scale: which it never grows above.
      matmul: what the projections of attention and feed-forward layers are multiplied in, forward and backward: "none"
        (`Execution.dtype`), "int8" or "fp8" (see `training.low_bit`). Evaluation, checkpoints and serving know nothing
        of it.
    """

    scaling: str = "auto"
    loss_scale: float = 2.0**15
    growth_interval: int = 2000
    growth_factor: float = 2.0
    backoff: float = 0.5
    min_loss_scale: float = 1.0
    max_loss_scale: float = 2.0**24
    matmul: str = "none"

    def __post_init__(self) -> None:
        for name, known in (("scaling", SCALING), ("matmul", MATMULS)):
            if getattr(self, name) not in known:
                raise UserError(f"PrecisionConfig.{name}={getattr(self, name)!r} is not one of {known}")
        checks = {
            "growth_interval": isinstance(self.growth_interval, int) and self.growth_interval >= 1,
            "growth_factor": self.growth_factor >= 1,
            "backoff": 0 < self.backoff < 1,
            "min_loss_scale": self.min_loss_scale > 0,
            "loss_scale": self.min_loss_scale <= self.loss_scale <= self.max_loss_scale,
            "max_loss_scale": self.max_loss_scale <= 2.0**64,
        }
        if wrong := [name for name, is_right in checks.items() if not is_right]:
            raise UserError(f"PrecisionConfig.{wrong[0]}={getattr(self, wrong[0])!r} is out of range")

    def scales(self, dtype: str) -> bool:
        """Whether a model that is run in `dtype` has its loss scaled."""
        return self.scaling == "always" or (self.scaling == "auto" and dtype == "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """Part of `TrainState`.

    Attributes:
      value: float32 scalar, what the next step multiplies its objective by.
      good_steps: int32 scalar, steps applied since the scale last changed.
      overflows: int32 scalar, steps of the run that an overflow dropped.
    """

    value: Any
    good_steps: Any
    overflows: Any

    @classmethod
    def new(cls, config: PrecisionConfig) -> LossScale:
        """Of a run that begins."""
        return cls(jnp.asarray(config.loss_scale, jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def after(self, config: PrecisionConfig, is_applied: Array, is_overflow: Array) -> LossScale:
        """The next step's, after a step that was applied, one that overflowed, or one that was dropped for another
        reason and says nothing of the scale."""
        good_steps = jnp.where(is_overflow, 0, self.good_steps + is_applied.astype(jnp.int32))
        grows = good_steps >= config.growth_interval
        grown = jnp.minimum(self.value * config.growth_factor, config.max_loss_scale)
        shrunk = jnp.maximum(self.value * config.backoff, config.min_loss_scale)
        return LossScale(value=jnp.where(is_overflow, shrunk, jnp.where(grows, grown, self.value)),
                         good_steps=jnp.where(grows, 0, good_steps),
                         overflows=self.overflows + is_overflow.astype(jnp.int32))
