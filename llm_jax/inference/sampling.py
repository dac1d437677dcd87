"""Drawing the next token, on the device, without sorting the vocabulary.

A draw is the Gumbel-max trick: argmax over the allowed tokens of logit / temperature + g, where g is a hash of
(seed, sample, position, token id). The noise of a token does not depend on how the allowed set was found, nor on what
else is in the batch, so neither does the draw.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import jax
import jax.numpy as jnp

Array = jax.Array

# Rows whose allowed tokens are among this many best never look at the rest. XLA has a top-k of its own for so many; on
# a GPU it has one for 16 only, and would sort the whole vocabulary for more.
CANDIDATES = 64
GPU_CANDIDATES = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters of R rows.

    Attributes:
      temperature_R: float32; 0 is greedy.
      top_k_R: int32; 0 is off.
      top_p_R: float32; 1 is off.
      key_R2: uint32, the row's random key: `row_key`.
    """

    temperature_R: Array
    top_k_R: Array
    top_p_R: Array
    key_R2: Array


def row_key(seed: int, number: int, position: int) -> tuple[int, int]:
    """The random key, two 32-bit words, of sample `number` of a request at a position (the drawn token's index).

    Made on the host: it costs a microsecond there, and a compile of a few more hashes in every step here.
    """
    digest = hashlib.blake2b(struct.pack("<QII", seed, number, position), digest_size=8).digest()
    return struct.unpack("<II", digest)  # type: ignore[return-value]


def sample(logits_RV: Array, batch: SamplingBatch) -> tuple[Array, Array]:
    """Draws one token a row.

    Args:
      logits_RV: float32.
      batch: how each row is drawn; top-k is applied before top-p, as elsewhere.
    Returns:
      int32 tokens [R], and their float32 log-probabilities [R] under softmax(logits).
    """
    greedy_R = jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)
    token_R = jax.lax.cond(jnp.any(batch.temperature_R > 0), lambda: _draw(logits_RV, batch, greedy_R),
                           lambda: greedy_R)
    chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1)[:, 0]
    return token_R, chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)


def _draw(logits_RV: Array, batch: SamplingBatch, greedy_R: Array) -> Array:
    sampled_R = batch.temperature_R > 0
    # Less the best, so that a tiny temperature makes the others -inf and not the best inf.
    ahead_RV = logits_RV - jnp.max(logits_RV, axis=-1, keepdims=True)
    scaled_RV = ahead_RV / jnp.where(sampled_R, batch.temperature_R, 1.0)[:, None]
    key_R = jax.random.wrap_key_data(batch.key_R2, impl="threefry2x32")
    short_R, few_R = _draw_from_candidates(scaled_RV, batch, key_R)
    needs_all_R = sampled_R & ~few_R
    full_R = jax.lax.cond(jnp.any(needs_all_R), lambda: _draw_from_all(scaled_RV, batch, key_R, needs_all_R),
                          lambda: short_R)
    return jnp.where(sampled_R, jnp.where(few_R, short_R, full_R), greedy_R)


def _draw_from_candidates(scaled_RV: Array, batch: SamplingBatch, key_R: Array) -> tuple[Array, Array]:
    """Draws among the best CANDIDATES tokens; also says for which rows these hold all allowed ones."""
    count = min(GPU_CANDIDATES if jax.default_backend() == "gpu" else CANDIDATES, scaled_RV.shape[1])
    value_RC, id_RC = jax.lax.top_k(scaled_RV, count)
    limited_R = batch.top_k_R > 0
    in_k_RC = jnp.arange(count) < jnp.where(limited_R, batch.top_k_R, count)[:, None]
    total_R = jnp.where(limited_R, jax.nn.logsumexp(jnp.where(in_k_RC, value_RC, -jnp.inf), axis=-1),
                        jax.nn.logsumexp(scaled_RV, axis=-1))
    p_RC = jnp.where(in_k_RC, jnp.exp(value_RC - total_R[:, None]), 0.0)
    before_RC = jnp.cumsum(p_RC, axis=-1) - p_RC
    # The first is allowed whatever rounding says; the others as long as those before fall short of top_p.
    allowed_RC = in_k_RC & ((before_RC < batch.top_p_R[:, None]) | (jnp.arange(count) == 0))
    few_R = (limited_R & (batch.top_k_R <= count)) | (
        ~limited_R & (batch.top_p_R < 1) & (jnp.sum(p_RC, axis=-1) >= batch.top_p_R))
    noisy_RC = jnp.where(allowed_RC, value_RC + jax.vmap(_gumbel)(key_R, id_RC), -jnp.inf)
    best_R = jnp.argmax(noisy_RC, axis=-1)
    return jnp.take_along_axis(id_RC, best_R[:, None], axis=-1)[:, 0].astype(jnp.int32), few_R


def _draw_from_all(scaled_RV: Array, batch: SamplingBatch, key_R: Array, rows_R: Array) -> Array:
    """Draws from the whole vocabulary, the allowed set given by a threshold found by bisection on the logits' bits."""
    R, V = scaled_RV.shape
    limited_R = (batch.top_k_R > 0) & (batch.top_k_R < V)

    def threshold() -> Array:
        order_RV = _ordered_bits(scaled_RV)
        kth_R = _largest_threshold(order_RV, jnp.ones((R, V), jnp.float32),
                                   jnp.where(limited_R, batch.top_k_R, 0).astype(jnp.float32))
        in_k_RV = ~limited_R[:, None] | (order_RV >= kth_R[:, None])
        p_RV = jax.nn.softmax(jnp.where(in_k_RV, scaled_RV, -jnp.inf), axis=-1)
        nucleus_R = _largest_threshold(order_RV, p_RV, batch.top_p_R)
        return in_k_RV & ((batch.top_p_R[:, None] >= 1) | (order_RV >= nucleus_R[:, None]))

    allowed_RV = jax.lax.cond(jnp.any(rows_R & (limited_R | (batch.top_p_R < 1))), threshold,
                              lambda: jnp.ones((R, V), bool))
    ids_V = jnp.arange(V, dtype=jnp.int32)
    noise_RV = jax.vmap(lambda key: _gumbel(key, ids_V))(key_R)
    return jnp.argmax(jnp.where(allowed_RV, scaled_RV + noise_RV, -jnp.inf), axis=-1).astype(jnp.int32)


def _ordered_bits(x: Array) -> Array:
    """uint32 in the same order as the float32 `x`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(order_RV: Array, measure_RV: Array, target_R: Array) -> Array:
    """Per row the largest uint32 t with sum of measure over {order ≥ t} at least target; 0 if there is none.

    32 reductions, one a bit; ties at the threshold are all in.
    """

    def bit(i: Array, t_R: Array) -> Array:
        trial_R = t_R | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        enough_R = jnp.sum(jnp.where(order_RV >= trial_R[:, None], measure_RV, 0.0), axis=-1) >= target_R
        return jnp.where(enough_R, trial_R, t_R)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(order_RV.shape[0], jnp.uint32))


def _gumbel(key: Array, ids: Array) -> Array:
    """Standard Gumbel noise of each token id under one key."""
    # Folding in a counter is one threefry block; its output is as random as a draw from the folded key would be.
    words = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(key, i))[0])(ids)
    uniform = jnp.minimum((words.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32), jnp.float32(1 - 2.0**-24))
    # log1p keeps all 32 bits where they matter: small uniforms are the large values of the noise.
    return -jnp.log(-jnp.log1p(-uniform))
