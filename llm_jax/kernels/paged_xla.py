"""Paged attention in plain XLA: the reference, and what a CPU runs.

Which pages a row reads is spelt out as a *work list* of (row, page) pairs. The loop runs over the work list in groups,
with the online softmax of Milakov & Gimelshein (2018, arXiv:1805.02867), as many trips as there are live pages: the
cost of a step follows the tokens that are in it, not the largest context configured, and one compiled program serves
every mix of lengths. Where bits must not depend on the rest of the step, each token reads its own row's pages instead,
one after the other.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llm_jax.kernels.paged import PagedContext, WorkList
from llm_jax.kernels.quantized_cache import entry_dtype, from_bits, is_quantized, quantize, to_bits

Array = jax.Array

_NEG = -1e30  # a masked score
_LOW = -1e29  # below every score, and so far above a masked one that exp(_NEG − _LOW) is 0
# Pages of one trip: as many as a core's cache holds beside the trip's other arrays, and no more than amortise the
# trip's own cost. What is left over goes by quarters, so that a lone short row does not pay for a full group.
_TILE_BYTES = 2**19
_MOST_PAGES = 32
_QUARTER = 4

# From so many queries a row on, a row's pages are read in blocks of so many tokens.
_LONG, _BLOCK_TOKENS = 16, 256

_Carry = tuple[Array, Array, Array]  # running maximum [R, G, A], sum [R, G, A], weighted values [R, G, A, V]


def attend(q_BTHK: Array, k_BTGK: Array, v_BTGV: Array | None, context: PagedContext,
           cache: tuple[Array, ...], *, scale: float, window: int | None = None,
           soft_cap: float | None = None, value_dim: int = 0) -> tuple[Array, tuple[Array, ...]]:
    """Writes the step's keys and values to their slots, then attends; see `attention.attention` (B = 1, T = S = N)."""
    cache = _write(cache, (k_BTGK[0],) if v_BTGV is None else (k_BTGK[0], v_BTGV[0]), context.slot_N)
    N, H, K = q_BTHK.shape[1:]
    G = k_BTGK.shape[2]
    V = value_dim if v_BTGV is None else v_BTGV.shape[3]
    q_NGMK = q_BTHK[0].reshape(N, G, H // G, K) * scale
    if context.deterministic:
        out_NHV = _attend_in_order(q_NGMK, context, cache, V, window, soft_cap).reshape(N, H, V)
        return out_NHV[None].astype(q_BTHK.dtype), cache
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
        attend_part = _attend_by_rows if length >= _LONG else _attend
        outputs.append(attend_part(q_RTGMK, position_RT, cache, work, V, window, soft_cap))
    out_NHV = jnp.concatenate([o.reshape(-1, H, V) for o in outputs])
    return out_NHV[None].astype(q_BTHK.dtype), cache


def _write(cache: tuple[Array, ...], entries: tuple[Array, ...], slot_N: Array) -> tuple[Array, ...]:
    # In the pools' own shape: XLA updates in place what it need not reshape, and copies the pool whole otherwise.
    dtype = entry_dtype(cache[0])
    if is_quantized(dtype):
        parts = [quantize(new_NGK, dtype) for new_NGK in entries]
        entries = (*(new for new, _ in parts), *(scale for _, scale in parts))
    page_N, offset_N = jnp.divmod(slot_N, cache[0].shape[2])
    return tuple(pool.at[page_N, :, offset_N].set(to_bits(new.astype(entry_dtype(pool))),
                                                       mode="promise_in_bounds")
                 for pool, new in zip(cache, entries, strict=True))


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Some pages: keys [W, G, S, K], values [W, G, S, V], and their scales [W, G, S] where they are quantized."""

    k_WGSK: Array
    v_WGSV: Array
    k_scale_WGS: Array | None
    v_scale_WGS: Array | None


def _read(cache: tuple[Array, ...], page_W: Array, seen_WS: Array, V: int, dtype: jnp.dtype) -> _Tile:
    """A slot that no query sees may hold anything, NaN included: its value is selected away, as 0 · NaN would be NaN;
    its score is, in `_scores`."""

    def pages(pool: Array) -> Array:
        # As rows of a matrix: a gather of whole rows is several times as fast as one with inner axes.
        rows = jnp.take(pool.reshape(pool.shape[0], -1), page_W, axis=0, mode="clip")
        return from_bits(rows.reshape(-1, *pool.shape[1:]))

    quantized = is_quantized(entry_dtype(cache[0]))
    entries, scales = (cache[:len(cache) // 2], cache[len(cache) // 2:]) if quantized else (cache, ())
    k_WGSK, *values = (pages(pool).astype(dtype) for pool in entries)
    v_WGSV = jnp.where(seen_WS[:, None, :, None], values[0] if values else k_WGSK[..., :V], 0)
    if not quantized:
        return _Tile(k_WGSK, v_WGSV, None, None)
    k_scale_WGS = pages(scales[0])
    v_scale_WGS = pages(scales[-1])
    return _Tile(k_WGSK, v_WGSV, k_scale_WGS, jnp.where(seen_WS[:, None], v_scale_WGS, 0))


def _scores(q_WGAK: Array, tile: _Tile, visible: Array, soft_cap: float | None) -> Array:
    """float32 scores [W, G, A, S]; `_NEG` where not `visible` (broadcast against them)."""
    scores_WGAS = jnp.einsum("wgak,wgsk->wgas", q_WGAK, tile.k_WGSK, preferred_element_type=jnp.float32)
    if tile.k_scale_WGS is not None:
        scores_WGAS = scores_WGAS * tile.k_scale_WGS[:, :, None]
    if soft_cap is not None:
        scores_WGAS = soft_cap * jnp.tanh(scores_WGAS / soft_cap)
    return jnp.where(visible, scores_WGAS, _NEG)


def _weighted(p_WGAS: Array, tile: _Tile) -> Array:
    """float32 p · v [W, G, A, V]."""
    if tile.v_scale_WGS is not None:
        p_WGAS = p_WGAS * tile.v_scale_WGS[:, :, None]
    return jnp.einsum("wgas,wgsv->wgav", p_WGAS.astype(tile.v_WGSV.dtype), tile.v_WGSV,
                      preferred_element_type=jnp.float32)


def _start(rows: int, heads: int, queries: int, V: int) -> _Carry:
    shape = (rows, heads, queries)
    return jnp.full(shape, _LOW, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, V), jnp.float32)


def _finish(carry: _Carry) -> Array:
    _, l_RGA, acc_RGAV = carry
    return acc_RGAV / jnp.where(l_RGA > 0, l_RGA, 1.0)[..., None]


def _attend(q_RTGMK: Array, position_RT: Array, cache: tuple[Array, ...], work: WorkList, V: int,
            window: int | None, soft_cap: float | None) -> Array:
    """Attention of T queries a row over the row's pages: float32 [R, T, G, M, V]."""
    R, T, G, M, K = q_RTGMK.shape
    S = cache[0].shape[2]
    W = work.row_W.shape[0]
    fit = _TILE_BYTES // (G * S * K * q_RTGMK.dtype.itemsize)
    group = min(max(4, min(fit, _MOST_PAGES) // max(1, T // 8)), W)
    quarter = max(1, group // _QUARTER)
    q_RGAK = jnp.transpose(q_RTGMK, (0, 2, 1, 3, 4)).reshape(R, G, T * M, K)
    # All that is known of an item, made once and cut in a trip; a group past the end finds items of nobody.
    row_W, page_W, start_W = (jnp.pad(a, (0, group)) for a in (work.row_W, work.page_W, work.start_W))
    live_W = jnp.arange(W + group) < work.count
    row_W = jnp.where(live_W, row_W, R)  # R is out of range: gathers clamp, scatters drop
    page_W = jnp.where(live_W, page_W, 0)
    # The first slot after those that any query of the row sees, and the first of them.
    end_W = jnp.where(live_W, jnp.take(jnp.max(position_RT, axis=1), row_W, mode="clip") + 1 - start_W, 0)
    if window is not None:  # padding sees none
        first_R = jnp.min(jnp.where(position_RT < 0, jnp.iinfo(jnp.int32).max, position_RT), axis=1) - window + 1
        first_W = jnp.take(first_R, row_W, mode="clip") - start_W

    def trip(size: int, base: Array | int, t: Array, carry: _Carry) -> _Carry:
        m_RGA, l_RGA, acc_RGAV = carry

        def cut(a_W: Array) -> Array:
            return jax.lax.dynamic_slice(a_W, (base + t * size,), (size,))

        row, slot_S = cut(row_W), jnp.arange(S)
        seen_WS = slot_S < cut(end_W)[:, None]
        if window is not None:
            seen_WS &= slot_S >= cut(first_W)[:, None]
        visible = seen_WS[:, None, None]
        if T > 1:
            query_WT1 = (jnp.take(position_RT, row, axis=0, mode="clip") - cut(start_W)[:, None])[:, :, None]
            visible_WTS = seen_WS[:, None] & (slot_S <= query_WT1)
            if window is not None:
                visible_WTS &= slot_S > query_WT1 - window
            visible = jnp.repeat(visible_WTS, M, axis=1)[:, None]
        tile = _read(cache, cut(page_W), seen_WS, V, q_RGAK.dtype)
        scores_WGAS = _scores(jnp.take(q_RGAK, row, axis=0, mode="clip"), tile, visible, soft_cap)
        new_m_RGA = m_RGA.at[row].max(jnp.max(scores_WGAS, axis=-1), mode="drop")
        p_WGAS = jnp.exp(scores_WGAS - jnp.take(new_m_RGA, row, axis=0, mode="clip")[..., None])
        keep_RGA = jnp.exp(m_RGA - new_m_RGA)
        l_RGA = (l_RGA * keep_RGA).at[row].add(jnp.sum(p_WGAS, axis=-1), mode="drop")
        acc_RGAV = (acc_RGAV * keep_RGA[..., None]).at[row].add(_weighted(p_WGAS, tile), mode="drop")
        return new_m_RGA, l_RGA, acc_RGAV

    full = work.count // group
    left = work.count - full * group
    carry = jax.lax.fori_loop(0, full, functools.partial(trip, group, 0), _start(R, G, T * M, V))
    carry = jax.lax.fori_loop(0, (left + quarter - 1) // quarter, functools.partial(trip, quarter, full * group), carry)
    return jnp.transpose(_finish(carry).reshape(R, G, T, M, V), (0, 2, 1, 3, 4))


def _attend_by_rows(q_RTGMK: Array, position_RT: Array, cache: tuple[Array, ...], work: WorkList, V: int,
                    window: int | None, soft_cap: float | None) -> Array:
    """As `_attend`, a row at a time against blocks of its pages: with many queries a row, the products are then of a
    size that pays, and a trip touches the running sums of one row alone."""
    R, T, G, M, K = q_RTGMK.shape
    S, W, A = cache[0].shape[2], work.row_W.shape[0], T * M
    B = max(1, min(_BLOCK_TOKENS // S, W))
    q_RGAK = jnp.transpose(q_RTGMK, (0, 2, 1, 3, 4)).reshape(R, G, A, K)
    position_RA = jnp.repeat(position_RT, M, axis=1)
    page_W, start_W = (jnp.pad(a, (0, B)) for a in (work.page_W, work.start_W))
    mine_RW = (work.row_W == jnp.arange(R)[:, None]) & (jnp.arange(W) < work.count)
    count_R, first_R = jnp.sum(mine_RW, axis=1), jnp.argmax(mine_RW, axis=1)

    def row(r: Array, out_RGAV: Array) -> Array:
        q_GAK, position_A = q_RGAK[r], position_RA[r]
        earliest = jnp.min(jnp.where(position_A < 0, jnp.iinfo(jnp.int32).max, position_A))

        def trip(t: Array, carry: _Carry) -> _Carry:
            m_GA, l_GA, acc_GAV = carry
            page_B, start_B = (jax.lax.dynamic_slice(a, (first_R[r] + t * B,), (B,)) for a in (page_W, start_W))
            live_B = t * B + jnp.arange(B) < count_R[r]
            key_BS = start_B[:, None] + jnp.arange(S)
            seen_BS = live_B[:, None] & (key_BS <= jnp.max(position_A))
            visible_BSA = key_BS[..., None] <= position_A
            if window is not None:
                seen_BS &= key_BS > earliest - window
                visible_BSA &= key_BS[..., None] > position_A - window
            tile = _read(cache, page_B, seen_BS, V, q_GAK.dtype)
            # Queries are the minor axis: sums and maxima over keys are then of whole vectors.
            scores_BGSA = jnp.einsum("bgsk,gak->bgsa", tile.k_WGSK, q_GAK, preferred_element_type=jnp.float32)
            if tile.k_scale_WGS is not None:
                scores_BGSA *= tile.k_scale_WGS[..., None]
            if soft_cap is not None:
                scores_BGSA = soft_cap * jnp.tanh(scores_BGSA / soft_cap)
            scores_BGSA = jnp.where((visible_BSA & seen_BS[..., None])[:, None], scores_BGSA, _NEG)
            new_m_GA = jnp.maximum(m_GA, jnp.max(scores_BGSA, axis=(0, 2)))
            p_BGSA = jnp.exp(scores_BGSA - new_m_GA[:, None])
            keep_GA = jnp.exp(m_GA - new_m_GA)
            l_GA = l_GA * keep_GA + jnp.sum(p_BGSA, axis=(0, 2))
            if tile.v_scale_WGS is not None:
                p_BGSA *= tile.v_scale_WGS[..., None]
            pv_GAV = jnp.einsum("bgsa,bgsv->gav", p_BGSA.astype(tile.v_WGSV.dtype), tile.v_WGSV,
                                preferred_element_type=jnp.float32)
            return new_m_GA, l_GA, acc_GAV * keep_GA[..., None] + pv_GAV

        carry = jax.tree.map(lambda a: a[0], _start(1, G, A, V))
        carry = jax.lax.fori_loop(0, (count_R[r] + B - 1) // B, trip, carry)
        return out_RGAV.at[r].set(_finish(carry))

    out_RGAV = jax.lax.fori_loop(0, R, row, jnp.zeros((R, G, A, V), jnp.float32))
    return jnp.transpose(out_RGAV.reshape(R, G, T, M, V), (0, 2, 1, 3, 4))


def _attend_in_order(q_NGMK: Array, context: PagedContext, cache: tuple[Array, ...], V: int, window: int | None,
                     soft_cap: float | None) -> Array:
    """Attention in which page j of every token's row is read at trip j: float32 [N, G, M, V].

    All tokens take the same path whatever their row is, and a trip past a token's last page, or before its window,
    adds exact zeros to what it has.
    """
    if context.table_RP is None:
        raise ValueError("a deterministic step needs tables of pages")
    N, G, M, _ = q_NGMK.shape
    S = cache[0].shape[2]
    position_N, rows = context.position_N, context.table_RP.shape[0]
    per_row = [context.decode_width] * context.decode_rows + [context.chunk] * (rows - context.decode_rows)
    table_NP = jnp.repeat(context.table_RP, jnp.array(per_row), axis=0, total_repeat_length=N)

    def trip(j: Array, carry: _Carry) -> _Carry:
        m_NGM, l_NGM, acc_NGMV = carry
        key_S = j * S + jnp.arange(S)
        visible_NS = key_S <= position_N[:, None]
        if window is not None:
            visible_NS &= key_S > position_N[:, None] - window
        page_N = jax.lax.dynamic_index_in_dim(table_NP, j, axis=1, keepdims=False)
        tile = _read(cache, page_N, visible_NS, V, q_NGMK.dtype)
        scores_NGMS = _scores(q_NGMK, tile, visible_NS[:, None, None], soft_cap)
        new_m_NGM = jnp.maximum(m_NGM, jnp.max(scores_NGMS, axis=-1))
        p_NGMS = jnp.exp(scores_NGMS - new_m_NGM[..., None])
        keep_NGM = jnp.exp(m_NGM - new_m_NGM)
        return (new_m_NGM, l_NGM * keep_NGM + jnp.sum(p_NGMS, axis=-1),
                acc_NGMV * keep_NGM[..., None] + _weighted(p_NGMS, tile))

    first: Array | int = 0
    if window is not None:
        oldest = jnp.min(jnp.where(position_N < 0, jnp.iinfo(jnp.int32).max, position_N))
        first = jnp.maximum(oldest - window + 1, 0) // S
    return _finish(jax.lax.fori_loop(first, jnp.max(position_N) // S + 1, trip, _start(N, G, M, V)))
