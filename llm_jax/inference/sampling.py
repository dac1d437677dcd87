"""Drawing the next token, on the device, without sorting the vocabulary.

A draw is the Gumbel-max trick: argmax over the allowed tokens of logit / temperature + g, where g is a hash of
(seed, sample, position, token id). So a draw depends on nothing else: not on the batch, not on how the allowed tokens
were found, not on the size that the vocabulary is padded to. Two models that draw with the same noise mostly agree
where their distributions do (Daliri et al. 2024, arXiv:2408.07978), which is what speculation lives on.

The allowed tokens of top-k and top-p are the first so many in the order of falling logits (of rising ids among equals).
Where the best few candidates hold them all, the draw is among these. Else it looks at all tokens: whether one is
allowed is a sum over those before it, and no sort. So: take the best of all; while it is not allowed, take the best of
those before it, as nothing behind it is allowed either. What this ends with is the best allowed token, exactly. One
outside comes up only with the probability that lies outside, and each that does halves what is left of that on
average, so a few rounds do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

# How many of the best are looked at first, on a CPU, where finding them is cheap. XLA sorts the whole vocabulary for so
# many on a GPU, where a round over all tokens costs little.
CANDIDATES = 64

# exp(x) is 0 in float32 below this.
_NO_MASS = -104.0

# A block of the hash makes two words: the noise of two ids, so far apart that no lane of a vector has to move.
_LANES = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters of R rows.

    Attributes:
      temperature_R: float32; 0 is greedy.
      top_k_R: int32; 0 is off.
      top_p_R: float32; 1 is off.
      min_p_R: float32; 0 is off.
      key_R2: uint32, the row's random key: `row_key`.
    """

    temperature_R: Any
    top_k_R: Any
    top_p_R: Any
    min_p_R: Any
    key_R2: Any


def row_key(seed: int, number: int, position: int) -> tuple[int, int]:
    """The random key, two 32-bit words, of sample `number` of a request at a position (the drawn token's index).

    Made on the host: it costs a microsecond there, and a compile of a few more hashes in every step here.
    """
    digest = hashlib.blake2b(struct.pack("<QII", seed, number, position), digest_size=8).digest()
    return struct.unpack("<II", digest)  # type: ignore[return-value]


def greedy(logits_RV: Array) -> tuple[Array, Array]:
    """The likeliest token of each row, the first of equals, and its log-probability: `sample` at temperature 0."""
    token_R, _ = _first_best(logits_RV)
    return token_R, log_probability(logits_RV, token_R)


def sample(logits_RV: Array, batch: SamplingBatch, raw_RV: Array | None = None) -> tuple[Array, Array]:
    """Draws one token a row.

    A token whose logit is -inf is never drawn and counts for nothing. Where every logit of a row is -inf the token
    is 0 (`penalties.shaped` never leaves a row so); a row with a NaN gives some token. Neither touches other rows.

    Args:
      logits_RV: float32.
      batch: how each row is drawn. Temperature comes first, then top-k, top-p (of the probability that top-k leaves)
        and min-p (relative to the likeliest token).
      raw_RV: the logits that log-probabilities are told of, if not those drawn from.
    Returns:
      int32 tokens [R], and their float32 log-probabilities [R] under softmax(raw).
    """
    best_R, max_R = _first_best(logits_RV)
    token_R = jax.lax.cond(jnp.any(batch.temperature_R > 0), lambda: _draw(logits_RV, max_R, batch, best_R),
                           lambda: best_R)
    return token_R, log_probability(logits_RV if raw_RV is None else raw_RV, token_R)


def log_probability(logits_RV: Array, token_R: Array) -> Array:
    """Natural log-probability, float32 [R], of a token a row under softmax(logits); -inf where the logit is."""
    chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1)[:, 0]
    return jnp.where(chosen_R == -jnp.inf, -jnp.inf, chosen_R - jax.nn.logsumexp(logits_RV, axis=-1))


def _draw(logits_RV: Array, max_R: Array, batch: SamplingBatch, best_R: Array) -> Array:
    sampled_R = batch.temperature_R > 0
    # Less the best, so that a tiny temperature makes the others -inf and not the best inf.
    ahead_RV = logits_RV - jnp.where(jnp.isfinite(max_R), max_R, 0.0)[:, None]
    # Nor smaller than the least normal number: one that the hardware takes for 0 would make the best 0 / 0.
    temperature_R = jnp.where(sampled_R, jnp.maximum(batch.temperature_R, jnp.finfo(jnp.float32).tiny), 1.0)
    x_RV = ahead_RV / temperature_R[:, None]
    limited_R = sampled_R & ((batch.top_k_R > 0) | (batch.top_p_R < 1))
    few_R, token_R = jnp.zeros_like(sampled_R), best_R
    if CANDIDATES and jax.default_backend() == "cpu":
        few_R, token_R = jax.lax.cond(jnp.any(limited_R), lambda: _draw_from_candidates(x_RV, batch, limited_R),
                                      lambda: (few_R, token_R))
    rest_R = sampled_R & ~few_R
    full_R = jax.lax.cond(jnp.any(rest_R), lambda: _draw_from_all(x_RV, batch, rest_R, limited_R), lambda: token_R)
    return jnp.where(rest_R, full_R, jnp.where(sampled_R, token_R, best_R))


