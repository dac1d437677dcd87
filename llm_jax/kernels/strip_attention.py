"""Causal attention of short rows on CPUs: a strip of queries at a time against all keys up to it.

What `chunked_attention` does, without its loop: each strip's keys are one stretch, so there is no online softmax to put
together, and a program that spells its strips out, with the keys' axis before the queries' so that a softmax's sums run
over whole vectors, takes three quarters of the time (docs/performance.md). For the backward pass the output is kept
and, of each query, the logarithm of its sum; scores are made again (Dao 2023, arXiv:2307.08691).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.attention_call import Call
from llm_jax.kernels.chunked_attention import MASKED, SAVED

Array = jax.Array

STRIP = 64  # queries; 32 and 128 are slower for 256 tokens
MAX_LENGTH = 512  # of a row: a program grows with its strips, and their scores with the row


def unsupported(call: Call) -> str | None:
    """Why strips can't do it, or None if they can."""
    if not call.causal or call.other_keys or call.bias:
        return "it takes causal attention of a row's own tokens, without a bias"
    if call.queries > MAX_LENGTH:
        return f"it takes rows of up to {MAX_LENGTH} tokens, not {call.queries}"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What of a call is static."""

    window: int | None
    soft_cap: float | None

    def strips(self, length: int) -> list[tuple[slice, slice]]:
        """(queries, the keys that some of them see) of each strip."""
        cuts = []
        for start in range(0, length, STRIP):
            stop = min(start + STRIP, length)
            first = 0 if self.window is None else max(0, start - self.window + 1)
            cuts.append((slice(start, stop), slice(first, stop)))
        return cuts

    def scores(self, q_BGMAK: Array, k_BGSK: Array, segment_ids_BT: Array | None, queries: slice,
               keys: slice) -> tuple[Array, Array]:
        """A strip's scores [B, G, S, M, A], capped; and the same with what is not seen masked."""
        scores_BGSMA = _einsum("bgsk,bgmak->bgsma", k_BGSK, q_BGMAK)
        if self.soft_cap is not None:
            scores_BGSMA = self.soft_cap * jnp.tanh(scores_BGSMA / self.soft_cap)
        distance_SA = (jnp.arange(queries.start, queries.stop)[None] - jnp.arange(keys.start, keys.stop)[:, None])
        seen = (distance_SA >= 0)[None]
        if self.window is not None:
            seen &= distance_SA < self.window
        if segment_ids_BT is not None:
            seen &= segment_ids_BT[:, keys, None] == segment_ids_BT[:, None, queries]
        return scores_BGSMA, jnp.where(seen[:, None, :, None], scores_BGSMA, MASKED)


def attend(q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, segment_ids_BT: Array | None = None, *, scale: float,
           causal: bool = True, window: int | None = None, soft_cap: float | None = None) -> Array:
    """See `attention.dense_attention`; on one device (`attention_call.on_mesh`), for what `unsupported` lets pass."""
    if not causal:
        raise ValueError("strips are of causal attention")
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGMTK = (q_BTHK * scale).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    out_BGVMT = _attend(_Plan(window, soft_cap), q_BGMTK, k_BSGK.transpose(0, 2, 1, 3), v_BSGV.transpose(0, 2, 3, 1),
                        segment_ids_BT)
    return out_BGVMT.transpose(0, 4, 1, 3, 2).reshape(B, T, H, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q_BGMTK: Array, k_BGSK: Array, v_BGVS: Array, segment_ids_BT: Array | None) -> Array:
    """Of queries that are multiplied by the scale already."""
    return _forward(plan, q_BGMTK, k_BGSK, v_BGVS, segment_ids_BT)[0]


