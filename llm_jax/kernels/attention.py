"""Attention: one function, two uses (whole rows, and a paged cache)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels.paged import PagedContext, paged_attention

Array = jax.Array

# Finite, so that a row in which everything is masked gives a mean and not NaN; large enough that exp() is exactly 0.
MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseContext:
    """Whole rows attend to themselves, causally.

    Attributes:
      segment_ids_BT: int32, the document of each token; attention stays within a document. None: one document a row.
    """

    segment_ids_BT: Array | None = None


def attention(q_BTHK: Array, k_BTGK: Array, v_BTGK: Array, context: Any, cache: Any = None) -> tuple[Array, Any]:
    """Causal softmax(q·kᵀ / √K)·v with grouped heads.

    Args:
      q_BTHK, k_BTGK, v_BTGK: queries, keys and values of the same T tokens, any float dtype; G divides H, and query
        heads h·H/G … (h+1)·H/G − 1 share key/value head h.
      context: `DenseContext`, or `PagedContext`, in which case the tokens are the flat tokens of a serving step
        (B = 1) and keys of earlier steps come from `cache`.
      cache: with a paged context, the layer's (k_pool, v_pool).
    Returns:
      [B, T, H, K] in q's dtype, and the cache with these keys and values written to it.
    """
    if isinstance(context, PagedContext):
        return paged_attention(q_BTHK, k_BTGK, v_BTGK, context, cache)
    return dense_attention(q_BTHK, k_BTGK, v_BTGK, context.segment_ids_BT), cache


def dense_attention(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, segment_ids_BT: Array | None) -> Array:
    """Causal attention within segments, the softmax in float32; see `attention`."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGMK = (q_BTHK * K**-0.5).reshape(B, T, G, H // G, K)
    scores_BGMTS = jnp.einsum("btgmk,bsgk->bgmts", q_BTGMK, k_BSGK, preferred_element_type=jnp.float32)
    allowed = jnp.tril(jnp.ones((T, T), bool))[None]
    if segment_ids_BT is not None:
        allowed = allowed & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
    scores_BGMTS = jnp.where(allowed[:, None, None], scores_BGMTS, MASKED)
    weights_BGMTS = jax.nn.softmax(scores_BGMTS, axis=-1).astype(v_BSGK.dtype)
    out_BTGMK = jnp.einsum("bgmts,bsgk->btgmk", weights_BGMTS, v_BSGK)
    return out_BTGMK.reshape(B, T, H, K).astype(q_BTHK.dtype)
