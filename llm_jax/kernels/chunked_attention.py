"""Attention in blocks of queries and keys: memory grows with a row's length, not with its square.

Forward, a block of queries walks over blocks of keys with the online softmax of Milakov & Gimelshein (2018,
arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682). What is kept for the backward pass is the output and, of each
query, its largest score and what its exponentials sum to; the scores are computed again, block by block
(FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2). Pairs of blocks in which causality or the window rules
everything out are not visited: the list of pairs is static, so a compiled program says how often its loop runs.

Plain JAX, for every platform and under any sharding of rows and heads. `partial_attention` and `merge` are the same for
a caller that holds a part of a row's keys at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.attention_call import platform

Array = jax.Array

# Finite, so that a row in which everything is masked gives a mean and not NaN; large enough that exp() is exactly 0.
MASKED = -1e30
# Of what is not there at all (keys that fill up the last block, a query before its first key): 0 beside MASKED too.
ABSENT = -2e30

_CPU_SCORES = 2**19

# What `Execution.remat="save_attention"` keeps.
SAVED = "attention"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What of a call is static.

    Attributes:
      causal, window, soft_cap: as of `attention.attention`.
      block_q, block_k: tokens of a block.
      pairs: (block of queries, block of keys), in the order they are visited.
      looks: whether each pair is looked at first, and passed by where no query of it sees a key by position.
      padded: whether the last block of keys is filled up with absent ones.
      dtype: of the output.
    """

    causal: bool
    window: int | None
    soft_cap: float | None
    block_q: int
    block_k: int
    pairs: tuple[tuple[int, int], ...]
    looks: bool
    padded: bool
    dtype: str


