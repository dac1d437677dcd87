"""What changes the logits before a token is drawn: penalties, biases and constraints, and the counts they read.

A running sequence owns a slot: a row of counts on the device, filled when it enters and advanced by every draw, so that
the host need not know a token before the next one is drawn.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.inference.sampling import best

Array = jax.Array

# A top-k of more than so many at once is a sort of the vocabulary in XLA.
_AT_ONCE = {"gpu": 16}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extras:
    """How the logits of R rows are changed. `no_extras` changes nothing.

    Attributes:
      slot_R: int32, the row's slot of the counts; the spare one for padding.
      repetition_R: float32; divides positive logits and multiplies negative ones of tokens of the prompt or the
        output (Keskar et al. 2019, arXiv:1909.05858); 1 is off.
      presence_R: float32, taken from the logits of tokens of the output; 0 is off.
      frequency_R: float32, taken from them once for each time that they are there; 0 is off.
      bias_id_RB: int32 token ids; V is padding.
      bias_RB: float32, added to their logits, of one id as often as it is named; -inf forbids the token.
      mask_RW: uint32, ceil(V / 32) words a row: token v is allowed where bit v % 32 of word v // 32 is set.
    """

    slot_R: Any
    repetition_R: Any
    presence_R: Any
    frequency_R: Any
    bias_id_RB: Any
    bias_RB: Any
    mask_RW: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """The tokens of each slot's sequence. The last slot is spare: padding writes there.

    Attributes:
      prompt_SV: bool, the token is in the prompt.
      output_SV: int32, how often it is in the output.
    """

    prompt_SV: Any
    output_SV: Any


def no_extras(num_rows: int, num_biases: int, vocab_size: int, slot: int = 0) -> Extras:
    """NumPy arrays, to be filled in, that change no logit.

    Args:
      num_rows, num_biases: R and B.
      vocab_size: V.
      slot: every row's slot.
    """
    R, B = num_rows, num_biases
    return Extras(np.full(R, slot, np.int32), np.ones(R, np.float32), np.zeros(R, np.float32), np.zeros(R, np.float32),
                  np.full((R, B), vocab_size, np.int32), np.zeros((R, B), np.float32),
                  np.full((R, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32))


def make_counts(num_slots: int, vocab_size: int) -> Counts:
    """Empty counts of `num_slots` slots and the spare one."""
    shape = (num_slots + 1, vocab_size)
    return Counts(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))


def enter(counts: Counts, slot: Array, token_C: Array, num_prompt: Array, num_tokens: Array) -> Counts:
    """A sequence takes a slot; what was counted there is forgotten.

    Args:
      counts: donate them, and they are changed in place.
      slot: int32 scalar.
      token_C: int32; the first `num_prompt` are the prompt, those from there to `num_tokens` output, the rest padding.
      num_prompt, num_tokens: int32 scalars.
    """
    V = counts.prompt_SV.shape[1]
    index_C = jnp.arange(token_C.shape[0])
    # Padding may hold anything; a negative index would count from the end.
    known_C = jnp.where((index_C < num_tokens) & (token_C >= 0), token_C, V)
    in_prompt_C = index_C < num_prompt
    prompt_V = jnp.zeros(V, bool).at[jnp.where(in_prompt_C, known_C, V)].set(True, mode="drop")
    output_V = jnp.zeros(V, jnp.int32).at[jnp.where(in_prompt_C, V, known_C)].add(1, mode="drop")
    return Counts(counts.prompt_SV.at[slot].set(prompt_V), counts.output_SV.at[slot].set(output_V))


def counted(counts: Counts, slot_R: Array, token_R: Array) -> Counts:
    """The counts after a token was drawn in each row; a row that drew none names the spare slot. Donate the counts."""
    return dataclasses.replace(counts, output_SV=counts.output_SV.at[slot_R, token_R].add(1, mode="drop"))


def shaped(logits_RV: Array, extras: Extras, counts: Counts) -> Array:
    """The logits that a row draws from: repetition, then presence and frequency penalty, bias, and the mask.

    Something is always left to draw: where the bias (min_tokens forbids the ends by one) and the mask together allow
    no token, the row's bias is dropped, so that a constraint is kept whatever else was asked; a mask that allows
    nothing at all is dropped too.

    Args:
      logits_RV: float32; a row without extras comes back bit for bit.
      extras, counts: see there.
    """
    R, V = logits_RV.shape
    logits_RV = _penalized(logits_RV, extras, counts)
    biased_RV = logits_RV.at[jnp.arange(R)[:, None], extras.bias_id_RB].add(extras.bias_RB, mode="drop")
    allowed_RV = _bits(extras.mask_RW, V)
    left_RV = jnp.where(allowed_RV, biased_RV, -jnp.inf)
    empty_R = jnp.max(left_RV, axis=-1) == -jnp.inf

    def relaxed() -> Array:
        kept_RV = allowed_RV | ~jnp.any(allowed_RV, axis=-1, keepdims=True)
        return jnp.where(empty_R[:, None], jnp.where(kept_RV, logits_RV, -jnp.inf), left_RV)

    return jax.lax.cond(jnp.any(empty_R), relaxed, lambda: left_RV)


def _penalized(logits_RV: Array, extras: Extras, counts: Counts) -> Array:
    count_RV = counts.output_SV[extras.slot_R]
    in_output_RV = count_RV > 0
    repetition_R1 = extras.repetition_R[:, None]
    repeated_RV = jnp.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
    logits_RV = jnp.where(in_output_RV | counts.prompt_SV[extras.slot_R], repeated_RV, logits_RV)
    taken_RV = extras.presence_R[:, None] + extras.frequency_R[:, None] * count_RV.astype(jnp.float32)
    return jnp.where(in_output_RV, logits_RV - taken_RV, logits_RV)


def _bits(mask_RW: Array, size: int) -> Array:
    """bool [R, size]: bit v % 32 of word v // 32."""
    bits_RW32 = (mask_RW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits_RW32.reshape(mask_RW.shape[0], -1)[:, :size] != 0


def top(logits_RV: Array, count: int) -> tuple[Array, Array]:
    """The likeliest tokens of each row, the best first.

    Args:
      logits_RV: float32, as the model gave them.
      count: how many, C; static. There are no more than V.
    Returns:
      int32 ids [R, C] and their float32 natural log-probabilities [R, C] under softmax(logits).
    """
    id_RC, value_RC = _best(logits_RV, min(count, logits_RV.shape[1]))
    return id_RC, value_RC - jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)


