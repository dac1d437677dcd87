"""The parts of a block: weights, projections, norms, the feed-forward layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.kernels.attention_call import is_lone_cpu, platform
from llm_jax.models.config import ModelConfig

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


def linear(x: Array, w: Any, contract: int = 1, out_dtype: Any = None) -> Array:
    """Contracts the last `contract` axes of `x` with the first of `w`, in `x`'s dtype.

    Args:
      x: [..., a1, .., an], n = contract.
      w: [a1, .., an, ...]; float32 or already in x's dtype. Or an object with a method
        `linear(x, contract, out_dtype)`, which does this in a way of its own.
      contract: number of axes summed over.
      out_dtype: dtype of the result; default x's own. float32 accumulates bfloat16 products in float32.
    Returns:
      x · w with x's leading axes and w's trailing ones.
    """
    if not hasattr(w, "astype"):
        return w.linear(x, contract, out_dtype)
    dtype, w = jnp.dtype(out_dtype or x.dtype), w.astype(x.dtype)
    if is_lone_cpu():  # as matrices; where a batch and a length are both divided, that would move data
        leading, trailing, inner = x.shape[:x.ndim - contract], w.shape[contract:], math.prod(w.shape[:contract])
        out = product_with(gradient_of_weight, 1, dtype, x.reshape(-1, inner), w.reshape(inner, -1))
        return out.reshape(*leading, *trailing)
    # Autodiff makes the weight's gradient as (gᵀ · x)ᵀ. XLA for CPUs turns a large activation around for that; xᵀ · g
    # it multiplies as it lies: 10 % of a step (docs/performance.md).
    if platform() == "cpu":
        return product_with(gradient_of_weight, contract, dtype, x, w)
    return product(contract, dtype, x, w)


def is_projection(path: Sequence[Any]) -> bool:
    """Whether a parameter is a matrix that `linear` multiplies and nothing else touches, told by its place in the tree:
    keys as `jax.tree_util.tree_map_with_path` gives them."""
    names = [getattr(key, "key", "") for key in path]
    return (len(names) > 1 and names[-2] in ("attention", "mlp", "shared") and names[-1] != "scale"
            and not names[-1].endswith("bias"))


def product(contract: int, out_dtype: Any, x: Array, w: Array) -> Array:
    """x · w, as `linear` says, of arrays of one dtype."""
    return _summed(x, w, range(x.ndim - contract, x.ndim), range(contract), out_dtype)


def gradient_of_weight(contract: int, out_dtype: Any, x: Array, g: Array) -> Array:
    """That of `product` by w, told by that of the result (g)."""
    kept = range(x.ndim - contract)
    return _summed(x, g, kept, kept, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def product_with(weight_gradient: Callable[..., Array], contract: int, out_dtype: Any, x: Array, w: Array) -> Array:
    """`product`, whose gradient by w is made by a function with the arguments of `gradient_of_weight`."""
    return product(contract, out_dtype, x, w)


def _forward(weight_gradient: Callable[..., Array], contract: int, out_dtype: Any, x: Array, w: Array) -> tuple[
        Array, tuple[Array, Array]]:
    return product(contract, out_dtype, x, w), (x, w)


def _backward(weight_gradient: Callable[..., Array], contract: int, out_dtype: Any, saved: tuple[Array, Array],
              g: Array) -> tuple[Array, Array]:
    x, w = saved
    kept = x.ndim - contract
    dx = _summed(g, w, range(kept, g.ndim), range(contract, w.ndim), out_dtype)
    return dx.astype(x.dtype), weight_gradient(contract, out_dtype, x, g).astype(w.dtype)


product_with.defvjp(_forward, _backward)


def _summed(x: Array, y: Array, x_axes: Sequence[int], y_axes: Sequence[int], dtype: Any) -> Array:
    return jax.lax.dot_general(x, y, ((tuple(x_axes), tuple(y_axes)), ((), ())), preferred_element_type=dtype)


def fan_in_normal(fan_in: int, scale: float = 1.0) -> Initializer:
    """Truncated normal with standard deviation scale / sqrt(fan_in): keeps the variance of a sum of fan_in inputs."""
    return nn.initializers.truncated_normal(scale * fan_in**-0.5)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · (offset + scale), in float32 whatever x's dtype (Zhang & Sennrich 2019,
    arXiv:1910.07467)."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        scale_D = weight(self, "scale", nn.initializers.constant(1.0 - self.offset), (x_BTD.shape[-1],), ("norm",))
        x32_BTD = x_BTD.astype(jnp.float32)
        inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + self.eps)
        scale_D = scale_D.astype(jnp.float32)
        return (x32_BTD * inverse_BT1 * (scale_D + self.offset if self.offset else scale_D)).astype(x_BTD.dtype)


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(variance + eps) · scale + bias, in float32 (Ba et al. 2016, arXiv:1607.06450)."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        d = x_BTD.shape[-1]
        scale_D = weight(self, "scale", nn.initializers.ones_init(), (d,), ("norm",))
        bias_D = weight(self, "bias", nn.initializers.zeros_init(), (d,), ("norm",))
        x32_BTD = x_BTD.astype(jnp.float32)
        centred_BTD = x32_BTD - jnp.mean(x32_BTD, axis=-1, keepdims=True)
        inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(centred_BTD), axis=-1, keepdims=True) + self.eps)
        out_BTD = centred_BTD * inverse_BT1 * scale_D.astype(jnp.float32) + bias_D.astype(jnp.float32)
        return out_BTD.astype(x_BTD.dtype)


def make_norm(config: ModelConfig, name: str | None = None) -> nn.Module:
    """The model's norm."""
    if config.norm == "layer":
        return LayerNorm(config.norm_eps, name=name)
    return RMSNorm(config.norm_eps, config.norm_offset, name=name)


