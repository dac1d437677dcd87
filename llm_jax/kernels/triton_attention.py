"""Attention of whole rows on GPUs: a Pallas kernel for the Triton compiler, for rows of several documents, windows and
soft caps.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): a program holds a block of queries and walks over the keys with the
online softmax; backward, one kernel walks likewise for the gradient of the queries and another, which holds a block of
keys, over the queries that see them. Documents lie in a row without gaps, so the keys that a query sees, and the
queries that see a key, are one stretch each: its ends are all that the kernels are told of documents, causality and
window, and blocks outside of it are not visited. Query heads that share a key/value head are walked over in turn where
its gradient is made, so that nothing is added up afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llm_jax.kernels.attention_call import Call
from llm_jax.kernels.chunked_attention import SAVED

Array = jax.Array

MAX_WIDTH = 128  # of a head; wider ones leave no room for two blocks and their gradients
STAGES = 2

_LOG2_E = math.log2(math.e)
_NEG = -1e30


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What of a call is static: `block_q` queries or `block_k` keys are held, `step_k` or `step_q` walked over."""

    scale: float
    soft_cap: float | None
    block_q: int
    step_k: int
    block_k: int
    step_q: int
    interpret: bool


def unsupported(call: Call) -> str | None:
    """Why the kernel can't do it, or None if it can."""
    if call.bias:
        return "it takes no bias"
    if call.other_keys or call.queries != call.keys:
        return "it takes a row's own tokens as keys, not an encoder's"
    if max(call.width, call.value_width) > MAX_WIDTH:
        return f"a head of {max(call.width, call.value_width)} entries is wider than {MAX_WIDTH}"
    if call.dtype not in ("bfloat16", "float16", "float32"):
        return f"it takes bfloat16, float16 or float32, not {call.dtype}"
    return None


def attend(q_BTHK: Array, k_BTGK: Array, v_BTGV: Array, segment_ids_BT: Array | None, *, scale: float, causal: bool,
           window: int | None = None, soft_cap: float | None = None, blocks: tuple[int, int, int, int] | None = None,
           interpret: bool = False) -> Array:
    """See `attention.dense_attention`; on one device (`attention_call.on_mesh`).

    Args:
      blocks: queries held and keys a step, keys held and queries a step; powers of two, at least 16.
      interpret: run the kernels in JAX's interpreter, on any device; slow.
    """
    B, T = q_BTHK.shape[:2]
    # Products of float32 are taken without tensor cores, from registers, and spill where blocks are large.
    blocks = blocks or ((128, 64, 64, 64) if q_BTHK.dtype.itemsize == 2 else (32, 32, 32, 32))
    block_q, step_k, block_k, step_q = (min(size, _power_of_two(T)) for size in blocks)
    plan = _Plan(scale, soft_cap, block_q, step_k, block_k, step_q, interpret)
    at_T = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    first_BT, last_BT = jnp.zeros_like(at_T), jnp.full_like(at_T, T - 1)
    if segment_ids_BT is not None:
        first_BT, last_BT = _documents(segment_ids_BT)
    seen_BT, seeing_BT = (first_BT, last_BT), (first_BT, last_BT)  # keys of each query; queries of each key
    if causal:
        reach = T if window is None else window - 1
        seen_BT = jnp.maximum(first_BT, at_T - reach), at_T
        seeing_BT = at_T, jnp.minimum(last_BT, at_T + reach)
    return _attend(plan, q_BTHK, k_BTGK, v_BTGV, seen_BT, seeing_BT)


def _documents(segment_ids_BT: Array) -> tuple[Array, Array]:
    """Of each token, the first and the last of its document, by their index in the row."""
    B, T = segment_ids_BT.shape
    at_T = jnp.arange(T, dtype=jnp.int32)
    changes = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    edge = jnp.ones((B, 1), bool)
    first_BT = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes], axis=1), at_T, 0), axis=1)
    last_BT = jax.lax.cummin(jnp.where(jnp.concatenate([changes, edge], axis=1), at_T, T - 1), axis=1, reverse=True)
    return first_BT, last_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q_BTHK: Array, k_BTGK: Array, v_BTGV: Array, seen_BT: tuple[Array, Array],
            seeing_BT: tuple[Array, Array]) -> Array:
    return _forward(plan, q_BTHK, k_BTGK, v_BTGV, seen_BT, seeing_BT)[0]


