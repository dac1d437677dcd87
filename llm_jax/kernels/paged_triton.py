"""Paged attention on NVIDIA GPUs: a Pallas kernel for the Triton compiler.

A program holds a block of queries of one row and one key/value head (a row's tokens × the query heads that share the
head, so that every key read serves all of them) and walks over the row's keys through its page table, with the online
softmax of Milakov & Gimelshein (2018, arXiv:1805.02867). Where there are fewer blocks of queries than the GPU has room
for, the keys of a row are split among several programs (flash-decoding, Dao et al. 2023), whose partial results are
then put together. How a row's keys are cut depends on its own positions and on static shapes alone: other rows never
change a bit of its output. Where each token is a row (`decode_width` 1), neither does the way its prompt was cut into
chunks. Pools are [G, P + 1, S, K], as for the XLA path.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llm_jax.kernels.paged import PagedContext

Array = jax.Array

MAX_WIDTH = 256  # of a head; wider ones leave no shared memory for a second block of keys in flight
BLOCK_QUERIES = 128  # at most so many a program
BLOCK_BYTES = 16384  # of keys, and as many of values, that a program loads at once; and at most twice of queries
PROGRAMS = 512  # of 16 queries: four for each multiprocessor of an H100, which has 132
MIN_SPLIT, MAX_SPLIT = 128, 8192  # keys of a split where the context is at its longest
MAX_SPLITS = 128
STAGES = 3  # of the pipeline: page numbers of one block of keys, keys and values of another, products of a third

_NEG = -1e30


def supports(widths: tuple[int, int, int], num_heads: int, dtype: str) -> str | None:
    """Why the kernel cannot serve a model, or None if it can.

    Args:
      widths: G, K and V, as `ModelConfig.cache_widths` has them.
      num_heads: of the queries.
      dtype: of the cache.
    """
    heads, *entries = widths
    if not entries[1]:
        return "it reads keys and values, and a latent cache holds one of both"
    if num_heads % heads:
        return f"{num_heads} query heads do not share {heads} key/value heads evenly"
    if max(entries) > MAX_WIDTH:
        return f"a head of {max(entries)} entries is wider than {MAX_WIDTH}"
    if dtype not in ("bfloat16", "float16", "float32"):
        return f"it reads caches of bfloat16, float16 and float32, not {dtype}"
    return None


def attend(q_BTHK: Array, k_BTGK: Array, v_BTGV: Array | None, context: PagedContext, cache: tuple[Array, ...], *,
           scale: float, window: int | None = None, soft_cap: float | None = None, value_dim: int = 0,
           interpret: bool = False) -> tuple[Array, tuple[Array, ...]]:
    """Writes the step's keys and values to their slots, then attends; see `attention.attention` (B = 1, T = S = N).

    Args:
      context: with `table_RP`; work lists are not read, nor `length_R`: a row's keys end where its last position is.
      interpret: run the kernel in JAX's interpreter, on any device; slow.
    """
    if v_BTGV is None or context.table_RP is None:
        raise ValueError("the Triton kernel needs values of their own" if v_BTGV is None else
                         "the step has no page tables")
    k_GPSK, v_GPSV = (_write(pool, new[0], context.slot_N)
                      for pool, new in zip(cache, (k_BTGK, v_BTGV), strict=True))
    N = q_BTHK.shape[1]
    run = functools.partial(_rows, q_BTHK[0], k_GPSK, v_GPSV, context.position_N, context.table_RP, scale=scale,
                            window=window, soft_cap=soft_cap, interpret=interpret)
    outputs = []
    if context.num_decode:
        outputs.append(run(first=0, first_row=0, rows=context.decode_rows, length=context.decode_width))
    if N > context.num_decode:
        outputs.append(run(first=context.num_decode, first_row=context.decode_rows,
                           rows=(N - context.num_decode) // context.chunk, length=context.chunk))
    return jnp.concatenate(outputs)[None], (k_GPSK, v_GPSV)


def _write(pool_GPSK: Array, new_NGK: Array, slot_N: Array) -> Array:
    # XLA updates the pool in place; benchmarks/compile_gpu.py looks that it does.
    page_N, offset_N = jnp.divmod(slot_N, pool_GPSK.shape[2])
    new_GNK = jnp.swapaxes(new_NGK, 0, 1).astype(pool_GPSK.dtype)
    return pool_GPSK.at[:, page_N, offset_N].set(new_GNK, mode="promise_in_bounds")


def _rows(q_NHK: Array, k_GPSK: Array, v_GPSV: Array, position_N: Array, table_RP: Array, *, first: int,
          first_row: int, rows: int, length: int, scale: float, window: int | None, soft_cap: float | None,
          interpret: bool) -> Array:
    """Attention of `rows` rows of `length` tokens each: [rows · length, H, V].

    Args:
      first, first_row: the first flat token, and the first row of the table, that are theirs.
    """
    H, G, V = q_NHK.shape[1], k_GPSK.shape[0], v_GPSV.shape[3]
    queries = length * (H // G)
    width = max(_padded(q_NHK.shape[2]), _padded(V))
    itemsize = max(q_NHK.dtype.itemsize, k_GPSK.dtype.itemsize)
    # Products of float32 are taken without tensor cores, from registers, and spill where blocks are large.
    most_q, most_k = (BLOCK_QUERIES, 128) if itemsize == 2 else (32, 32)
    block_q = min(_padded(queries), most_q, max(16, 2 * BLOCK_BYTES // (width * itemsize)))
    block_k = min(most_k, max(16, BLOCK_BYTES // (width * itemsize)))
    blocks = -(-queries // block_q)
    splits = _num_splits(rows * G * blocks, block_q, table_RP.shape[1] * k_GPSK.shape[2])
    kernel = functools.partial(_kernel, first=first, first_row=first_row, length=length, scale=scale, window=window,
                               soft_cap=soft_cap, block_q=block_q, block_k=block_k, blocks=blocks, splits=splits)
    out_shape = jax.ShapeDtypeStruct((rows * length, H, V), q_NHK.dtype)
    shapes = [out_shape]
    if splits > 1:  # values, the largest score, what the scores sum to
        shapes = [jax.ShapeDtypeStruct((splits, *shape), jnp.float32)
                  for shape in (out_shape.shape, out_shape.shape[:2], out_shape.shape[:2])]
    parts = pl.pallas_call(
        kernel, grid=(blocks * splits, G, rows), out_shape=shapes, interpret=interpret, name="paged_attention",
        compiler_params=plgpu.CompilerParams(num_warps=8 if block_q * max(width, block_k) >= 16384 else 4,
                                             num_stages=STAGES),
    )(q_NHK, k_GPSK, v_GPSV, position_N, table_RP)
    if splits == 1:
        return parts[0]
    return pl.pallas_call(
        functools.partial(_combine_kernel, splits=splits), grid=(rows * length, H), out_shape=out_shape,
        interpret=interpret, name="paged_attention_combine",
        compiler_params=plgpu.CompilerParams(num_warps=8 if splits * width >= 8192 else 4, num_stages=1),
    )(*parts)


def _padded(size: int) -> int:
    """The next power of two, as Triton's blocks want it, and at least what a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())


