"""Gated feed-forward layers of many experts, each of which takes no more than a fixed number of a row's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax.kernels.grouped import Weights, gated

Array = jax.Array


def expert_capacity(factor: float, length: int, per_token: int, num_experts: int) -> int:
    """Tokens of a row of `length` that an expert takes: `factor` times its even share, ⌈factor · A · T / E⌉."""
    return min(math.ceil(factor * per_token * length / num_experts), length)


def capacity_mlp(x_BTD: Array, chosen_BTA: Array, weight_BTA: Array, weights: Weights,
                 activation: Callable[[Array], Array], capacity: int) -> Array:
    """Σ_a weight · expert_{chosen[…, a]}(x) over the choices for which there is room.

    Each row of the batch is a group of its own, as in GShard (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1): all
    first choices come before all second ones, and among equals the earlier position. The shapes don't depend on the
    routing, and each expert's tokens are one matrix product.

    Args:
      x_BTD: tokens.
      chosen_BTA: int32, the experts each token is sent to, best first, all different; a number outside 0 … E − 1 sends
        it nowhere and takes nobody's place.
      weight_BTA: float32, what an expert's result is multiplied by.
      weights: gate [E, D, F], up [E, D, F] and down [E, F, D], in x's dtype.
      activation: of the gate.
      capacity: tokens of a row that an expert takes (C).

    Returns:
      float32 [B, T, D]; zeros for a token that no expert had room for.
    """
    num_experts = weights[0].shape[0]

    def to_slots(x_TD: Array, chosen_TA: Array, weight_TA: Array) -> tuple[Array, Array, Array]:
        """The experts' slots filled from one row: tokens [E, C, D], their weights and their positions (T if empty)."""
        length, per_token = chosen_TA.shape
        expert_R = chosen_TA.T.reshape(-1)  # by rank of the choice, then by position
        is_for_RE = expert_R[:, None] == jnp.arange(num_experts)
        place_R = jnp.sum(jnp.where(is_for_RE, jnp.cumsum(is_for_RE, axis=0) - 1, 0), axis=1)
        has_room_R = jnp.any(is_for_RE, axis=1) & (place_R < capacity)
        slot_R = jnp.where(has_room_R, expert_R * capacity + place_R, num_experts * capacity)
        choice_S = jnp.full(num_experts * capacity, per_token * length).at[slot_R].set(
            jnp.arange(per_token * length), mode="drop")
        is_used_S = choice_S < per_token * length
        position_EC = jnp.where(is_used_S, choice_S % length, length).reshape(num_experts, capacity)
        weight_S = weight_TA.T.reshape(-1).at[choice_S].get(mode="fill", fill_value=0)
        return (x_TD.at[position_EC].get(mode="fill", fill_value=0), weight_S.reshape(num_experts, capacity),
                position_EC)

    slots_EBCD, weight_EBC, position_EBC = jax.vmap(to_slots, out_axes=1)(x_BTD, chosen_BTA, weight_BTA)
    flat = (num_experts, -1)
    out_EBCD = gated(slots_EBCD.reshape(*flat, x_BTD.shape[-1]), weight_EBC.reshape(flat), weights,
                     activation).reshape(slots_EBCD.shape)

    def from_slots(out_ECD: Array, position_EC: Array) -> Array:
        return jnp.zeros(x_BTD.shape[1:], jnp.float32).at[position_EC].add(out_ECD, mode="drop")

    return jax.vmap(from_slots, in_axes=1)(out_EBCD, position_EBC)