def _draw_from_candidates(x_RV: Array, batch: SamplingBatch, limited_R: Array) -> tuple[Array, Array]:
    """Says which of the limited rows have all allowed tokens among the best CANDIDATES, and draws these rows."""
    count = min(CANDIDATES, x_RV.shape[1])
    x_RC, id_RC = best(x_RV, count)
    by_k_R = batch.top_k_R > 0
    in_k_RC = jnp.arange(count) < jnp.where(by_k_R, batch.top_k_R, count)[:, None]
    p_RC = jnp.where(in_k_RC, jnp.exp(x_RC), 0.0)
    found_R = jnp.sum(p_RC, axis=-1)
    # A pass over the vocabulary that top-k makes unnecessary.
    total_R = jax.lax.cond(jnp.any(limited_R & ~by_k_R), lambda: jnp.sum(jnp.exp(x_RV), axis=-1), lambda: found_R)
    total_R = jnp.where(by_k_R, found_R, total_R)
    mass_R = batch.top_p_R * total_R
    before_RC = jnp.cumsum(p_RC, axis=-1) - p_RC
    min_x_R = jnp.log(batch.min_p_R)
    # The first is allowed whatever rounding says; the others as long as those before fall short of top_p.
    allowed_RC = in_k_RC & (x_RC >= min_x_R[:, None]) & (
        (before_RC < mass_R[:, None]) | (batch.top_p_R[:, None] >= 1) | (jnp.arange(count) == 0))
    all_in_k_R = by_k_R & (batch.top_k_R <= count)
    all_in_p_R = ~by_k_R & (batch.top_p_R < 1) & (found_R >= mass_R)
    all_in_min_p_R = (x_RC[:, -1] < min_x_R) & (~by_k_R | (batch.top_p_R >= 1))
    few_R = limited_R & (all_in_k_R | all_in_p_R | all_in_min_p_R | (count == x_RV.shape[1]))
    noisy_RC = jnp.where(allowed_RC, x_RC + gumbel_of(batch.key_R2, id_RC), -jnp.inf)
    return few_R, jnp.take_along_axis(id_RC, _first_best(noisy_RC)[0][:, None], axis=-1)[:, 0]


def _draw_from_all(x_RV: Array, batch: SamplingBatch, rows_R: Array, limited_R: Array) -> Array:
    noisy_RV = jnp.where(x_RV >= jnp.log(batch.min_p_R)[:, None], x_RV + gumbel(batch.key_R2, x_RV.shape[1]), -jnp.inf)
    token_R, _ = _first_best(noisy_RV)
    limited_R = rows_R & limited_R
    return jax.lax.cond(jnp.any(limited_R), lambda: _within_limits(x_RV, noisy_RV, batch, limited_R, token_R),
                        lambda: token_R)


def _within_limits(x_RV: Array, noisy_RV: Array, batch: SamplingBatch, limited_R: Array, token_R: Array) -> Array:
    """From the best token of all to the best that top-k and top-p allow, in the rows that have such limits."""
    by_k_R, by_p_R = limited_R & (batch.top_k_R > 0), limited_R & (batch.top_p_R < 1)
    both_R = by_k_R & by_p_R
    p_RV = jnp.exp(x_RV)
    total_R = jnp.sum(p_RV, axis=-1)
    total_R = jax.lax.cond(jnp.any(both_R), lambda: jnp.where(both_R, _mass_of_best(x_RV, batch.top_k_R, both_R),
                                                              total_R), lambda: total_R)
    # A token is allowed if what comes before it measures less than this: so many tokens, or so much probability.
    # With both limits the second is enough, being a part of what the k best have.
    limit_R = jnp.where(by_p_R, batch.top_p_R * total_R, batch.top_k_R.astype(jnp.float32))
    measure_RV = jnp.where(by_p_R[:, None], p_RV, 1.0)
    ids_V = jnp.arange(x_RV.shape[1], dtype=jnp.int32)

    def before(token_R: Array) -> Array:
        at_R1 = jnp.take_along_axis(x_RV, token_R[:, None], axis=-1)
        return (x_RV > at_R1) | ((x_RV == at_R1) & (ids_V < token_R[:, None]))

    def outside(token_R: Array) -> Array:
        measured_R = jnp.sum(jnp.where(before(token_R), measure_RV, 0.0), axis=-1)
        return limited_R & (measured_R >= limit_R) & (measured_R > 0)  # nothing before it: allowed whatever was asked

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        token_R, out_R = state
        next_R, _ = _first_best(jnp.where(before(token_R), noisy_RV, -jnp.inf))
        token_R = jnp.where(out_R, next_R, token_R)
        return token_R, outside(token_R)

    return jax.lax.while_loop(lambda s: jnp.any(s[1]), step, (token_R, outside(token_R)))[0]