def activation(name: str) -> Callable[[Array], Array]:
    """The nonlinearity that `ModelConfig.activation` names."""
    known: dict[str, Callable[[Array], Array]] = {
        "silu": nn.silu, "relu": nn.relu, "gelu": functools.partial(nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(nn.gelu, approximate=True)}
    return known[name]


def add_bias(module: nn.Module, name: str, x: Array, axes: Sequence[str], wanted: bool = True) -> Array:
    """x + bias, over x's last axes, one for each logical axis; x itself where no bias is wanted."""
    if not wanted:
        return x
    bias = weight(module, name, nn.initializers.zeros_init(), x.shape[-len(axes):], axes)
    return x + bias.astype(x.dtype)


class Mlp(nn.Module):
    """down(act(gate(x)) · up(x)), a gated layer (Shazeer 2020, arXiv:2002.05202), or down(act(up(x))), a plain one.

    Attributes:
      config: says which, with which activation and whether with biases.
      residual_scale: of the last projection's initial standard deviation.
      width: inner width (F); None takes the model's.
    """

    config: ModelConfig
    residual_scale: float
    width: int | None = None

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c, d, f = self.config, x_BTD.shape[-1], self.width or self.config.mlp_dim
        act = activation(c.activation)

        def inner(name: str) -> Array:
            kernel_DF = weight(self, name, fan_in_normal(d), (d, f), ("embed", "mlp"))
            return add_bias(self, f"{name}_bias", linear(x_BTD, kernel_DF), ("mlp",), c.mlp_bias)

        hidden_BTF = act(inner("gate")) * inner("up") if c.gated_mlp else act(inner("up"))
        hidden_BTF = nn.with_logical_constraint(hidden_BTF, ("batch", "length", "activation_mlp"))
        down_FD = weight(self, "down", fan_in_normal(f, self.residual_scale), (f, d), ("mlp", "embed"))
        return add_bias(self, "down_bias", linear(hidden_BTF, down_FD), ("embed",), c.mlp_bias)
