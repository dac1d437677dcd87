"""AdamW with warm-up, cosine decay, decoupled weight decay and global-norm clipping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from llm_jax.errors import UserError

_NEVER_DECAYED = ("scale", "bias")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are moved.

    Attributes:
      peak_learning_rate: learning rate at the end of warm-up.
      warmup_steps: steps of linear warm-up; step s (from 0) uses peak · (s + 1) / warmup_steps.
      decay_steps: step at which the cosine reaches its end; None is the run's number of steps.
      end_learning_rate_ratio: learning rate at the end of the decay, and after it, as a share of the peak.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101), multiplied by the learning
        rate; norms and biases are left alone.
      clip_norm: gradients whose global norm is larger are scaled down to it; None or 0 never clips.
      selection_bias_rate: by which the selection biases of a mixture of experts are moved after each step (see
        `models.move_selection_biases`; DeepSeek-V3 took 1e-3); 0 leaves them as they are.
    """

    peak_learning_rate: float = 3e-4
    warmup_steps: int = 100
    decay_steps: int | None = None
    end_learning_rate_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    selection_bias_rate: float = 0.0

    def __post_init__(self) -> None:
        checks = {
            "peak_learning_rate": self.peak_learning_rate > 0,
            "warmup_steps": self.warmup_steps >= 0,
            "decay_steps": self.decay_steps is None or self.decay_steps >= 1,
            "end_learning_rate_ratio": 0 <= self.end_learning_rate_ratio <= 1,
            "b1": 0 <= self.b1 < 1,
            "b2": 0 <= self.b2 < 1,
            "eps": self.eps > 0,
            "weight_decay": self.weight_decay >= 0,
            "selection_bias_rate": self.selection_bias_rate >= 0,
            "clip_norm": self.clip_norm is None or self.clip_norm >= 0,
        }
        for name, is_good in checks.items():
            if not is_good:
                raise UserError(f"OptimizerConfig.{name}={getattr(self, name)!r} is out of range")


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Linear warm-up to the peak, then half a cosine to the end rate, which is held.

    The warm-up's last step (s = warmup_steps - 1) uses the peak, and the decay's last (s = decay_steps - 1) the end
    rate, so that no step of a run is spent at a rate of zero.

    Args:
      config: the optimizer's settings.
      num_steps: steps of the run; where `config.decay_steps` is None the decay ends with it.

    Returns:
      A function of the step (from 0) that gives the learning rate as a float32 scalar.
    """
    decay_steps = config.decay_steps or num_steps
    if config.warmup_steps > decay_steps:
        raise UserError(f"OptimizerConfig.warmup_steps={config.warmup_steps} is more than the {decay_steps} steps "
                        "after which the learning rate has decayed")
    end = config.end_learning_rate_ratio

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(step, jnp.float32) + 1.0
        warmup = done / max(config.warmup_steps, 1)
        progress = jnp.clip((done - config.warmup_steps) / max(decay_steps - config.warmup_steps, 1), 0.0, 1.0)
        cosine = end + (1.0 - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return config.peak_learning_rate * jnp.where(done <= config.warmup_steps, warmup, cosine)

    return schedule


def decay_mask(logical_axes: dict) -> dict:
    """Which parameters weight decay pulls on: matrices do (experts and routers among them), norms and biases don't.

    A leaf is left alone if it is named `scale` or `bias` (or ends in `_bias`), carries the logical axis "norm", or has
    fewer than two axes besides the stacked "layers" axis, which is not one of the parameter's own.

    Args:
      logical_axes: tree of tuples of logical axis names, in the structure of the parameters.

    Returns:
      A tree of bool of the same structure.
    """

    def decays(path: tuple, axes: tuple) -> bool:
        name = str(getattr(path[-1], "key", path[-1])) if path else ""
        own_axes = [axis for axis in axes if axis != "layers"]
        is_exempt = name in _NEVER_DECAYED or name.endswith("_bias") or "norm" in axes
        return not is_exempt and len(own_axes) >= 2

    return jax.tree_util.tree_map_with_path(decays, logical_axes, is_leaf=lambda x: isinstance(x, tuple))


def make_optimizer(config: OptimizerConfig, num_steps: int, mask: dict | None = None) -> optax.GradientTransformation:
    """Builds AdamW: clip by global norm, Adam moments, decoupled decay, learning rate.

    Args:
      config: the settings.
      num_steps: steps of the run (see `learning_rate_schedule`).
      mask: tree of bool from `decay_mask`; None decays every parameter.

    Returns:
      An optax transformation; moments are float32 and have the structure of the parameters.
    """
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.float32))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
    parts.append(optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)))
    return optax.chain(*parts)