def _mass_of_best(x_RV: Array, k_R: Array, rows_R: Array) -> Array:
    """The sum of exp(x) over the k greatest x of each row, where the greatest of all is 0.

    Halves the interval in which a threshold with k above it must be until one is found. After 32 times what is left in
    the interval is equal as far as its exponential can tell.
    """

    def unsure(state: tuple[Array, ...]) -> Array:
        _, _, above_R, i = state
        return (i < 32) & jnp.any(rows_R & (above_R != k_R))

    def halve(state: tuple[Array, ...]) -> tuple[Array, ...]:
        low_R, high_R, above_R, i = state
        middle_R = (low_R + high_R) / 2
        count_R = jnp.sum((x_RV >= middle_R[:, None]).astype(jnp.int32), axis=-1)
        few_R = count_R <= k_R
        return (jnp.where(few_R, low_R, middle_R), jnp.where(few_R, middle_R, high_R),
                jnp.where(few_R, count_R, above_R), i + 1)

    R = x_RV.shape[0]
    start = (jnp.full(R, _NO_MASS), jnp.full(R, 1.0), jnp.zeros(R, jnp.int32), jnp.int32(0))
    low_R, high_R, above_R, _ = jax.lax.while_loop(unsure, halve, start)
    inside_R = jnp.sum(jnp.where(x_RV >= high_R[:, None], jnp.exp(x_RV), 0.0), axis=-1)
    return inside_R + jnp.where(above_R < k_R, (k_R - above_R) * jnp.exp(low_R), 0.0)


def best(x_RV: Array, count: int) -> tuple[Array, Array]:
    """`jax.lax.top_k` that stays one: values and int32 ids [R, count], of equals the first first.

    XLA finds its top-k in a sort and slices of it; a slice of the result melts into those, and what is left is the
    sort, thirty times as slow. A barrier keeps them apart: one for each, as XLA aborts on one for both on a mesh.
    """
    value_RC, id_RC = jax.lax.top_k(x_RV, count)
    return jax.lax.optimization_barrier(value_RC), jax.lax.optimization_barrier(id_RC)


def _first_best(x_RV: Array) -> tuple[Array, Array]:
    """The index of the greatest of each row (the first of equals) and its value; some index of the row with a NaN.

    Two simple reductions; XLA's own argmax reduces pairs, which takes five times as long on a CPU.
    """
    V = x_RV.shape[1]
    max_R = jnp.max(x_RV, axis=-1)
    first_R = jnp.min(jnp.where(x_RV == max_R[:, None], jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)
    return first_R, max_R


def gumbel(key_R2: Array, vocab_size: int) -> Array:
    """Standard Gumbel noise, float32 [R, V], of every token id under each row's key; an id's does not depend on V."""
    blocks = -(-vocab_size // (2 * _LANES))
    counter = jnp.arange(blocks * _LANES, dtype=jnp.uint32).reshape(1, blocks, 1, _LANES)
    words = jnp.concatenate(threefry_2x32(key_R2[:, :, None, None, None], counter), axis=2)
    return _gumbel(words.reshape(key_R2.shape[0], -1)[:, :vocab_size])


def gumbel_of(key_R2: Array, id_RC: Array) -> Array:
    """The same noise of the ids given."""
    block, lane = id_RC // (2 * _LANES), id_RC % _LANES
    first, second = threefry_2x32(key_R2[:, :, None], (block * _LANES + lane).astype(jnp.uint32))
    return _gumbel(jnp.where(id_RC // _LANES % 2 == 0, first, second))


def _gumbel(words: Array) -> Array:
    uniform = jnp.minimum((words.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32), jnp.float32(1 - 2.0**-24))
    # log1p keeps all 32 bits where they matter: small uniforms are the large values of the noise.
    return -jnp.log(-jnp.log1p(-uniform))


def threefry_2x32(key_R2: Array, counter: Array) -> tuple[Array, Array]:
    """The hash under JAX's own random numbers: Threefry-2x32 with 20 rounds (Salmon et al. 2011, SC'11).

    Written out, XLA fuses it with what it is for; `jax.random` keeps it in a loop of its own on a CPU.

    Args:
      key_R2: uint32, the two words of a key in its second axis.
      counter: uint32, the second word of the block; the first is 0. Broadcasts with each half of the key.
    Returns:
      The block's two words, uint32.
    """
    low, high = key_R2[:, 0], key_R2[:, 1]
    keys = (low, high, low ^ high ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = jnp.zeros_like(counter) + low, counter + high
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << turn) | (x1 >> (32 - turn)))
        x0, x1 = x0 + keys[(group + 1) % 3], x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1