def _forward(plan: _Plan, q_BTHK: Array, k_BTGK: Array, v_BTGV: Array, seen_BT: tuple[Array, Array],
             seeing_BT: tuple[Array, Array]) -> tuple[Array, tuple]:
    B, T, H, _ = q_BTHK.shape
    shapes = [jax.ShapeDtypeStruct((B, T, H, v_BTGV.shape[3]), q_BTHK.dtype),
              jax.ShapeDtypeStruct((B, H, T), jnp.float32)]
    out_BTHV, log_sum_BHT = _run(_forward_kernel, plan, plan.block_q, H, shapes, "attention_forward")(
        q_BTHK, k_BTGK, v_BTGV, *seen_BT)
    out_BTHV, log_sum_BHT = checkpoint_name(out_BTHV, SAVED), checkpoint_name(log_sum_BHT, SAVED)
    return out_BTHV, (q_BTHK, k_BTGK, v_BTGV, seen_BT, seeing_BT, out_BTHV, log_sum_BHT)


def _backward(plan: _Plan, saved: tuple, dout_BTHV: Array) -> tuple:
    q_BTHK, k_BTGK, v_BTGV, seen_BT, seeing_BT, out_BTHV, log_sum_BHT = saved
    mean_BHT = jnp.einsum("bthv,bthv->bht", dout_BTHV, out_BTHV, preferred_element_type=jnp.float32)
    of_queries = dout_BTHV.astype(v_BTGV.dtype), log_sum_BHT, mean_BHT
    like_q, like_k, like_v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BTHK, k_BTGK, v_BTGV))
    dq_BTHK, = _run(_dq_kernel, plan, plan.block_q, q_BTHK.shape[2], [like_q], "attention_dq")(
        q_BTHK, k_BTGK, v_BTGV, *of_queries, *seen_BT)
    dk_BTGK, dv_BTGV = _run(_dkv_kernel, plan, plan.block_k, k_BTGK.shape[2], [like_k, like_v], "attention_dkv")(
        q_BTHK, k_BTGK, v_BTGV, *of_queries, *seeing_BT)
    return dq_BTHK, dk_BTGK, dv_BTGV, None, None


_attend.defvjp(_forward, _backward)


