"""Rotary frequencies, plain and stretched, and the rotation itself (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.attention_call import is_lone_cpu
from llm_jax.models.config import ModelConfig
from llm_jax.models.facts import RopeScaling

Array = jax.Array
Rotations = dict[str, tuple[Array, Array]]


def frequencies(width: int, theta: float, scaling: RopeScaling | None, max_context: int,
                length: Any) -> tuple[Any, float]:
    """Angles per position of a head's pairs.

    Args:
      width: entries of a head that turn (twice the number of pairs).
      theta: the base.
      scaling: how the frequencies are stretched.
      max_context: the model's; stands in for `scaling.original_context` where that is None.
      length: the longest position plus one, an int or an int32 scalar; "dynamic" and "longrope" switch on it.
    Returns:
      float32 [width / 2] radians per position, and what cos and sin are multiplied by.
    """
    exponent_k = np.arange(0, width, 2, dtype=np.float64) / width
    plain_k = theta**-exponent_k
    if scaling is None:
        return plain_k.astype(np.float32), 1.0
    original = scaling.original_context or max_context
    given = scaling.attention_factor
    if scaling.kind == "linear":
        return (plain_k / scaling.factor).astype(np.float32), 1.0
    if scaling.kind == "dynamic":
        stretch = scaling.factor * jnp.maximum(length, original) / original - (scaling.factor - 1)
        return _powers(theta * stretch ** (width / (width - 2)), exponent_k), 1.0
    if scaling.kind == "yarn":
        return _yarn(plain_k, width, theta, scaling, original), _yarn_factor(scaling) if given is None else given
    if scaling.kind == "llama3":
        return _llama3(plain_k, scaling, original), 1.0
    short_k, long_k = (np.float32(plain_k / np.asarray(f)) for f in (scaling.short_factors, scaling.long_factors))
    if given is None:
        given = 1.0 if scaling.factor <= 1 else math.sqrt(1 + math.log(scaling.factor) / math.log(original))
    return jnp.where(jnp.asarray(length) > original, long_k, short_k), given


def _powers(base: Array, exponent_k: np.ndarray) -> Array:
    return jnp.asarray(base, jnp.float32) ** -jnp.asarray(exponent_k, jnp.float32)


def _yarn(plain_k: np.ndarray, width: int, theta: float, s: RopeScaling, original: int) -> np.ndarray:
    """High frequencies as they are, low ones divided by the factor, a ramp between (YaRN, section 3.2)."""
    def dimension(rotations: float) -> float:  # the pair that turns so often within the original context
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low or 0.001
    divided_k = np.clip((np.arange(width // 2) - low) / span, 0, 1)
    return (plain_k * (1 - divided_k) + plain_k / s.factor * divided_k).astype(np.float32)


def _yarn_factor(s: RopeScaling) -> float:
    if s.mscale and s.mscale_all_dim:
        return yarn_mscale(s.factor, s.mscale) / yarn_mscale(s.factor, s.mscale_all_dim)
    return yarn_mscale(s.factor)


def yarn_mscale(factor: float, coefficient: float = 1.0) -> float:
    """0.1 · coefficient · ln(factor) + 1: how much sharper attention gets (YaRN, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def _llama3(plain_k: np.ndarray, s: RopeScaling, original: int) -> np.ndarray:
    """Wavelengths under original / high_freq_factor are kept, those over original / low_freq_factor divided."""
    rotations_k = original * plain_k / (2 * math.pi)
    kept_k = np.clip((rotations_k - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    return (plain_k * kept_k + plain_k / s.factor * (1 - kept_k)).astype(np.float32)


def rotations(config: ModelConfig, positions_BT: Array, rope_context: int | None) -> Rotations:
    """cos and sin, float32 [B, T, 1, width / 2] each, for every kind of attention layer that the model has.

    Angles are float32 whatever the model's dtype: in bfloat16 a position over 256 is no longer exact.
    """
    if config.positions != "rotary":
        return {}
    length = jnp.max(positions_BT) + 1 if rope_context is None else rope_context
    made = {}
    for kind in sorted(set(config.attention_pattern)):
        theta, scaling = config.rope_theta, config.rope_scaling
        if kind == "local" and config.local_rope_theta is not None:
            theta, scaling = config.local_rope_theta, None
        frequency_k, factor = frequencies(config.rotary_width, theta, scaling, config.max_context, length)
        made[kind] = _each_row(functools.partial(_tables, frequency_k, factor), positions_BT)
    # Constants of a step: without this, the backward pass of a scan would carry their gradients along (4 % of it).
    return jax.lax.stop_gradient(made)


def _tables(frequency_k: Any, factor: float, positions_T: Array) -> tuple[Array, Array]:
    angle_T1k = positions_T.astype(jnp.float32)[..., None, None] * frequency_k
    return jnp.cos(angle_T1k) * factor, jnp.sin(angle_T1k) * factor


def _each_row(make: Callable[[Array], Any], positions_BT: Array) -> Any:
    """`make` of all rows. On a lone CPU in a loop: what a loop made is read, where XLA would compute it again in each
    operation of each layer that it fuses it into (5 % of a step, docs/performance.md)."""
    return jax.lax.map(make, positions_BT) if is_lone_cpu() else make(positions_BT)


def rotate(x_BTHK: Array, rotation: tuple[Array, Array], interleaved: bool = False) -> Array:
    """Turns the pairs of the first entries of each head, as many as there are angles; the rest stays.

    Args:
      x_BTHK: queries or keys.
      rotation: cos and sin [B, T, 1, k].
      interleaved: whether a pair is (x_2i, x_2i+1) instead of (x_i, x_i+k). Turned pairs are laid out in halves either
        way; the order of a head's entries is nothing to the product of a query and a key.
    """
    cos, sin = rotation
    k = cos.shape[-1]
    turned, kept = x_BTHK[..., :2 * k].astype(jnp.float32), x_BTHK[..., 2 * k:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :k], turned[..., k:]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHK.dtype)
    return turned if kept.shape[-1] == 0 else jnp.concatenate([turned, kept], axis=-1)
