"""Training with matrix products in int8 or fp8, through qwix.

A projection y = x · w becomes three products of quantized matrices: y, and in the backward pass the gradients of x
and of w. Each operand has one scale for every row or column that is not summed over (its largest entry's), found anew
in each step; sums are int32 or float32. int8 rounds to whole numbers (Jacob et al. 2018, arXiv:1712.05877). fp8 is e4m3
for gradients too, as in DeepSeek-V3 (arXiv:2412.19437, section 3.3.2): with a scale a row its range is enough, and e5m2
rounds twice as coarsely. Rounding is taken for the identity in the gradient (Bengio et al. 2013, arXiv:1308.3432).

Embeddings, logits, norms, attention's own products, routers and experts' grouped products stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.models.layers import is_projection

Array = jax.Array

# Largest entries become 127 in int8. qwix would make them 127.5: half way between two numbers, where the last bit of a
# float32 decides, and with it how a program was compiled.
_FORMATS: dict[str, tuple[Any, str]] = {"int8": (jnp.int8, f"absmax,{127.5 / 127}"),
                                        "fp8": (jnp.float8_e4m3fn, "absmax")}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["kind"])
@dataclasses.dataclass(frozen=True)
class LowBit:
    """A weight that `models.layers.linear` multiplies in `kind`; `w` itself stays as it is."""

    w: Array
    kind: str

    def linear(self, x: Array, contract: int, out_dtype: Any) -> Array:
        """x · w in the low precision; arguments as those of `models.layers.linear`."""
        return _product(x, self.w, contract, self.kind).astype(out_dtype or x.dtype)


def wrapped_apply(apply: Callable[..., Any], matmul: str) -> Callable[..., Any]:
    """A model's `apply` whose projections are multiplied in `matmul`; it takes the same parameters.

    Args:
      apply: ({"params": params}, …) → anything.
      matmul: `PrecisionConfig.matmul`.

    Raises:
      UserError: qwix is not installed.
    """
    if matmul == "none":
        return apply
    _qwix()

    def wrap(path: tuple, leaf: Any) -> Any:
        return LowBit(leaf, matmul) if is_projection(path) else leaf

    def call(variables: dict[str, Any], *args: Any, **options: Any) -> Any:
        params = jax.tree_util.tree_map_with_path(wrap, variables["params"])
        return apply(variables | {"params": params}, *args, **options)

    return call


def _qwix() -> types.ModuleType:
    try:
        import qwix  # not needed, and a second to import, for any other run
    except ImportError as error:
        raise UserError("PrecisionConfig.matmul needs the package qwix: pip install qwix") from error
    return qwix


def _quantized(x: Array, kind: str, own_scale: Iterable[int]) -> Any:
    """A `qwix.QArray` with a scale for each index of the axes `own_scale`. From float32, as qwix keeps scales in the
    operand's dtype, and takes those that are small in it for 0."""
    dtype, calibration = _FORMATS[kind]
    return _qwix().quantize(x.astype(jnp.float32), dtype, channelwise_axes=tuple(own_scale),
                            calibration_method=calibration)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, w: Array, contract: int, kind: str) -> Array:
    """x [..., a1 .. an] · w [a1 .. an, ...] in float32, n = contract."""
    return _forward(x, w, contract, kind)[0]


def _forward(x: Array, w: Array, contract: int, kind: str) -> tuple[Array, tuple]:
    qwix, rows = _qwix(), x.ndim - contract
    quantized_x = _quantized(x, kind, range(rows))
    quantized_w = _quantized(w, kind, range(contract, w.ndim))
    dims = ((tuple(range(rows, x.ndim)), tuple(range(contract))), ((), ()))
    y = qwix.dot_general(quantized_x, quantized_w, dims, preferred_element_type=jnp.float32)
    return y, (quantized_x, quantized_w, jnp.zeros((), x.dtype), jnp.zeros((), w.dtype))


def _backward(contract: int, kind: str, kept: tuple, g: Array) -> tuple[Array, Array]:
    """A gradient is multiplied by the other operand's scales before it is itself rounded, so that what was rounded in
    the forward pass serves here too, whose scales lie along what is now summed over."""
    qwix = _qwix()
    quantized_x, quantized_w, like_x, like_w = kept
    rows, columns = g.ndim - (quantized_w.qvalue.ndim - contract), quantized_w.qvalue.ndim - contract
    row_axes, column_axes = tuple(range(rows)), tuple(range(rows, g.ndim))
    g = g.astype(jnp.float32)

    by_row = _quantized(g * quantized_w.scale.reshape(quantized_w.scale.shape[contract:]), kind, row_axes)
    dims = ((column_axes, tuple(range(contract, contract + columns))), ((), ()))
    dx = qwix.dot_general(by_row, quantized_w.qvalue, dims, preferred_element_type=jnp.float32)

    row_scale = quantized_x.scale.reshape(*quantized_x.scale.shape[:rows], *(1,) * columns)
    by_column = _quantized(g * row_scale, kind, column_axes)
    dims = ((row_axes, row_axes), ((), ()))
    dw = qwix.dot_general(quantized_x.qvalue, by_column, dims, preferred_element_type=jnp.float32)
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


_product.defvjp(_forward, _backward)
