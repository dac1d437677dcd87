"""Gated feed-forward layers of many experts, each of which takes no more than a fixed number of a row's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.kernels.grouped import Weights, gated

Array = jax.Array


def expert_capacity(factor: float, length: int, per_token: int, num_experts: int) -> int:
    """Tokens of a row of `length` that an expert takes: `factor` times its even share, ⌈factor · A · T / E⌉."""
    return min(math.ceil(factor * per_token * length / num_experts), length)


class Slots(NamedTuple):
    """Room for tokens, C of each row (B) in each expert (E).

    Attributes:
      x_EBCD: the tokens; zeros where a slot is empty.
      weight_EBC: float32, what the expert's result is multiplied by.
      position_EBC: int32, where in its row the token lies; T where the slot is empty.
    """

    x_EBCD: Array
    weight_EBC: Array
    position_EBC: Array


def capacity_mlp(x_BTD: Array, chosen_BTA: Array, weight_BTA: Array, weights: Weights,
                 activation: Callable[[Array], Array], capacity: int) -> Array:
    """Σ_a weight · expert_{chosen[…, a]}(x) over the choices for which there is room.

    Args:
      x_BTD, chosen_BTA, weight_BTA, capacity: see `filled_slots`.
      weights: gate [E, D, F], up [E, D, F] and down [E, F, D], in x's dtype.
      activation: of the gate.

    Returns:
      float32 [B, T, D]; zeros for a token that no expert had room for.
    """
    slots = filled_slots(x_BTD, chosen_BTA, weight_BTA, weights[0].shape[0], capacity)
    out_EBCD = slots_mlp(slots.x_EBCD, slots.weight_EBC, weights, activation)
    return emptied_slots(out_EBCD, slots.position_EBC, x_BTD.shape[1])


def filled_slots(x_BTD: Array, chosen_BTA: Array, weight_BTA: Array, num_experts: int, capacity: int) -> Slots:
    """Puts tokens into the slots of their experts, while there is room.

    Each row of the batch is a group of its own, as in GShard (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1): all
    first choices come before all second ones, and among equals the earlier position. The shapes don't depend on the
    routing, and each expert's tokens are one matrix product.

    Args:
      x_BTD: tokens.
      chosen_BTA: int32, the experts each token is sent to, best first, all different; a number outside 0 … E − 1 sends
        it nowhere and takes nobody's place.
      weight_BTA: float32, what an expert's result is multiplied by.
      num_experts: E.
      capacity: tokens of a row that an expert takes (C).
    """

    def fill(x_TD: Array, chosen_TA: Array, weight_TA: Array) -> Slots:
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
        return Slots(x_TD.at[position_EC].get(mode="fill", fill_value=0), weight_S.reshape(num_experts, capacity),
                     position_EC)

    return jax.vmap(fill, out_axes=1)(x_BTD, chosen_BTA, weight_BTA)


def shared_slots(slots: Slots, parts: int, part: Array, length: int) -> Slots:
    """One of `parts` equal parts of each expert's slots of each row; the last may end with slots that are empty."""
    spare = -slots.position_EBC.shape[2] % parts
    size = (slots.position_EBC.shape[2] + spare) // parts

    def own(array: Array, empty: int) -> Array:
        widths = [(0, spare if axis == 2 else 0) for axis in range(array.ndim)]
        padded = jnp.pad(array, widths, constant_values=empty)
        return jax.lax.dynamic_slice_in_dim(padded, part * size, size, axis=2)

    return Slots(own(slots.x_EBCD, 0), own(slots.weight_EBC, 0), own(slots.position_EBC, length))


def slots_mlp(x_EBCD: Array, weight_EBC: Array, weights: Weights, activation: Callable[[Array], Array]) -> Array:
    """What the experts make of their slots: float32 [E, B, C, D]."""
    flat = (x_EBCD.shape[0], -1)
    return gated(x_EBCD.reshape(*flat, x_EBCD.shape[-1]), weight_EBC.reshape(flat), weights,
                 activation).reshape(x_EBCD.shape)


def emptied_slots(out_EBCD: Array, position_EBC: Array, length: int) -> Array:
    """The slots' results, added up where their tokens came from: float32 [B, T, D], T = `length`."""

    def empty(out_ECD: Array, position_EC: Array) -> Array:
        zeros_TD = jnp.zeros((length, out_ECD.shape[-1]), jnp.float32)
        return zeros_TD.at[position_EC].add(out_ECD.astype(jnp.float32), mode="drop")

    return jax.vmap(empty, in_axes=1)(out_EBCD, position_EBC)
