"""Paged attention in plain XLA: the reference, and what a CPU runs.

Which pages a row reads is spelt out as a *work list* of (row, page) pairs. The loop runs over the work list in groups,
with the online softmax of Milakov & Gimelshein (2018, arXiv:1805.02867), as many trips as there are live pages: the
cost of a step follows the tokens that are in it, not the largest context configured, and one compiled program serves
every mix of lengths. A head's page is contiguous: pools are [G, P + 1, S, K].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llm_jax.kernels.paged import PagedContext, WorkList

Array = jax.Array

_NEG = -1e30


def attend(q_BTHK: Array, k_BTGK: Array, v_BTGV: Array | None, context: PagedContext,
           cache: tuple[Array, ...], *, scale: float, window: int | None = None,
           soft_cap: float | None = None, value_dim: int = 0) -> tuple[Array, tuple[Array, ...]]:
    """Writes the step's keys and values to their slots, then attends; see `attention.attention` (B = 1, T = S = N)."""
    new = (k_BTGK,) if v_BTGV is None else (k_BTGK, v_BTGV)
    cache = tuple(_write(pool, entries[0], context.slot_N) for pool, entries in zip(cache, new, strict=True))
    N, H, K = q_BTHK.shape[1:]
    G = k_BTGK.shape[2]
    V = value_dim if v_BTGV is None else v_BTGV.shape[3]
    q_NGMK = q_BTHK[0].reshape(N, G, H // G, K) * scale
    local = window is not None
    decode, prefill = ((context.decode_local, context.prefill_local) if local else (context.decode, context.prefill))
    outputs = []
    for part, length, work in ((slice(context.num_decode), context.decode_width, decode),
                               (slice(context.num_decode, N), context.chunk, prefill)):
        position_RT = context.position_N[part].reshape(-1, length)
        if not position_RT.size:
            continue
        if work is None:
            raise ValueError(f"the step has no work lists for layers {'with' if local else 'without'} a window")
        q_RTGMK = q_NGMK[part].reshape(-1, length, G, H // G, K)
        outputs.append(_attend(q_RTGMK, position_RT, cache, work, V, window, soft_cap))
    out_NHV = jnp.concatenate([o.reshape(-1, H, V) for o in outputs])
    return out_NHV[None].astype(q_BTHK.dtype), cache


def _write(pool_GPSK: Array, new_NGK: Array, slot_N: Array) -> Array:
    # In the pool's own shape: XLA updates in place what it need not reshape, and copies the pool whole otherwise.
    page_N, offset_N = jnp.divmod(slot_N, pool_GPSK.shape[2])
    new_GNK = jnp.swapaxes(new_NGK, 0, 1).astype(pool_GPSK.dtype)
    return pool_GPSK.at[:, page_N, offset_N].set(new_GNK, mode="promise_in_bounds")


def _attend(q_RTGMK: Array, position_RT: Array, cache: tuple[Array, ...], work: WorkList, V: int,
            window: int | None, soft_cap: float | None) -> Array:
    """Attention of T queries a row over the row's pages: float32 [R, T, G, M, V]."""
    R, T, G, M, K = q_RTGMK.shape
    S = cache[0].shape[2]
    A = T * M  # queries of one kv head
    # Enough items a trip to amortise the loop, few enough that a lone short row does not pay for a full group.
    group = min(work.row_W.shape[0], max(4, 32 // T) if T > 1 else 32)
    q_RGAK = jnp.transpose(q_RTGMK, (0, 2, 1, 3, 4)).reshape(R, G, A, K)
    position_RA = jnp.repeat(position_RT, M, axis=1)
    last_R = jnp.max(position_RT, axis=1)
    if window is not None:  # the first position that any query of a row sees; padding has none
        first_R = jnp.min(jnp.where(position_RT < 0, jnp.iinfo(jnp.int32).max, position_RT), axis=1) - window + 1

    def trip(t, carry):
        m_RGA, l_RGA, acc_RGAV = carry
        at = t * group
        # The last group may start before `at` (dynamic_slice clamps): items seen before are masked out.
        first = jnp.minimum(at, work.row_W.shape[0] - group)
        index_W = first + jnp.arange(group)
        live_W = (index_W >= at) & (index_W < work.count)
        row_W, page_W, start_W = (jax.lax.dynamic_slice(a, (first,), (group,))
                                  for a in (work.row_W, work.page_W, work.start_W))
        row_W = jnp.where(live_W, row_W, R)  # R is out of range: gathers clamp, scatters drop
        page_W = jnp.where(live_W, page_W, 0)
        key_position_WS = start_W[:, None] + jnp.arange(S)
        k_GWSK, *rest = (jnp.take(pool, page_W, axis=1, mode="clip") for pool in cache)
        v_GWSV = rest[0] if rest else k_GWSK[..., :V]
        position_WA1 = jnp.take(position_RA, row_W, axis=0, mode="clip")[:, :, None]
        # A slot that no query of the row sees may hold anything, NaN included: select it away, 0 · NaN would be NaN.
        seen_WS = live_W[:, None] & (key_position_WS <= jnp.take(last_R, row_W, mode="clip")[:, None])
        visible_WAS = key_position_WS[:, None] <= position_WA1
        if window is not None:
            seen_WS &= key_position_WS >= jnp.take(first_R, row_W, mode="clip")[:, None]
            visible_WAS &= key_position_WS[:, None] > position_WA1 - window
        visible_WAS &= seen_WS[:, None]
        v_GWSV = jnp.where(seen_WS[None, :, :, None], v_GWSV, 0)
        q_WGAK = jnp.take(q_RGAK, row_W, axis=0, mode="clip")
        scores_GWAS = jnp.einsum("wgak,gwsk->gwas", q_WGAK, k_GWSK, preferred_element_type=jnp.float32)
        if soft_cap is not None:
            scores_GWAS = soft_cap * jnp.tanh(scores_GWAS / soft_cap)
        scores_GWAS = jnp.where(visible_WAS[None], scores_GWAS, _NEG)
        best_WGA = jnp.swapaxes(jnp.max(scores_GWAS, axis=-1), 0, 1)
        new_m_RGA = m_RGA.at[row_W].max(best_WGA, mode="drop")
        shift_GWA = jnp.swapaxes(jnp.take(new_m_RGA, row_W, axis=0, mode="clip"), 0, 1)
        p_GWAS = jnp.where(visible_WAS[None], jnp.exp(scores_GWAS - shift_GWA[..., None]), 0.0)
        pv_WGAV = jnp.einsum("gwas,gwsv->wgav", p_GWAS.astype(v_GWSV.dtype), v_GWSV,
                             preferred_element_type=jnp.float32)
        keep_RGA = jnp.exp(m_RGA - new_m_RGA)
        l_RGA = (l_RGA * keep_RGA).at[row_W].add(jnp.swapaxes(jnp.sum(p_GWAS, axis=-1), 0, 1), mode="drop")
        acc_RGAV = (acc_RGAV * keep_RGA[..., None]).at[row_W].add(pv_WGAV, mode="drop")
        return new_m_RGA, l_RGA, acc_RGAV

    init = (jnp.full((R, G, A), _NEG, jnp.float32), jnp.zeros((R, G, A), jnp.float32),
            jnp.zeros((R, G, A, V), jnp.float32))
    trips = (work.count + group - 1) // group
    _, l_RGA, acc_RGAV = jax.lax.fori_loop(0, trips, trip, init)
    out_RGAV = acc_RGAV / jnp.where(l_RGA > 0, l_RGA, 1.0)[..., None]
    return jnp.transpose(out_RGAV.reshape(R, G, T, M, V), (0, 2, 1, 3, 4))
