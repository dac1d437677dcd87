"""Attention: one function, two uses (whole rows, and a paged cache)."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.errors import UserError
from llm_jax.kernels import attention_call
from llm_jax.kernels.attention_call import Call, on_mesh
from llm_jax.kernels.backends import paged_attention
from llm_jax.kernels.chunked_attention import MASKED, SAVED, chunked_attention, default_block
from llm_jax.kernels.paged import PagedContext

Array = jax.Array

BACKENDS = ("auto", "dense", "chunked", "strips", "splash", "cudnn", "triton")
# What is for one platform, the fastest first.
_KERNELS = {"cpu": ("strips",), "tpu": ("splash",), "gpu": ("cudnn", "triton")}
# "auto" takes blocks, or strips, for rows of so many tokens, where no kernel does (benchmarks/attention_train.py on a
# CPU).
CHUNKED_FROM = {"cpu": 128, "gpu": 1024, "tpu": 1024}


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
      backend: how it is computed, one of `BACKENDS` (see `choose`); static.
      batch_axes, head_axes: axes of the mesh in force that rows and heads lie along, for kernels that the compiler
        can't divide by itself; static.
    """

    segment_ids_BT: Array | None = None
    key_segment_ids_BS: Array | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    backend: str = dataclasses.field(default="auto", metadata={"static": True})
    batch_axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    head_axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})


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
    """Attention of whole rows, the softmax in float32, by the backend that `choose` names; see `attention`.

    All backends compute the same. A query that sees nothing (of a document without keys, in cross-attention) gets the
    mean of all values.

    Raises:
      UserError: the context asks for a backend that can't do this here.
    """
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    if context.causal and T != S:
        raise ValueError(f"causal attention is among the same tokens, not {T} queries and {S} keys")
    if not context.causal and window is not None:
        raise ValueError("a window is of the past: it needs causal attention")
    dtypes = {x.dtype.name for x in (q_BTHK, k_BSGK, v_BSGV)}
    call = Call(T, S, q_BTHK.shape[2], k_BSGK.shape[2], k_BSGK.shape[3], v_BSGV.shape[3],
                dtypes.pop() if len(dtypes) == 1 else "mixed", context.causal, window, soft_cap,
                segments=context.segment_ids_BT is not None, other_keys=context.key_segment_ids_BS is not None,
                bias=bias_HTS is not None)
    backend = choose(call, context.backend)
    options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap}
    if backend == "dense":
        return checkpoint_name(_all_scores(q_BTHK, k_BSGK, v_BSGV, context, bias_HTS=bias_HTS, **options), SAVED)
    options["causal"] = context.causal
    if backend == "chunked":
        mesh = jax.sharding.get_abstract_mesh()
        B, H = (max(1, size // math.prod(mesh.shape.get(axis, 1) for axis in axes)) for size, axes in
                ((q_BTHK.shape[0], context.batch_axes), (q_BTHK.shape[2], context.head_axes)))
        return chunked_attention(q_BTHK, k_BSGK, v_BSGV, segment_ids_BT=context.segment_ids_BT,
                                 key_segment_ids_BS=context.key_segment_ids_BS, block=default_block(B, H, max(T, S)),
                                 **options)
    kernel = functools.partial(_module(backend).attend, **options)
    return on_mesh(kernel, q_BTHK, k_BSGK, v_BSGV, context.segment_ids_BT, context.batch_axes, context.head_axes)


def choose(call: Call, wanted: str = "auto") -> str:
    """How a call is computed.

    Args:
      call: what is asked for.
      wanted: "dense" makes all scores at once, in plain JAX. "chunked" makes them in blocks, in plain JAX, with memory
        that grows with the length of a row; "strips" is its faster form for short rows on CPUs. "splash" is a kernel
        for TPUs, "cudnn" (rows of one document) and "triton" are for NVIDIA GPUs. "auto" is the first of the platform's
        own that can do it, but for the shortest rows on a CPU; without one, "dense" where there is a bias or rows are
        short, else "chunked".
    Returns:
      One of `BACKENDS` but "auto".
    Raises:
      UserError: `wanted` is unknown, or can't do it.
    """
    if wanted not in BACKENDS:
        raise UserError(f"Execution.attention={wanted!r} is not one of {BACKENDS}")
    if wanted != "auto":
        reason = _unsupported(wanted, call)
        if reason is not None:
            raise UserError(f"Execution.attention={wanted!r} can't compute this model's attention: {reason}; 'auto' "
                            f"takes what can")
        return wanted
    here = attention_call.platform()
    is_short = max(call.queries, call.keys) < CHUNKED_FROM.get(here, 1024)
    for backend in () if is_short and here == "cpu" else _KERNELS.get(here, ()):
        if _unsupported(backend, call) is None:
            return backend
    return "dense" if call.bias or is_short else "chunked"


def _unsupported(backend: str, call: Call) -> str | None:
    if backend == "dense":
        return None
    if backend == "chunked":
        return "a bias is added to all scores at once, which 'dense' does" if call.bias else None
    here = attention_call.platform()
    if backend not in _KERNELS.get(here, ()):
        its = next(platform for platform, kernels in _KERNELS.items() if backend in kernels)
        return f"it is for {its}, and this is {here}"
    if here == "gpu" and "NVIDIA" not in attention_call.device_kind():
        return f"it is for GPUs of NVIDIA's, and this is {attention_call.device_kind()}"
    return _module(backend).unsupported(call)


def _module(backend: str) -> ModuleType:
    """A platform's kernels. Imported where they are chosen: Pallas takes a second, which a laptop need not wait."""
    if backend == "splash":
        from llm_jax.kernels import splash_attention

        return splash_attention
    if backend == "strips":
        from llm_jax.kernels import strip_attention

        return strip_attention
    if backend == "cudnn":
        from llm_jax.kernels import cudnn_attention

        return cudnn_attention
    from llm_jax.kernels import triton_attention

    return triton_attention


def _all_scores(q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, context: DenseContext, *, scale: float,
                window: int | None, soft_cap: float | None, bias_HTS: Array | None) -> Array:
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
        square = jnp.ones((T, S), bool)
        allowed = jnp.tril(square)[None]
        if window is not None:
            allowed = allowed & jnp.triu(square, 1 - window)[None]
    mine, theirs = context.segment_ids_BT, context.key_segment_ids_BS
    if mine is not None:
        same = mine[:, :, None] == (mine if theirs is None else theirs)[:, None, :]
    elif theirs is not None:
        same = theirs[:, None, :] != 0
    else:
        return allowed
    return same if allowed is None else allowed & same