def chunked_attention(q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, *, scale: float, causal: bool = True,
                      segment_ids_BT: Array | None = None, key_segment_ids_BS: Array | None = None,
                      window: int | None = None, soft_cap: float | None = None,
                      block: tuple[int, int] | None = None) -> Array:
    """What `attention.dense_attention` computes, but for a bias, in blocks.

    Args:
      q_BTHK, k_BSGK, v_BSGV, scale, window, soft_cap: as of `attention.attention`.
      causal, segment_ids_BT, key_segment_ids_BS: as of `attention.DenseContext`.
      block: tokens of a block of queries, and of a block of keys; None takes what `default_block` says.
    Returns:
      [B, T, H, V] in q's dtype.
    """
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    if segment_ids_BT is not None and key_segment_ids_BS is None:
        key_segment_ids_BS, own = segment_ids_BT, True
    else:
        own = key_segment_ids_BS is None
    block_q, block_k = _blocks(q_BTHK, k_BSGK, block)
    # A query that sees nothing gets the mean of all values, for which all blocks are needed. Where the keys are the
    # queries' own tokens, each sees at least itself.
    pairs = tuple((i, j) for i in range(-(-T // block_q)) for j in range(-(-S // block_k))
                  if not (causal and own) or _meet(i, j, block_q, block_k, window))
    plan = _Plan(causal, window, soft_cap, block_q, block_k, pairs, looks=False, padded=S % block_k != 0,
                 dtype=str(q_BTHK.dtype))
    places = (jnp.arange(T, dtype=jnp.int32), jnp.arange(S, dtype=jnp.int32), segment_ids_BT, key_segment_ids_BS)
    return _call(plan, q_BTHK * scale, k_BSGK, v_BSGV, places)[0]


def partial_attention(q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, *, q_position_T: Array, k_position_S: Array,
                      q_segment_BT: Array | None = None, k_segment_BS: Array | None = None, scale: float,
                      causal: bool = True, window: int | None = None, soft_cap: float | None = None,
                      block: tuple[int, int] | None = None) -> tuple[Array, Array]:
    """Attention of any queries of a row to any keys of it: a term for `merge`. Differentiable, both results.

    Args:
      q_BTHK, k_BSGK, v_BSGV, scale, window, soft_cap: as of `attention.attention`.
      q_position_T, k_position_S: int32, at least 0: where in its row each token stands. Any order and any gaps; may be
        computed (from a device's index, say). Blocks that the positions rule out cost nothing.
      q_segment_BT, k_segment_BS: int32, the document of each token; queries see keys of their own document. With those
        of the keys alone, queries see every key that is not 0.
      causal: whether a query sees only positions up to its own.
      block: tokens of a block of queries, and of a block of keys; None takes what `default_block` says.
    Returns:
      [B, T, H, V] float32, normalised over these keys, and [B, T, H] float32, the logarithm of what the exponentials of
      the scores sum to. A query that sees none of these keys has finite numbers, and a logarithm so small (under −1e29)
      that `merge` gives it no weight.
    """
    plan = _partial_plan(q_BTHK, k_BSGK, causal, window, soft_cap, block)
    return _call(plan, q_BTHK * scale, k_BSGK, v_BSGV, (q_position_T, k_position_S, q_segment_BT, k_segment_BS))


def partial_gradients(q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, out_BTHV: Array, log_sum_BTH: Array,
                      dout_BTHV: Array, *, q_position_T: Array, k_position_S: Array, q_segment_BT: Array | None = None,
                      k_segment_BS: Array | None = None, scale: float, causal: bool = True, window: int | None = None,
                      soft_cap: float | None = None,
                      block: tuple[int, int] | None = None) -> tuple[Array, Array, Array]:
    """What these keys add to the gradients of a merged attention, without the terms that were merged.

    Args:
      out_BTHV, log_sum_BTH: of all keys, what `merge` gave in the end.
      dout_BTHV: gradient of that output.
      The rest is as of `partial_attention`, which was called with it.
    Returns:
      Gradients of q, k and v.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    plan = _partial_plan(q_BTHK, k_BSGK, causal, window, soft_cap, block)

    def grouped(x_BTHX: Array) -> Array:
        return x_BTHX.reshape(B, T, G, H // G, -1)

    log_sum_NBGMA = _cut_q(grouped(log_sum_BTH), plan)[..., 0]
    places = (q_position_T, k_position_S, q_segment_BT, k_segment_BS)
    saved = (grouped(q_BTHK * scale), k_BSGK, v_BSGV, places, grouped(out_BTHV), log_sum_NBGMA,
             jnp.ones_like(log_sum_NBGMA))
    none_BTGM = jnp.zeros((B, T, G, H // G), jnp.float32)
    dq_BTGMK, dk_BSGK, dv_BSGV, _ = _backward(plan, saved, (grouped(dout_BTHV), none_BTGM))
    return dq_BTGMK.reshape(B, T, H, K) * scale, dk_BSGK, dv_BSGV


def _partial_plan(q_BTHK: Array, k_BSGK: Array, causal: bool, window: int | None, soft_cap: float | None,
                  block: tuple[int, int] | None) -> _Plan:
    T, S, (block_q, block_k) = q_BTHK.shape[1], k_BSGK.shape[1], _blocks(q_BTHK, k_BSGK, block)
    pairs = tuple((i, j) for i in range(-(-T // block_q)) for j in range(-(-S // block_k)))
    return _Plan(causal, window, soft_cap, block_q, block_k, pairs, looks=causal, padded=S % block_k != 0,
                 dtype="float32")


def merge(out_BTHV: Array, log_sum_BTH: Array, more_BTHV: Array, more_log_sum_BTH: Array) -> tuple[Array, Array]:
    """The attention to the keys of two terms of `partial_attention` together, as such a term itself.

    To start from nothing: zeros, and a logarithm of `ABSENT` everywhere.
    """
    most_BTH = jax.lax.stop_gradient(jnp.maximum(log_sum_BTH, more_log_sum_BTH))
    share_BTH, more_share_BTH = jnp.exp(log_sum_BTH - most_BTH), jnp.exp(more_log_sum_BTH - most_BTH)
    sum_BTH = share_BTH + more_share_BTH
    out_BTHV = out_BTHV * (share_BTH / sum_BTH)[..., None] + more_BTHV * (more_share_BTH / sum_BTH)[..., None]
    return out_BTHV, most_BTH + jnp.log(sum_BTH)


def default_block(rows: int, heads: int, length: int) -> tuple[int, int]:
    """Tokens of a block of queries, and of a block of keys.

    A CPU is fast as long as a block's scores stay in its cache: 2 MiB (benchmarks/attention_train.py; at 256 tokens,
    blocks of 64 take half the time of blocks of 128). Others want large products.

    Args:
      rows, heads: B and H of one device.
      length: tokens of the longest row; it is cut into 128 blocks at most.
    """
    block = 512
    if platform() == "cpu":
        block = min(max(64, 1 << math.isqrt(_CPU_SCORES // (rows * heads) + 1).bit_length() - 1), 512)
    while block * 128 < length:
        block *= 2
    return block, block


def _blocks(q_BTHK: Array, k_BSGK: Array, block: tuple[int, int] | None) -> tuple[int, int]:
    B, T, H, _ = q_BTHK.shape
    S = k_BSGK.shape[1]
    block_q, block_k = block or default_block(B, H, max(T, S))
    return min(block_q, T), min(block_k, S)


def _meet(i: int, j: int, block_q: int, block_k: int, window: int | None) -> bool:
    """Whether some query of block i sees some key of block j of the same tokens."""
    first_q, last_q, first_k, last_k = i * block_q, (i + 1) * block_q - 1, j * block_k, (j + 1) * block_k - 1
    return first_k <= last_q and (window is None or last_k > first_q - window)


def _call(plan: _Plan, q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, places: tuple) -> tuple[Array, Array]:
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    out_BTGMV, log_sum_BTGM = _attend(plan, q_BTHK.reshape(B, T, G, H // G, K), k_BSGK, v_BSGV, places)
    return out_BTGMV.reshape(B, T, H, -1), log_sum_BTGM.reshape(B, T, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q_BTGMK: Array, k_BSGK: Array, v_BSGV: Array, places: tuple) -> tuple[Array, Array]:
    """Output and logarithm of sums, of queries that are multiplied by the scale already."""
    return _forward(plan, q_BTGMK, k_BSGK, v_BSGV, places)[0]


def _forward(plan: _Plan, q_BTGMK: Array, k_BSGK: Array, v_BSGV: Array, places: tuple) -> tuple[tuple, tuple]:
    # In front is the block (N of queries, J of keys); A and C are the tokens within one.
    q_NBGMAK, k_JBGCK, v_JBGCV = _cut_q(q_BTGMK, plan), _cut_k(k_BSGK, plan), _cut_k(v_BSGV, plan)
    of_blocks = _cut_places(places, plan)
    N, B, G, M, A, _ = q_NBGMAK.shape

    def step(carry: tuple, pair: tuple[Array, Array]) -> tuple[tuple, None]:
        i, j = pair
        at = _at(of_blocks, i, j)

        def visit(block: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            acc_BGMAV, most_BGMA, sum_BGMA = block
            scores_BGMAC = _capped(plan, _einsum("bgmak,bgck->bgmac", q_NBGMAK[i], k_JBGCK[j]))
            allowed, instead = _allowed(plan, at)
            if allowed is not None:
                scores_BGMAC = jnp.where(allowed[:, None, None], scores_BGMAC, instead)
            new_most_BGMA = jnp.maximum(most_BGMA, jnp.max(scores_BGMAC, axis=-1))
            p_BGMAC = jnp.exp(scores_BGMAC - new_most_BGMA[..., None])
            keep_BGMA = jnp.exp(most_BGMA - new_most_BGMA)
            new_BGMAV = _einsum("bgmac,bgcv->bgmav", p_BGMAC.astype(v_BSGV.dtype), v_JBGCV[j])
            return (acc_BGMAV * keep_BGMA[..., None] + new_BGMAV, new_most_BGMA,
                    sum_BGMA * keep_BGMA + jnp.sum(p_BGMAC, axis=-1))

        block = _if_seen(plan, at, visit, tuple(x[i] for x in carry))
        return tuple(x.at[i].set(b) for x, b in zip(carry, block, strict=True)), None

    start = (jnp.zeros((N, B, G, M, A, v_BSGV.shape[-1]), jnp.float32),
             jnp.full((N, B, G, M, A), ABSENT, jnp.float32), jnp.zeros((N, B, G, M, A), jnp.float32))
    (acc_NBGMAV, most_NBGMA, sum_NBGMA), _ = jax.lax.scan(step, start, _pairs(plan))
    sum_NBGMA = jnp.where(sum_NBGMA > 0, sum_NBGMA, 1.0)
    T = q_BTGMK.shape[1]
    out_BTGMV = _join_q(acc_NBGMAV / sum_NBGMA[..., None], T).astype(plan.dtype)
    # Both, and not the logarithm of their sum alone: of a query that sees nothing it would forget the sum.
    out_BTGMV, most_NBGMA, sum_NBGMA = (checkpoint_name(x, SAVED) for x in (out_BTGMV, most_NBGMA, sum_NBGMA))
    log_sum_BTGM = _join_q((most_NBGMA + jnp.log(sum_NBGMA))[..., None], T)[..., 0]
    saved = q_BTGMK, k_BSGK, v_BSGV, places, out_BTGMV, most_NBGMA, sum_NBGMA
    return (out_BTGMV, log_sum_BTGM), saved


def _backward(plan: _Plan, saved: tuple, cotangents: tuple[Array, Array]) -> tuple:
    q_BTGMK, k_BSGK, v_BSGV, places, out_BTGMV, most_NBGMA, sum_NBGMA = saved
    dout_BTGMV, dlog_sum_BTGM = cotangents
    q_NBGMAK, k_JBGCK, v_JBGCV = _cut_q(q_BTGMK, plan), _cut_k(k_BSGK, plan), _cut_k(v_BSGV, plan)
    dout_NBGMAV = _cut_q(dout_BTGMV.astype(v_BSGV.dtype), plan)
    # Σ_s p·dp of a query is Σ_v dout·out; the gradient of the logarithm of the sum is p itself.
    mean_NBGMA = _einsum("nbgmav,nbgmav->nbgma", dout_NBGMAV, _cut_q(out_BTGMV, plan).astype(v_BSGV.dtype))
    mean_NBGMA -= _cut_q(dlog_sum_BTGM[..., None], plan)[..., 0]
    of_blocks, inverse_NBGMA, k_JBGKC = _cut_places(places, plan), 1.0 / sum_NBGMA, jnp.swapaxes(k_JBGCK, 3, 4)

    def step(carry: tuple, pair: tuple[Array, Array]) -> tuple[tuple, None]:
        i, j = pair
        at = _at(of_blocks, i, j)

        def visit(block: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            # Keys before queries: no product but that of dq has to turn an array of scores around, and that one turns
            # the keys instead.
            dq_BGKMA, dk_BGCK, dv_BGCV = block
            scores_BGCMA = _capped(plan, _einsum("bgck,bgmak->bgcma", k_JBGCK[j], q_NBGMAK[i]))
            allowed, instead = _allowed(plan, at, keys_first=True)
            masked_BGCMA = scores_BGCMA
            if allowed is not None:
                allowed = allowed[:, None, :, None]
                masked_BGCMA = jnp.where(allowed, scores_BGCMA, instead)
            p_BGCMA = jnp.exp(masked_BGCMA - most_NBGMA[i][:, :, None]) * inverse_NBGMA[i][:, :, None]
            dv_BGCV += _einsum("bgcma,bgmav->bgcv", p_BGCMA.astype(v_BSGV.dtype), dout_NBGMAV[i])
            dp_BGCMA = _einsum("bgcv,bgmav->bgcma", v_JBGCV[j], dout_NBGMAV[i])
            ds_BGCMA = p_BGCMA * (dp_BGCMA - mean_NBGMA[i][:, :, None])
            if plan.soft_cap is not None:
                ds_BGCMA = ds_BGCMA * (1.0 - jnp.square(scores_BGCMA / plan.soft_cap))
            if allowed is not None:  # p is not 0 there where a query sees nothing
                ds_BGCMA = jnp.where(allowed, ds_BGCMA, 0.0)
            ds_BGCMA = ds_BGCMA.astype(q_BTGMK.dtype)
            dq_BGKMA += _einsum("bgkc,bgcma->bgkma", k_JBGKC[j], ds_BGCMA)
            dk_BGCK += _einsum("bgcma,bgmak->bgck", ds_BGCMA, q_NBGMAK[i])
            return dq_BGKMA, dk_BGCK, dv_BGCV

        index = (i, j, j)
        block = _if_seen(plan, at, visit, tuple(x[n] for x, n in zip(carry, index, strict=True)))
        return tuple(x.at[n].set(b) for x, n, b in zip(carry, index, block, strict=True)), None

    N, B, G, M, A, K = q_NBGMAK.shape
    start = tuple(jnp.zeros(shape, jnp.float32) for shape in ((N, B, G, K, M, A), k_JBGCK.shape, v_JBGCV.shape))
    (dq_NBGKMA, dk_JBGCK, dv_JBGCV), _ = jax.lax.scan(step, start, _pairs(plan))
    dq_NBGMAK, S = jnp.moveaxis(dq_NBGKMA, 3, 5), k_BSGK.shape[1]
    return (_join_q(dq_NBGMAK, q_BTGMK.shape[1]).astype(q_BTGMK.dtype), _join_k(dk_JBGCK, S).astype(k_BSGK.dtype),
            _join_k(dv_JBGCV, S).astype(v_BSGV.dtype), None)


_attend.defvjp(_forward, _backward)


def _capped(plan: _Plan, scores: Array) -> Array:
    return scores if plan.soft_cap is None else plan.soft_cap * jnp.tanh(scores / plan.soft_cap)


def _allowed(plan: _Plan, at: tuple, keys_first: bool = False) -> tuple[Array | None, Any]:
    """Which scores of a pair of blocks count, [B or 1, A, C] (or [B or 1, C, A]), None for all; and what stands for the
    others."""
    def of_pairs(of_queries: Array | None, of_keys: Array | None) -> list[Any]:
        axes = (-2, -1) if keys_first else (-1, -2)
        return [None if x is None else jnp.expand_dims(x, axis) for x, axis in zip((of_queries, of_keys), axes,
                                                                                   strict=True)]

    q_position, k_position = of_pairs(*(x[None] for x in at[:2]))
    q_segment, k_segment = of_pairs(*at[2:])
    rules = []
    if plan.causal:
        rules.append(k_position <= q_position)
        if plan.window is not None:
            rules.append(k_position > q_position - plan.window)
    if k_segment is not None:
        rules.append(k_segment != 0 if q_segment is None else q_segment == k_segment)
    if plan.padded:
        rules.append(k_position >= 0)
    if not rules:
        return None, MASKED
    allowed = functools.reduce(jnp.logical_and, rules)
    if not plan.padded:
        return allowed, MASKED
    instead = jnp.where(k_position >= 0, MASKED, ABSENT)
    return allowed, instead[:, None, :, None] if keys_first else instead[:, None, None]


def _if_seen(plan: _Plan, at: tuple, visit: Any, block: tuple) -> tuple:
    """`visit(block)`; the block as it was where the plan looks first, and no query sees a key by its position."""
    if not plan.looks:
        return visit(block)
    q_position_A, k_position_C = at[:2]
    first_k = jnp.min(jnp.where(k_position_C >= 0, k_position_C, jnp.iinfo(jnp.int32).max))
    seen = first_k <= jnp.max(q_position_A)
    if plan.window is not None:
        seen &= jnp.max(k_position_C) > jnp.min(q_position_A) - plan.window
    return jax.lax.cond(seen, visit, lambda block: block, block)


def _pairs(plan: _Plan) -> tuple[Array, Array]:
    i, j = zip(*plan.pairs, strict=True)
    return jnp.asarray(i, jnp.int32), jnp.asarray(j, jnp.int32)


def _at(of_blocks: tuple, i: Array, j: Array) -> tuple:
    """Positions and segments of a pair of blocks."""
    return tuple(None if x is None else x[n] for x, n in zip(of_blocks, (i, j, i, j), strict=True))


def _cut_places(places: tuple, plan: _Plan) -> tuple:
    q_position_T, k_position_S, q_segment_BT, k_segment_BS = places

    def cut(x: Array | None, block: int, **pad: Any) -> Array | None:
        """[…, T] as [N, …, block]."""
        if x is None:
            return None
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)], **pad)
        return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, block), -2, 0)

    return (cut(q_position_T, plan.block_q, mode="edge"), cut(k_position_S, plan.block_k, constant_values=-1),
            cut(q_segment_BT, plan.block_q), cut(k_segment_BS, plan.block_k))


def _cut_q(x_BTGMK: Array, plan: _Plan) -> Array:
    x_BTGMK = jnp.pad(x_BTGMK, ((0, 0), (0, -x_BTGMK.shape[1] % plan.block_q), (0, 0), (0, 0), (0, 0)))
    B, T, *rest = x_BTGMK.shape
    return x_BTGMK.reshape(B, T // plan.block_q, plan.block_q, *rest).transpose(1, 0, 3, 4, 2, 5)


def _cut_k(x_BSGK: Array, plan: _Plan) -> Array:
    x_BSGK = jnp.pad(x_BSGK, ((0, 0), (0, -x_BSGK.shape[1] % plan.block_k), (0, 0), (0, 0)))
    B, S, *rest = x_BSGK.shape
    return x_BSGK.reshape(B, S // plan.block_k, plan.block_k, *rest).transpose(1, 0, 3, 2, 4)


def _join_q(x_NBGMAK: Array, T: int) -> Array:
    N, B, G, M, A, K = x_NBGMAK.shape
    return x_NBGMAK.transpose(1, 0, 4, 2, 3, 5).reshape(B, N * A, G, M, K)[:, :T]


def _join_k(x_JBGCK: Array, S: int) -> Array:
    J, B, G, C, K = x_JBGCK.shape
    return x_JBGCK.transpose(1, 0, 3, 2, 4).reshape(B, J * C, G, K)[:, :S]


def _einsum(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)
