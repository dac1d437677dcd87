"""The parts of a block: weights, projections, RMSNorm, rotary positions, the gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Initializer = Callable[..., Array]


def weight(module: nn.Module, name: str, init: Initializer, shape: Sequence[int], axes: Sequence[str]) -> Any:
    """A parameter of `module`: created with logical `axes` at initialisation, afterwards whatever is stored there.

    Reading past `self.param` lets a stored weight be another kind of object (quantized, with a low-rank addition),
    whose shape would not pass Linen's check; `linear` is what knows how to multiply it.
    """
    if module.has_variable("params", name) and not module.is_initializing():
        return nn.meta.unbox(module.get_variable("params", name))
    return module.param(name, nn.with_logical_partitioning(init, tuple(axes)), tuple(shape), jnp.float32)


def linear(x: Array, w: Array, contract: int = 1, out_dtype: Any = None) -> Array:
    """Contracts the last `contract` axes of `x` with the first of `w`, in `x`'s dtype.

    Args:
      x: [..., a1, .., an], n = contract.
      w: [a1, .., an, ...]; float32 or already in x's dtype.
      contract: number of axes summed over.
      out_dtype: dtype of the result; default x's own. float32 accumulates bfloat16 products in float32.
    Returns:
      x · w with x's leading axes and w's trailing ones.
    """
    axes = tuple(range(contract))
    dims = ((tuple(a + x.ndim - contract for a in axes), axes), ((), ()))
    return jax.lax.dot_general(x, w.astype(x.dtype), dims, preferred_element_type=out_dtype or x.dtype)


def fan_in_normal(fan_in: int, scale: float = 1.0) -> Initializer:
    """Truncated normal with standard deviation scale / sqrt(fan_in): keeps the variance of a sum of fan_in inputs."""
    return nn.initializers.truncated_normal(scale * fan_in**-0.5)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · scale, in float32 whatever x's dtype (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        scale_D = weight(self, "scale", nn.initializers.ones_init(), (x_BTD.shape[-1],), ("norm",))
        x32_BTD = x_BTD.astype(jnp.float32)
        inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + self.eps)
        return (x32_BTD * inverse_BT1 * scale_D.astype(jnp.float32)).astype(x_BTD.dtype)


def rotary(x_BTHK: Array, positions_BT: Array, theta: float) -> Array:
    """Turns the pairs (x_i, x_{i+K/2}) by the angle position · theta^(-2i/K) (Su et al. 2021, arXiv:2104.09864).

    The half-split pairing is the one of Llama checkpoints on Hugging Face. Angles are float32: in bfloat16 a position
    over 256 is no longer exact.
    """
    half = x_BTHK.shape[-1] // 2
    frequency_k = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1k = positions_BT.astype(jnp.float32)[..., None, None] * frequency_k
    cos, sin = jnp.cos(angle_BT1k), jnp.sin(angle_BT1k)
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHK.dtype)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) · up(x)): SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    mlp_dim: int
    residual_scale: float

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        d = x_BTD.shape[-1]
        gate_DF = weight(self, "gate", fan_in_normal(d), (d, self.mlp_dim), ("embed", "mlp"))
        up_DF = weight(self, "up", fan_in_normal(d), (d, self.mlp_dim), ("embed", "mlp"))
        down_FD = weight(self, "down", fan_in_normal(self.mlp_dim, self.residual_scale), (self.mlp_dim, d),
                         ("mlp", "embed"))
        hidden_BTF = nn.silu(linear(x_BTD, gate_DF)) * linear(x_BTD, up_DF)
        hidden_BTF = nn.with_logical_constraint(hidden_BTF, ("batch", "length", "activation_mlp"))
        return linear(hidden_BTF, down_FD)
