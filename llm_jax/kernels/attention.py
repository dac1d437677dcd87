"""Attention: one function, two uses (whole rows, and a paged cache)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels.backends import paged_attention
from llm_jax.kernels.paged import PagedContext

Array = jax.Array

# Finite, so that a row in which everything is masked gives a mean and not NaN; large enough that exp() is exactly 0.
MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseContext:
    """Whole rows attend to themselves, or to the rows of an encoder.

    Attributes:
      segment_ids_BT: int32, the document of each query's token; attention stays within a document, and 0 is padding,
        which attends to padding only. None: one document a row.
      key_segment_ids_BS: the same for the keys, where they are other tokens than the queries (cross-attention). None:
        the queries' own. Given alone, queries see every key that is not padding.
      causal: whether a token sees only itself and what is before it; static. Documents lie in a row without gaps, so
        what is before is told by the index in the row.
    """

    segment_ids_BT: Array | None = None
    key_segment_ids_BS: Array | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})


def attention(q_BTHK: Array, k_BSGK: Array, v_BSGV: Array | None, context: Any, cache: Any = None, *, scale: float,
              window: int | None = None, soft_cap: float | None = None, bias_HTS: Array | None = None,
              value_dim: int = 0) -> tuple[Array, Any]:
    """softmax(scale · q·kᵀ)·v over the keys that `context` and `window` allow, with grouped heads.

    Args:
      q_BTHK, k_BSGK, v_BSGV: queries, keys and values, any float dtype; G divides H, and query heads
        h·H/G … (h+1)·H/G − 1 share key/value head h. v is None where the values are the first `value_dim` entries of
        the keys (latent attention).
      context: `DenseContext`, or `PagedContext`, in which case the tokens are the flat tokens of a serving step
        (B = 1, S = T) and keys of earlier steps come from `cache`.
      cache: with a paged context, the layer's (k_pool, v_pool), or (k_pool,) where v is None.
      scale: multiplies the products of queries and keys.
      window: a query sees its own position and the window − 1 before it; None: all before it. Causal only.
      soft_cap: scores become cap · tanh(score / cap) (Gemma 2, arXiv:2408.00118).
      bias_HTS: added to the scores (T5's relative positions); dense only.
      value_dim: width of the values where v is None.
    Returns:
      [B, T, H, V] in q's dtype, and the cache with these keys and values written to it.
    """
    if isinstance(context, PagedContext):
        if bias_HTS is not None:
            raise ValueError("paged attention takes no bias")
        return paged_attention(q_BTHK, k_BSGK, v_BSGV, context, cache, scale=scale, window=window, soft_cap=soft_cap,
                               value_dim=value_dim)
    v_BSGV = k_BSGK[..., :value_dim] if v_BSGV is None else v_BSGV
    return dense_attention(q_BTHK, k_BSGK, v_BSGV, context, scale=scale, window=window, soft_cap=soft_cap,
                           bias_HTS=bias_HTS), cache


def dense_attention(q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, context: DenseContext, *, scale: float,
                    window: int | None = None, soft_cap: float | None = None, bias_HTS: Array | None = None) -> Array:
    """Attention of whole rows, the softmax in float32; see `attention`."""
    B, T, H, K = q_BTHK.shape
    S, G, V = v_BSGV.shape[1:]
    q_BTGMK = (q_BTHK * scale).reshape(B, T, G, H // G, K)
    scores_BGMTS = jnp.einsum("btgmk,bsgk->bgmts", q_BTGMK, k_BSGK, preferred_element_type=jnp.float32)
    if bias_HTS is not None:
        scores_BGMTS = scores_BGMTS + bias_HTS.astype(jnp.float32).reshape(G, H // G, T, S)
    if soft_cap is not None:
        scores_BGMTS = soft_cap * jnp.tanh(scores_BGMTS / soft_cap)
    allowed = _allowed(T, S, context, window)
    if allowed is not None:
        scores_BGMTS = jnp.where(allowed[:, None, None], scores_BGMTS, MASKED)
    weights_BGMTS = jax.nn.softmax(scores_BGMTS, axis=-1).astype(v_BSGV.dtype)
    out_BTGMV = jnp.einsum("bgmts,bsgv->btgmv", weights_BGMTS, v_BSGV)
    return out_BTGMV.reshape(B, T, H, V).astype(q_BTHK.dtype)


def _allowed(T: int, S: int, context: DenseContext, window: int | None) -> Array | None:
    """Which keys each query sees, [B or 1, T, S]; None where it is all of them."""
    allowed: Any = None
    if context.causal:
        if T != S:
            raise ValueError(f"causal attention is among the same tokens, not {T} queries and {S} keys")
        square = jnp.ones((T, S), bool)
        allowed = jnp.tril(square)[None]
        if window is not None:
            allowed = allowed & jnp.triu(square, 1 - window)[None]
    elif window is not None:
        raise ValueError("a window is of the past: it needs causal attention")
    mine, theirs = context.segment_ids_BT, context.key_segment_ids_BS
    if mine is not None:
        same = mine[:, :, None] == (mine if theirs is None else theirs)[:, None, :]
    elif theirs is not None:
        same = theirs[:, None, :] != 0
    else:
        return allowed
    return same if allowed is None else allowed & same