def target_logprobs(logits_NV: Array, target_N: Array, count: int) -> tuple[Array, Array, Array]:
    """What the model thought of the tokens that did come.

    Args:
      logits_NV: float32, at N positions.
      target_N: int32, the token that follows each.
      count: C, how many of the likeliest to tell beside it; static, may be 0.
    Returns:
      float32 log-probabilities [N] of the targets, and `top` of the logits: ids [N, C], log-probabilities [N, C].
    """
    total_N1 = jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)
    target_N1 = jnp.take_along_axis(logits_NV, target_N[:, None], axis=-1)
    id_NC, value_NC = _best(logits_NV, min(count, logits_NV.shape[1]))
    return (target_N1 - total_N1)[:, 0], id_NC, value_NC - total_N1


def _best(x_RV: Array, count: int) -> tuple[Array, Array]:
    """Ids and values of the `count` greatest of each row, the first of equals first."""
    at_once = _AT_ONCE.get(jax.default_backend(), count)
    rows_R1 = jnp.arange(x_RV.shape[0])[:, None]
    ids: list[Array] = [jnp.zeros((x_RV.shape[0], 0), jnp.int32)]
    values: list[Array] = [jnp.zeros((x_RV.shape[0], 0), x_RV.dtype)]
    for done in range(0, count, at_once or 1):
        if done:
            x_RV = x_RV.at[rows_R1, ids[-1]].set(-jnp.inf)
        value, index = best(x_RV, min(at_once, count - done))
        ids.append(index)
        values.append(value)
    return jnp.concatenate(ids, axis=1), jnp.concatenate(values, axis=1)