def _num_splits(programs: int, block_q: int, tokens: int) -> int:
    """Among how many programs a row's keys are divided.

    Args:
      programs: there are without splits.
      block_q: queries of a program; one of many needs fewer beside it to keep a multiprocessor busy.
      tokens: the longest a row can get.
    """
    wanted = max(PROGRAMS * 16 // block_q, PROGRAMS // 4)
    return max(1, min(max(-(-wanted // programs), tokens // MAX_SPLIT), tokens // MIN_SPLIT, MAX_SPLITS))


def _kernel(q_ref, k_ref, v_ref, position_ref, table_ref, out_ref, *partial_refs, first: int, first_row: int,
            length: int, scale: float, window: int | None, soft_cap: float | None, block_q: int, block_k: int,
            blocks: int, splits: int) -> None:
    """One block of queries (A) of one row and key/value head over one split of its keys (C)."""
    block, split = jax.lax.rem(pl.program_id(0), blocks), jax.lax.div(pl.program_id(0), blocks)
    head, row = pl.program_id(1), pl.program_id(2)
    K, V, S = q_ref.shape[2], v_ref.shape[3], k_ref.shape[2]
    M = q_ref.shape[1] // k_ref.shape[0]
    query_A = block * block_q + jnp.arange(block_q)
    real_A = query_A < length * M
    token_A = row * length + jax.lax.div(query_A, M)
    head_A = head * M + jax.lax.rem(query_A, M)
    column_K, column_V = jnp.arange(_padded(K)), jnp.arange(_padded(V))
    position_A = plgpu.load(position_ref.at[first + token_A], mask=real_A, other=-1)
    q_AK = plgpu.load(q_ref.at[first + token_A[:, None], head_A[:, None], column_K[None]],
                      mask=real_A[:, None] & (column_K < K)[None], other=0)

    # Keys from `start` to `end` are those that some query of the block sees: only they are read, since any other slot
    # may hold anything, NaN included. Blocks of keys start at multiples of their size wherever the queries lie.
    end = jnp.max(position_A) + 1
    start = jnp.int32(0)
    if window is not None:
        start = jnp.maximum(jnp.min(jnp.where(position_A < 0, end, position_A)) - window + 1, 0)
    base = jax.lax.div(start, block_k)
    trips = jax.lax.div(end + block_k - 1, block_k) - base
    share = jax.lax.div(trips + splits - 1, splits)

    def trip(t, carry):
        best_A, sum_A, acc_AV = carry
        key_C = (base + t) * block_k + jnp.arange(block_k)
        seen_C = (key_C >= start) & (key_C < end)
        page_C = plgpu.load(table_ref.at[first_row + row, jax.lax.div(key_C, S)], mask=seen_C, other=0)
        at = head, page_C[:, None], jax.lax.rem(key_C, S)[:, None]
        k_CK = plgpu.load(k_ref.at[*at, column_K[None]], mask=seen_C[:, None] & (column_K < K)[None], other=0)
        scores_AC = _dot(q_AK, k_CK.astype(q_AK.dtype), ((1,), (1,))) * scale
        if soft_cap is not None:
            scores_AC = soft_cap * jnp.tanh(scores_AC / soft_cap)
        visible_AC = key_C[None] <= position_A[:, None]
        if window is not None:
            visible_AC &= key_C[None] > position_A[:, None] - window
        scores_AC = jnp.where(visible_AC, scores_AC * math.log2(math.e), _NEG)
        new_best_A = jnp.maximum(best_A, jnp.max(scores_AC, axis=1))
        p_AC = jnp.where(visible_AC, jnp.exp2(scores_AC - new_best_A[:, None]), 0.0)
        keep_A = jnp.exp2(best_A - new_best_A)
        v_CV = plgpu.load(v_ref.at[*at, column_V[None]], mask=seen_C[:, None] & (column_V < V)[None], other=0)
        v_CV = v_CV.astype(q_AK.dtype)
        acc_AV = acc_AV * keep_A[:, None] + _dot(p_AC.astype(v_CV.dtype), v_CV, ((1,), (0,)))
        return new_best_A, sum_A * keep_A + jnp.sum(p_AC, axis=1), acc_AV

    init = (jnp.full((block_q,), _NEG, jnp.float32), jnp.zeros((block_q,), jnp.float32),
            jnp.zeros((block_q, _padded(V)), jnp.float32))
    best_A, sum_A, acc_AV = jax.lax.fori_loop(split * share, jnp.minimum((split + 1) * share, trips), trip, init)

    written = real_A[:, None] & (column_V < V)[None]
    if splits == 1:
        acc_AV = acc_AV / jnp.where(sum_A > 0, sum_A, 1.0)[:, None]
        plgpu.store(out_ref.at[token_A[:, None], head_A[:, None], column_V[None]], acc_AV.astype(out_ref.dtype),
                    mask=written)
        return
    plgpu.store(out_ref.at[split, token_A[:, None], head_A[:, None], column_V[None]], acc_AV, mask=written)
    for ref, value_A in zip(partial_refs, (best_A, sum_A), strict=True):
        plgpu.store(ref.at[split, token_A, head_A], value_A, mask=real_A)


def _combine_kernel(acc_ref, best_ref, sum_ref, out_ref, *, splits: int) -> None:
    """One query and head: the mean of its splits' values, each weighted by what its scores sum to."""
    token, head, V = pl.program_id(0), pl.program_id(1), acc_ref.shape[3]
    split_C, column_V = jnp.arange(_padded(splits)), jnp.arange(_padded(V))
    real_C, real_V = split_C < splits, column_V < V
    best_C = plgpu.load(best_ref.at[split_C, token, head], mask=real_C, other=_NEG)
    sum_C = plgpu.load(sum_ref.at[split_C, token, head], mask=real_C, other=0)
    acc_CV = plgpu.load(acc_ref.at[split_C[:, None], token, head, column_V[None]],
                        mask=real_C[:, None] & real_V[None], other=0)
    weight_C = jnp.exp2(best_C - jnp.max(best_C))
    total = jnp.sum(weight_C * sum_C)
    out_V = jnp.sum(weight_C[:, None] * acc_CV, axis=0) / jnp.where(total > 0, total, 1.0)
    plgpu.store(out_ref.at[token, head, column_V], out_V.astype(out_ref.dtype), mask=real_V)


def _dot(a: Array, b: Array, axes: tuple[tuple[int], tuple[int]]) -> Array:
    # The compiler would round float32 to tf32, ten bits of mantissa, unless told not to.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)
