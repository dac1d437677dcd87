"""Paged attention on TPU: JAX's Pallas kernel of ragged paged attention, and what stands between it and a serving step.

The kernel (`jax.experimental.pallas.ops.tpu.ragged_paged_attention`) wants pages [S, 2G, K] with keys and values
alternating over the heads, the queries of all rows one after another without gaps, and for each row its number of
queries, its length with these queries, and its pages; a row's queries are its last positions. It asks for more than it
says, and a step's rows have fixed strides with padding at their ends, so the caller here

- packs the queries. Padding cannot pass as extra queries at the end of a row: the row's length would have to grow by as
  much, which would uncover slots that nobody has written.
- leaves out rows without tokens. The kernel starts to copy a row's first pages while it is busy with the row before,
  and takes that copy up only if the row has something to do: the rows after an empty one read the wrong pages.
- names at least one row, for the same reason. A step with no tokens gets one query of the spare page.
- puts zeros where padding was: the kernel leaves there what was in its memory, maybe of another request.

Decoding and prefilling rows are two calls, so that a row of one token does not pay for a block of a long chunk's.

What the kernel reads and does not use. Keys and values of positions from a row's length on are replaced by zeros before
the products, and pages past the row's last one are not read at all: whatever is in unwritten slots, in free pages
and in pages of other requests, NaN included, changes nothing. Positions *within* the row's length that a query does not
see (later tokens of its chunk; tokens before its window) are masked by adding −2.4e38 to their scores and by weights of
zero: they must be finite, as what the row itself has written is. So a row has to keep the pages that have fallen out of
a window; its table must not name pages in their place that others write to. The XLA path selects these away too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention as kernel

from llm_jax.kernels.paged import PagedContext

Array = jax.Array

LANES = 128  # of a vector register: what a head's entries are padded to
TABLE_ENTRIES = 240 * 1024  # 1 MiB of scalar memory holds the table, 4 bytes an entry, and some lesser things
# A block of keys and values in VMEM (the kernel holds two): enough for a copy to take longer than its latency, little
# enough that short rows, which pay for a whole block, pay little.
_BLOCK_TOKENS, _BLOCK_BYTES = 512, 2 << 20
_VMEM_BYTES = 32 << 20
_DECODE_ROWS, _PREFILL_QUERIES = 8, 32  # queries of a block; the latter as JAX's tuned tables have it nearly everywhere


def supports(widths: tuple[int, int, int], num_heads: int, dtype: str, *, rows: int = 0,
             pages_per_row: int = 0) -> str | None:
    """Why a model's paged attention cannot use this kernel; None if it can.

    Args:
      widths: G, K and V, as `ModelConfig.cache_widths` has them; on a mesh, of one device's share.
      num_heads: H, likewise.
      dtype: of the pools.
      rows, pages_per_row: the larger of a step's decoding and prefilling rows, and the width of their table.
    """
    G, K, V = widths
    if not V:
        return "latent attention (one array for keys and values) has no TPU kernel"
    if jnp.dtype(dtype).name not in ("bfloat16", "float32"):
        return f"the TPU kernel reads pools of bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if max(K, V) > LANES:
        return f"the TPU kernel reads heads of at most {LANES} entries, not {max(K, V)}"
    if num_heads % G:
        return f"{num_heads} query heads cannot share {G} key/value heads evenly"
    if -(-rows // 8) * 8 * -(-pages_per_row // LANES) * LANES > TABLE_ENTRIES:  # as it is laid out there
        return (f"{rows} rows of {pages_per_row} pages are over the {TABLE_ENTRIES} table entries that fit a TPU's "
                f"scalar memory (pages by {LANES}): larger pages, fewer rows or a shorter context would do")
    return None


def make_pool_tpu(num_pages: int, page_size: int, widths: tuple[int, int, int], dtype: str) -> tuple[Array, ...]:
    """Empty pool of one layer: one array [P + 1, S, 2G, K], head g's keys at 2g and its values at 2g + 1.

    G is rounded up to what TPU tiles divide and K (the larger of the keys' and values' width) to a multiple of 128;
    what is added holds zeros. The last page is spare.

    Args: as `paged.make_pool`.
    """
    heads, *entries = widths
    shape = (num_pages + 1, page_size, 2 * _tiled_heads(heads, dtype), -(-max(entries) // LANES) * LANES)
    return (jnp.zeros(shape, dtype),)


def _tiled_heads(heads: int, dtype: str) -> int:
    """The least number from `heads` on of which 2·heads fill whole tiles: 32-bit rows by 1, 2, 4 or eights."""
    rows = -(-2 * heads * jnp.dtype(dtype).itemsize // 4)
    rows = next((r for r in (1, 2, 4) if r >= rows), -(-rows // 8) * 8)
    return rows * 4 // jnp.dtype(dtype).itemsize // 2


def attend(q_BTHK: Array, k_BTGK: Array, v_BTGV: Array | None, context: PagedContext, cache: tuple[Array, ...], *,
           scale: float, window: int | None = None, soft_cap: float | None = None,
           value_dim: int = 0) -> tuple[Array, tuple[Array, ...]]:
    """Writes the step's keys and values to their slots, then attends; see `attention.attention` (B = 1, T = S = N).

    Reads `table_RP` and `length_R` of the context, and no work lists. `scale`, `window` and `soft_cap` are Python
    numbers. Padding tokens get zeros.
    """
    if v_BTGV is None:
        raise ValueError("latent attention has no TPU kernel: backend xla")
    if context.table_RP is None or context.length_R is None:
        raise ValueError("the TPU kernel reads table_RP and length_R, and the step has none")
    pool_PSCK = write(cache[0], k_BTGK[0], v_BTGV[0], context.slot_N)
    N, H, _ = q_BTHK.shape[1:]
    G, V = v_BTGV.shape[2:]
    q_NGMK = _padded(q_BTHK[0].reshape(N, G, H // G, -1), 1, pool_PSCK.shape[2] // 2, pool_PSCK.shape[3])
    if H == G and pool_PSCK.dtype == jnp.float32:
        # The kernel takes float32 heads by fours: with one query each that would be less than a tile.
        q_NGMK = jnp.pad(q_NGMK, ((0, 0), (0, 0), (0, 1), (0, 0)))
    rows, done = context.decode_rows, context.num_decode
    outputs = []
    for tokens, row, length, block in (
            (slice(done), slice(rows), context.decode_width, _DECODE_ROWS * context.decode_width),
            (slice(done, N), slice(rows, None), context.chunk, _PREFILL_QUERIES)):
        q_THK = q_NGMK[tokens].reshape(-1, q_NGMK.shape[1] * q_NGMK.shape[2], q_NGMK.shape[3])
        if q_THK.shape[0]:
            outputs.append(_attend(q_THK, context.position_N[tokens].reshape(-1, length), pool_PSCK,
                                   context.table_RP[row], context.length_R[row], block,
                                   sm_scale=float(scale), sliding_window=window, soft_cap=soft_cap))
    out_NGMV = jnp.concatenate(outputs).reshape(q_NGMK.shape)[:, :G, :H // G, :V]
    return out_NGMV.reshape(1, N, H, V), (pool_PSCK,)


def write(pool_PSCK: Array, k_NGK: Array, v_NGV: Array, slot_N: Array) -> Array:
    """The pool with the keys and values of N tokens in their slots; in place where the pool is donated."""
    heads, width = pool_PSCK.shape[2] // 2, pool_PSCK.shape[3]
    new_NG2K = jnp.stack([_padded(a, 1, heads, width) for a in (k_NGK, v_NGV)], axis=2)
    page_N, offset_N = jnp.divmod(slot_N, pool_PSCK.shape[1])
    new_NCK = new_NG2K.reshape(-1, 2 * heads, width).astype(pool_PSCK.dtype)
    return pool_PSCK.at[page_N, offset_N].set(new_NCK, mode="promise_in_bounds")


def _padded(a: Array, axis: int, heads: int, width: int) -> Array:
    """With zeros up to so many heads, which are on that axis, of that width."""
    sizes = [(0, 0)] * a.ndim
    sizes[axis], sizes[-1] = (0, heads - a.shape[axis]), (0, width - a.shape[-1])
    return jnp.pad(a, sizes)


def _attend(q_NHK: Array, position_RT: Array, pool_PSCK: Array, table_RP: Array, length_R: Array, block: int,
            **options) -> Array:
    """Attention of R rows of T tokens each, of which some at the end are padding: [N, H, K], N = R·T."""
    R, T = position_RT.shape
    real_RT = position_RT >= 0
    count_R = jnp.sum(real_RT, axis=1, dtype=jnp.int32)
    # Rows with tokens first. The others, of no tokens, leave the running sums as they are in any order.
    order_R = jnp.argsort(count_R == 0, stable=True).astype(jnp.int32)
    end_R = jnp.cumsum(count_R[order_R], dtype=jnp.int32)
    # Packed query i is of the last row that begins at or before i; past the last query, any will do.
    index_N = jnp.arange(R * T, dtype=jnp.int32)
    row_N = jnp.minimum(jnp.sum(end_R <= index_N[:, None], axis=1, dtype=jnp.int32), R - 1)
    begin_R = end_R - count_R[order_R]
    source_N = order_R[row_N] * T + jnp.minimum(index_N - begin_R[row_N], T - 1)
    # One query of one key, where there are none: see the head of the file.
    ends_R = jnp.maximum(end_R, 1)
    packed_NHK = kernel(q_NHK[source_N], pool_PSCK, jnp.maximum(length_R[order_R], 1), table_RP[order_R],
                        jnp.concatenate([jnp.zeros(1, jnp.int32), ends_R]),
                        jnp.maximum(jnp.sum(count_R > 0, dtype=jnp.int32), 1)[None],
                        num_kv_pages_per_block=_pages_per_block(pool_PSCK, table_RP.shape[1]),
                        num_queries_per_block=min(block, R * T), vmem_limit_bytes=_VMEM_BYTES, **options)
    target_RT = (jnp.cumsum(count_R) - count_R)[:, None] + jnp.arange(T)
    out_NHK = packed_NHK[jnp.minimum(target_RT, R * T - 1).reshape(-1)]
    return jnp.where(real_RT.reshape(-1)[:, None, None], out_NHK, 0)


def _pages_per_block(pool_PSCK: Array, most: int) -> int:
    S, C, K = pool_PSCK.shape[1:]
    tokens = min(_BLOCK_TOKENS, _BLOCK_BYTES // (C * K * pool_PSCK.dtype.itemsize))
    return max(1, min(most, tokens // S))