def _run(kernel: Callable[..., None], plan: _Plan, block: int, heads: int, shapes: list[jax.ShapeDtypeStruct],
         name: str) -> Callable[..., Any]:
    """The call of a kernel, a program for each block of tokens, head and row."""
    rows, tokens, _, width = shapes[0].shape
    held = block * _power_of_two(width) * shapes[0].dtype.itemsize
    return pl.pallas_call(
        functools.partial(kernel, plan=plan), grid=(-(-tokens // block), heads, rows), out_shape=shapes,
        interpret=plan.interpret, name=name,
        compiler_params=plgpu.CompilerParams(num_warps=8 if held >= 16384 else 4, num_stages=STAGES))


def _forward_kernel(q_ref, k_ref, v_ref, first_ref, last_ref, out_ref, log_sum_ref, *, plan: _Plan) -> None:
    """One block of queries (A) of one head, over blocks of the keys (C) that they see."""
    head, row = pl.program_id(1), pl.program_id(2)
    kv_head = jax.lax.div(head, q_ref.shape[2] // k_ref.shape[2])
    at_A, real_A, first_A, last_A = _held(plan.block_q, row, first_ref, last_ref)
    q_AK = _load(q_ref, row, at_A, head, real_A)

    def step(t, carry):
        most_A, sum_A, acc_AV = carry
        at_C = t * plan.step_k + jnp.arange(plan.step_k)
        real_C = at_C < k_ref.shape[1]
        scores_AC, _ = _scores(plan, _dot(q_AK, _load(k_ref, row, at_C, kv_head, real_C), ((1,), (1,))))
        visible_AC = (at_C[None] >= first_A[:, None]) & (at_C[None] <= last_A[:, None])
        scores_AC = jnp.where(visible_AC, scores_AC, _NEG)
        new_most_A = jnp.maximum(most_A, jnp.max(scores_AC, axis=1))
        p_AC = jnp.where(visible_AC, jnp.exp2(scores_AC - new_most_A[:, None]), 0.0)
        keep_A = jnp.exp2(most_A - new_most_A)
        v_CV = _load(v_ref, row, at_C, kv_head, real_C)
        acc_AV = acc_AV * keep_A[:, None] + _dot(p_AC.astype(v_CV.dtype), v_CV, ((1,), (0,)))
        return new_most_A, sum_A * keep_A + jnp.sum(p_AC, axis=1), acc_AV

    most_A, sum_A, acc_AV = _walk(plan.step_k, first_A, last_A, step, (
        jnp.full((plan.block_q,), _NEG, jnp.float32), jnp.zeros((plan.block_q,), jnp.float32),
        jnp.zeros((plan.block_q, _power_of_two(v_ref.shape[3])), jnp.float32)))
    sum_A = jnp.where(sum_A > 0, sum_A, 1.0)
    _store(out_ref, row, at_A, head, real_A, acc_AV / sum_A[:, None])
    plgpu.store(log_sum_ref.at[row, head, at_A], most_A + jnp.log2(sum_A), mask=real_A)


def _dq_kernel(q_ref, k_ref, v_ref, dout_ref, log_sum_ref, mean_ref, first_ref, last_ref, dq_ref, *,
               plan: _Plan) -> None:
    """The gradient of one block of queries (A) of one head."""
    head, row = pl.program_id(1), pl.program_id(2)
    kv_head = jax.lax.div(head, q_ref.shape[2] // k_ref.shape[2])
    at_A, real_A, first_A, last_A = _held(plan.block_q, row, first_ref, last_ref)
    q_AK, dout_AV = _load(q_ref, row, at_A, head, real_A), _load(dout_ref, row, at_A, head, real_A)
    log_sum_A, mean_A = (plgpu.load(ref.at[row, head, at_A], mask=real_A, other=0) for ref in (log_sum_ref, mean_ref))

    def step(t, dq_AK):
        at_C = t * plan.step_k + jnp.arange(plan.step_k)
        real_C = at_C < k_ref.shape[1]
        k_CK, v_CV = _load(k_ref, row, at_C, kv_head, real_C), _load(v_ref, row, at_C, kv_head, real_C)
        scores_AC, slope_AC = _scores(plan, _dot(q_AK, k_CK, ((1,), (1,))))
        visible_AC = (at_C[None] >= first_A[:, None]) & (at_C[None] <= last_A[:, None])
        p_AC = jnp.where(visible_AC, jnp.exp2(scores_AC - log_sum_A[:, None]), 0.0)
        ds_AC = p_AC * (_dot(dout_AV, v_CV, ((1,), (1,))) - mean_A[:, None]) * slope_AC
        return dq_AK + _dot(ds_AC.astype(k_CK.dtype), k_CK, ((1,), (0,)))

    dq_AK = _walk(plan.step_k, first_A, last_A, step, jnp.zeros(q_AK.shape, jnp.float32))
    _store(dq_ref, row, at_A, head, real_A, dq_AK * plan.scale)


def _dkv_kernel(q_ref, k_ref, v_ref, dout_ref, log_sum_ref, mean_ref, first_ref, last_ref, dk_ref, dv_ref, *,
                plan: _Plan) -> None:
    """The gradients of one block of keys and values (C) of one head, over the queries (A) that see them."""
    kv_head, row = pl.program_id(1), pl.program_id(2)
    group = q_ref.shape[2] // k_ref.shape[2]
    at_C, real_C, first_C, last_C = _held(plan.block_k, row, first_ref, last_ref)
    k_CK, v_CV = _load(k_ref, row, at_C, kv_head, real_C), _load(v_ref, row, at_C, kv_head, real_C)

    def step(t, carry, head):
        dk_CK, dv_CV = carry
        at_A = t * plan.step_q + jnp.arange(plan.step_q)
        real_A = at_A < q_ref.shape[1]
        q_AK, dout_AV = _load(q_ref, row, at_A, head, real_A), _load(dout_ref, row, at_A, head, real_A)
        log_sum_A, mean_A = (plgpu.load(ref.at[row, head, at_A], mask=real_A, other=0)
                             for ref in (log_sum_ref, mean_ref))
        scores_CA, slope_CA = _scores(plan, _dot(k_CK, q_AK, ((1,), (1,))))
        visible_CA = (at_A[None] >= first_C[:, None]) & (at_A[None] <= last_C[:, None])
        p_CA = jnp.where(visible_CA, jnp.exp2(scores_CA - log_sum_A[None]), 0.0)
        ds_CA = p_CA * (_dot(v_CV, dout_AV, ((1,), (1,))) - mean_A[None]) * slope_CA
        return (dk_CK + _dot(ds_CA.astype(q_AK.dtype), q_AK, ((1,), (0,))),
                dv_CV + _dot(p_CA.astype(dout_AV.dtype), dout_AV, ((1,), (0,))))

    def of_head(m, carry):
        return _walk(plan.step_q, first_C, last_C, functools.partial(step, head=kv_head * group + m), carry)

    dk_CK, dv_CV = jax.lax.fori_loop(0, group, of_head, (jnp.zeros(k_CK.shape, jnp.float32),
                                                        jnp.zeros(v_CV.shape, jnp.float32)))
    _store(dk_ref, row, at_C, kv_head, real_C, dk_CK * plan.scale)
    _store(dv_ref, row, at_C, kv_head, real_C, dv_CV)


def _held(block: int, row: Array, first_ref: Any, last_ref: Any) -> tuple[Array, Array, Array, Array]:
    """Indices of the tokens that this program holds, which of them exist, and the stretch of others each has to do
    with: none for those that don't exist."""
    at = pl.program_id(0) * block + jnp.arange(block)
    real = at < first_ref.shape[1]
    first = plgpu.load(first_ref.at[row, at], mask=real, other=first_ref.shape[1])
    return at, real, first, plgpu.load(last_ref.at[row, at], mask=real, other=-1)


def _walk(step: int, first: Array, last: Array, body: Callable[..., Any], init: Any) -> Any:
    """`body` over the blocks of `step` tokens in which one of the stretches from `first` to `last` lies."""
    return jax.lax.fori_loop(jax.lax.div(jnp.min(first), step), jax.lax.div(jnp.max(last), step) + 1, body, init)


def _scores(plan: _Plan, products: Array) -> tuple[Array, Any]:
    """Scores, times log₂ e, of products of queries and keys; and their slope, apart from the scale."""
    if plan.soft_cap is None:
        return products * (plan.scale * _LOG2_E), 1.0
    bent = jnp.tanh(products * (plan.scale / plan.soft_cap))
    return bent * (plan.soft_cap * _LOG2_E), 1.0 - bent * bent


def _load(ref: Any, row: Array, at: Array, head: Array, real: Array) -> Array:
    """[tokens, width] of one head, with zeros where there are none."""
    column = jnp.arange(_power_of_two(ref.shape[3]))
    return plgpu.load(ref.at[row, at[:, None], head, column[None]],
                      mask=real[:, None] & (column < ref.shape[3])[None], other=0)


def _store(ref: Any, row: Array, at: Array, head: Array, real: Array, x: Array) -> None:
    column = jnp.arange(x.shape[1])
    plgpu.store(ref.at[row, at[:, None], head, column[None]], x.astype(ref.dtype),
                mask=real[:, None] & (column < ref.shape[3])[None])


def _power_of_two(size: int) -> int:
    """The next one, as Triton's blocks want it, and at least what a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())


def _dot(a: Array, b: Array, axes: tuple[tuple[int], tuple[int]]) -> Array:
    # The compiler would round float32 to tf32, ten bits of mantissa, unless told not to.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)