def _forward(plan: _Plan, q_BGMTK: Array, k_BGSK: Array, v_BGVS: Array,
             segment_ids_BT: Array | None) -> tuple[Array, tuple]:
    outs, log_sums = [], []
    for queries, keys in plan.strips(q_BGMTK.shape[3]):
        _, masked_BGSMA = plan.scores(q_BGMTK[:, :, :, queries], k_BGSK[:, :, keys], segment_ids_BT, queries, keys)
        most_BG1MA = jnp.max(masked_BGSMA, axis=2, keepdims=True)
        p_BGSMA = jnp.exp(masked_BGSMA - most_BG1MA)
        sum_BG1MA = jnp.sum(p_BGSMA, axis=2, keepdims=True)
        out_BGVMA = _einsum("bgvs,bgsma->bgvma", v_BGVS[..., keys], p_BGSMA.astype(v_BGVS.dtype))
        outs.append(out_BGVMA / sum_BG1MA)
        log_sums.append(most_BG1MA + jnp.log(sum_BG1MA))
    out_BGVMT = checkpoint_name(jnp.concatenate(outs, axis=-1).astype(q_BGMTK.dtype), SAVED)
    log_sum_BG1MT = checkpoint_name(jnp.concatenate(log_sums, axis=-1), SAVED)
    return out_BGVMT, (q_BGMTK, k_BGSK, v_BGVS, segment_ids_BT, out_BGVMT, log_sum_BG1MT)


def _backward(plan: _Plan, saved: tuple, dout_BGVMT: Array) -> tuple:
    q_BGMTK, k_BGSK, v_BGVS, segment_ids_BT, out_BGVMT, log_sum_BG1MT = saved
    dtype = q_BGMTK.dtype
    v_BGSV, k_BGKS = jnp.swapaxes(v_BGVS, 2, 3), jnp.swapaxes(k_BGSK, 2, 3)
    dout_BGMTV = jnp.moveaxis(dout_BGVMT, 2, 4)
    # Σ_s p·dp of a query is Σ_v dout·out.
    mean_BG1MT = jnp.sum(dout_BGVMT.astype(jnp.float32) * out_BGVMT, axis=2, keepdims=True)
    dqs, dks, dvs = [], [], []
    for queries, keys in plan.strips(q_BGMTK.shape[3]):
        q_BGMAK, dout_BGMAV = q_BGMTK[:, :, :, queries], dout_BGMTV[:, :, :, queries]
        capped_BGSMA, masked_BGSMA = plan.scores(q_BGMAK, k_BGSK[:, :, keys], segment_ids_BT, queries, keys)
        p_BGSMA = jnp.exp(masked_BGSMA - log_sum_BG1MT[..., queries])
        dp_BGSMA = _einsum("bgsv,bgmav->bgsma", v_BGSV[:, :, keys], dout_BGMAV)
        ds_BGSMA = p_BGSMA * (dp_BGSMA - mean_BG1MT[..., queries])
        if plan.soft_cap is not None:
            ds_BGSMA *= 1.0 - jnp.square(capped_BGSMA / plan.soft_cap)
        ds_BGSMA = ds_BGSMA.astype(dtype)
        dqs.append(_einsum("bgks,bgsma->bgkma", k_BGKS[..., keys], ds_BGSMA))
        dks.append((keys, _einsum("bgsma,bgmak->bgsk", ds_BGSMA, q_BGMAK)))
        dvs.append((keys, _einsum("bgsma,bgmav->bgsv", p_BGSMA.astype(v_BGVS.dtype), dout_BGMAV)))
    dq_BGMTK = jnp.moveaxis(jnp.concatenate(dqs, axis=-1), 2, 4)
    dv_BGVS = jnp.swapaxes(_total(dvs), 2, 3)
    return dq_BGMTK.astype(dtype), _total(dks).astype(k_BGSK.dtype), dv_BGVS.astype(v_BGVS.dtype), None


_attend.defvjp(_forward, _backward)


def _total(terms: list[tuple[slice, Array]]) -> Array:
    """The sum over strips of gradients of their own stretches of keys, [B, G, S, …]."""
    keys, last = terms[-1]
    total = jnp.pad(last, ((0, 0), (0, 0), (keys.start, 0), (0, 0)))
    for keys, term in reversed(terms[:-1]):
        total = total.at[:, :, keys].add(term)
    return total


def _einsum(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)
