"""Attention of whole rows on TPU: JAX's Pallas kernel, splash attention, which passes by what the mask rules out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from llm_jax.kernels.attention_call import Call
from llm_jax.kernels.chunked_attention import SAVED

Array = jax.Array

LANES = 128  # the kernel's blocks are multiples of them
BLOCK = 512  # tokens of a block, of queries and of keys, where a row is that long
MAX_WIDTH = 256
_PADDING = -1  # the document of tokens that fill up the last block


def unsupported(call: Call) -> str | None:
    """Why the kernel can't do it, or None if it can."""
    if call.bias:
        return "it takes no bias"
    if call.other_keys:
        return "it takes documents of a row's own tokens, not of an encoder's"
    if call.dtype not in ("bfloat16", "float32"):
        return f"it takes bfloat16 or float32, not {call.dtype}"
    if max(call.width, call.value_width) > MAX_WIDTH:
        return f"a head of {max(call.width, call.value_width)} entries is wider than {MAX_WIDTH}"
    return None


def attend(q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, segment_ids_BT: Array | None, *, scale: float, causal: bool,
           window: int | None = None, soft_cap: float | None = None, interpret: bool = False) -> Array:
    """See `attention.dense_attention`; on one device (`attention_call.on_mesh`).

    Args:
      interpret: run the kernel in JAX's interpreter, on any device; slow.
    """
    T, S, H = q_BTHK.shape[1], k_BSGK.shape[1], q_BTHK.shape[2]
    queries, keys = _padded(T), _padded(S)
    ids = None if segment_ids_BT is None else (segment_ids_BT, segment_ids_BT)
    if ids is None and not causal and (queries, keys) != (T, S):
        # Causal queries have the padding in their future; others must be told.
        ids = tuple(jnp.ones((q_BTHK.shape[0], length), jnp.int32) for length in (T, S))
    shape = queries, keys
    mask: masks.Mask = masks.FullMask(shape)
    if causal:
        mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block_q, block_k = min(queries, BLOCK), min(keys, BLOCK)
    blocks = splash.BlockSizes(block_q=block_q, block_kv=block_k, block_kv_compute=block_k, block_q_dkv=block_q,
                               block_kv_dkv=block_k, block_kv_dkv_compute=block_k, block_q_dq=block_q,
                               block_kv_dq=block_k)
    kernel = splash.make_splash_mha(masks.MultiHeadMask([mask] * H), block_sizes=blocks, head_shards=1, q_seq_shards=1,
                                    attn_logits_soft_cap=soft_cap, residual_checkpoint_name=SAVED, interpret=interpret)
    heads_first = [jnp.swapaxes(_fill(x, length), 1, 2) for x, length in
                   ((q_BTHK * scale, queries), (k_BSGK, keys), (v_BSGV, keys))]
    if ids is None:
        out_BHTV = jax.vmap(kernel)(*heads_first)
    else:
        segments = splash.SegmentIds(*(jnp.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=_PADDING)
                                       for x, length in zip(ids, shape, strict=True)))
        out_BHTV = jax.vmap(kernel)(*heads_first, segments)
    return jnp.swapaxes(out_BHTV, 1, 2)[:, :T].astype(q_BTHK.dtype)


def _padded(length: int) -> int:
    unit = LANES if length <= BLOCK else BLOCK
    return -(-length // unit) * unit


def _fill(x_BTHK: Array, length: int) -> Array:
    return jnp.pad(x_BTHK, ((0, 0), (0, length - x_BTHK.shape[1]), (0, 0), (0, 0)))
