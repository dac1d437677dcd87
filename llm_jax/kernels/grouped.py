"""Gated feed-forward layers of many experts, without dropping a token and without padding experts to one size.

Tokens are sorted by expert, each expert's are cut into blocks of rows, and a loop runs over the blocks: as many trips
as there are blocks in use, each multiplying its rows by its own expert's matrices. So the work follows the tokens (as
in MegaBlocks, Gale et al. 2022, arXiv:2211.15841), the memory is one block's besides inputs and outputs, and one
compiled program serves every way in which tokens may fall on experts. (`jax.lax.ragged_dot` multiplies every row by
every expert's matrices on CPU, which is 4 × slower with 8 experts and 60 × with 64, and keeps the hidden layer of all.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Weights = tuple[Array, Array, Array]


def gated(x_MD: Array, weight_M: Array, weights: Weights, activation: Callable[[Array], Array]) -> Array:
    """weight · down(act(gate(x)) · up(x)) of one expert, or of each where all arrays have a leading axis of experts.

    The routing weight multiplies the hidden layer and not the result: the backward pass then needs no output.

    Returns:
      float32 [..., M, D].
    """
    gate_DF, up_DF, down_FD = weights
    hidden_MF = activation(_matmul(x_MD, gate_DF)) * _matmul(x_MD, up_DF)
    hidden_MF = (hidden_MF.astype(jnp.float32) * weight_M[..., None]).astype(x_MD.dtype)
    return _matmul(hidden_MF, down_FD, jnp.float32)


def _matmul(x: Array, w: Array, out_dtype: jnp.dtype | None = None) -> Array:
    return jnp.matmul(x, w, preferred_element_type=out_dtype or x.dtype)


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a block: a power of two, a quarter to a half of an even load, so that little of the last is padding.

    With fewer rows than experts a block would hold little but padding: single rows then, and products with vectors.
    """
    if num_rows < num_experts:
        return 1
    half = num_rows // (2 * num_experts)
    return min(max(1 << max(half.bit_length() - 1, 0), 8), 256)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_mlp(x_ND: Array, chosen_NA: Array, weight_NA: Array, weights: Weights,
                activation: Callable[[Array], Array]) -> Array:
    """Σ_a weight[n, a] · expert_{chosen[n, a]}(x[n]), each expert a gated feed-forward layer.

    Args:
      x_ND: tokens.
      chosen_NA: int32, the experts each token is sent to, all different; a number outside 0 … E − 1 sends it nowhere.
      weight_NA: float32, what an expert's result is multiplied by.
      weights: gate [E, D, F], up [E, D, F] and down [E, F, D], in x's dtype.
      activation: of the gate.

    Returns:
      float32 [N, D].
    """
    work = _Work(chosen_NA, weights[0].shape[0])

    def trip(i: Array, y_ND: Array) -> Array:
        expert, token_M, row_M = work.block(i)
        out_MD = gated(_rows(x_ND, token_M), _rows(weight_NA.reshape(-1), row_M), _of(weights, expert), activation)
        return y_ND.at[token_M].add(out_MD, mode="drop")

    return jax.lax.fori_loop(0, work.num_blocks, trip, jnp.zeros(x_ND.shape, jnp.float32))


def _forward(x_ND: Array, chosen_NA: Array, weight_NA: Array, weights: Weights,
             activation: Callable[[Array], Array]) -> tuple[Array, tuple]:
    return grouped_mlp(x_ND, chosen_NA, weight_NA, weights, activation), (x_ND, chosen_NA, weight_NA, weights)


def _backward(activation: Callable[[Array], Array], saved: tuple, dy_ND: Array) -> tuple:
    """Block by block again: each computes its hidden layer anew, so nothing of the size of all blocks is ever kept."""
    x_ND, chosen_NA, weight_NA, weights = saved
    work = _Work(chosen_NA, weights[0].shape[0])

    def trip(i: Array, sums: tuple) -> tuple:
        dx_ND, dweight_R, dweights = sums
        expert, token_M, row_M = work.block(i)
        inputs = (_rows(x_ND, token_M), _rows(weight_NA.reshape(-1), row_M), _of(weights, expert))
        _, transpose = jax.vjp(functools.partial(gated, activation=activation), *inputs)
        dx_MD, dweight_M, dmatrices = transpose(_rows(dy_ND, token_M))
        return (dx_ND.at[token_M].add(dx_MD.astype(jnp.float32), mode="drop"),
                dweight_R.at[row_M].set(dweight_M, mode="drop"),
                jax.tree.map(lambda total, d: total.at[expert].add(d.astype(jnp.float32)), dweights, dmatrices))

    zeros = (jnp.zeros(x_ND.shape, jnp.float32), jnp.zeros(weight_NA.size, jnp.float32),
             jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights))
    dx_ND, dweight_R, dweights = jax.lax.fori_loop(0, work.num_blocks, trip, zeros)
    dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    return dx_ND.astype(x_ND.dtype), None, dweight_R.reshape(weight_NA.shape), dweights


grouped_mlp.defvjp(_forward, _backward)


class _Work:
    """Which rows (a token's choices, R = N · A of them) make up which block."""

    def __init__(self, chosen_NA: Array, num_experts: int):
        expert_R = chosen_NA.reshape(-1)
        self.num_tokens, self.per_token = chosen_NA.shape
        self.size = block_rows(expert_R.size, num_experts)
        is_for_ER = expert_R == jnp.arange(num_experts, dtype=expert_R.dtype)[:, None]
        count_E = jnp.sum(is_for_ER, axis=1, dtype=jnp.int32)
        somewhere_R = (expert_R >= 0) & (expert_R < num_experts)
        order_R = jnp.argsort(jnp.where(somewhere_R, expert_R, num_experts), stable=True).astype(jnp.int32)
        self.order_R = jnp.pad(order_R, (0, self.size))
        self.end_E = jnp.cumsum(count_E)
        self.start_E = self.end_E - count_E
        blocks_E = (count_E + self.size - 1) // self.size
        self.block_end_E = jnp.cumsum(blocks_E)
        self.block_start_E = self.block_end_E - blocks_E
        self.num_blocks = self.block_end_E[-1]

    def block(self, i: Array) -> tuple[Array, Array, Array]:
        """Block i's expert, and its rows' tokens and numbers; where there is no row, numbers past the last."""
        expert = jnp.sum(self.block_end_E <= i, dtype=jnp.int32)
        first = self.start_E[expert] + (i - self.block_start_E[expert]) * self.size
        row_M = jax.lax.dynamic_slice(self.order_R, (first,), (self.size,))
        is_row_M = first + jnp.arange(self.size, dtype=jnp.int32) < self.end_E[expert]
        row_M = jnp.where(is_row_M, row_M, self.num_tokens * self.per_token)
        return expert, row_M // self.per_token, row_M


def _rows(array: Array, index_M: Array) -> Array:
    return jnp.asarray(array).at[index_M].get(mode="fill", fill_value=0)


def _of(weights: Weights, expert: Array) -> Weights:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, expert, 0, keepdims=False), weights)
