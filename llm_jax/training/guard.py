"""What a step decides of itself, on the device: whether its loss and gradient are fit to be applied.

A step is judged before it changes anything, by numbers that are part of the state, so a run that was stopped and goes
on judges the same, and the host may look at a step long after it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError

Array = jax.Array

POLICIES = ("stop", "skip", "rollback")
# What a step's `outcome` is.
APPLIED, OVERFLOW, NOT_FINITE, SPIKE = range(4)
_LEAST_DEVIATION = 0.01  # of the mean: where a loss hardly moves at all, its noise is no measure of a spike


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
    """What is done about a bad step: one whose loss or gradient is not finite, or far above what it was.

    A bad step is never applied. (An overflow of float16 under `PrecisionConfig`'s loss scaling is not a bad step but a
    scale that was too large.)

    Attributes:
      on_bad: "stop" ends the run with a message; "skip" passes the batch over and goes on; "rollback" returns to an
        earlier checkpoint and goes on with the data after the bad batch (Chowdhery et al. 2022, arXiv:2204.02311,
        section 5.1).
      spike_factor: a loss, or norm of the gradient, is bad where it lies more than so many standard deviations above
        its running mean; None judges neither. A deviation counts as 1 % of the mean at least.
      spike_window: steps that the running means and deviations look back over; until so many steps were applied, none
        is called a spike.
      rollback_steps: how far before the bad step the checkpoint is that a run returns to, at least. If none of those
        that are kept is, it is the earliest; if there is none, the run begins anew.
      max_events: bad steps in a row that are skipped, or rollbacks in a row that never got to a later checkpoint;
        one more ends the run.
    """

    on_bad: str = "stop"
    spike_factor: float | None = None
    spike_window: int = 100
    rollback_steps: int = 100
    max_events: int = 10

    def __post_init__(self) -> None:
        if self.on_bad not in POLICIES:
            raise UserError(f"RecoveryConfig.on_bad={self.on_bad!r} is not one of {POLICIES}")
        if self.spike_factor is not None and not self.spike_factor > 0:
            raise UserError(f"RecoveryConfig.spike_factor={self.spike_factor!r} must be above 0, or None")
        for name, least in (("spike_window", 2), ("rollback_steps", 0), ("max_events", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"RecoveryConfig.{name} must be a whole number of at least {least}, not {value!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """Part of `TrainState`; all scalars.

    Attributes:
      skipped: int32, bad steps of the run that were skipped.
      in_a_row: int32, those of them since a step was last applied.
      seen: int32, steps that the statistics are of, at most `RecoveryConfig.spike_window`.
      loss_mean, loss_variance: float32, of the loss of applied steps, exponentially weighted.
      norm_mean, norm_variance: float32, likewise of the gradient's norm.
    """

    skipped: Any
    in_a_row: Any
    seen: Any
    loss_mean: Any
    loss_variance: Any
    norm_mean: Any
    norm_variance: Any

    @classmethod
    def new(cls) -> Guard:
        """Of a run that begins."""
        counts = (jnp.zeros((), jnp.int32) for _ in range(3))
        return cls(*counts, *(jnp.zeros((), jnp.float32) for _ in range(4)))

    def outcome(self, config: RecoveryConfig, loss: Array, grad_norm: Array, may_overflow: Any = False) -> Array:
        """What a step is (int32): `APPLIED`, `OVERFLOW`, `NOT_FINITE` or `SPIKE`.

        Args:
          config: says what a spike is.
          loss, grad_norm: the step's.
          may_overflow: whether a smaller loss scale might mend a gradient that is not finite.
        """
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        bad = jnp.where(jnp.isfinite(loss) & may_overflow, OVERFLOW, NOT_FINITE)
        if config.spike_factor is None:
            return jnp.where(is_finite, APPLIED, bad).astype(jnp.int32)
        is_above = (_exceeds(loss, self.loss_mean, self.loss_variance, config.spike_factor) |
                    _exceeds(grad_norm, self.norm_mean, self.norm_variance, config.spike_factor))
        is_spike = is_above & (self.seen >= config.spike_window)
        return jnp.where(is_finite, jnp.where(is_spike, SPIKE, APPLIED), bad).astype(jnp.int32)

    def after(self, config: RecoveryConfig, loss: Array, grad_norm: Array, is_applied: Array,
              is_skipped: Array) -> Guard:
        """The next step's."""
        in_a_row = jnp.where(is_applied, 0, self.in_a_row + is_skipped.astype(jnp.int32))
        counted = dataclasses.replace(self, skipped=self.skipped + is_skipped.astype(jnp.int32), in_a_row=in_a_row)
        if config.spike_factor is None:
            return counted
        # The first steps weigh the same each, so that nothing has to be made up for what came before them.
        share = 1.0 / jnp.minimum(self.seen + 1, config.spike_window).astype(jnp.float32)
        loss_mean, loss_variance = _moved(self.loss_mean, self.loss_variance, loss, share)
        norm_mean, norm_variance = _moved(self.norm_mean, self.norm_variance, grad_norm, share)
        moved = dataclasses.replace(counted, seen=jnp.minimum(self.seen + 1, config.spike_window),
                                    loss_mean=loss_mean, loss_variance=loss_variance, norm_mean=norm_mean,
                                    norm_variance=norm_variance)
        return jax.tree.map(lambda new, old: jnp.where(is_applied, new, old), moved, counted)


def _exceeds(x: Array, mean: Array, variance: Array, factor: float) -> Array:
    return x > mean + factor * jnp.maximum(jnp.sqrt(variance), _LEAST_DEVIATION * jnp.abs(mean))


def _moved(mean: Array, variance: Array, x: Array, share: Array) -> tuple[Array, Array]:
    """Mean and variance with `x`, which gets `share` of the weight (West 1979, doi:10.1145/359146.359153)."""
    distance = x - mean
    return mean + share * distance, (1.0 - share) * (variance + share * jnp.square(distance))
