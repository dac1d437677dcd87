"""The programs that an engine compiles: pure functions of arrays, each called once a step at most.

A step is `forward`, which also takes the likeliest token of each row; only where a row wants something else does one of
the others follow. What stays on the device between steps is the pools, the last token of each sequence slot, so that
the next step can start before the host has seen it, and the token counts that penalties need.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.inference import penalties, sampling
from llm_jax.inference.batch import StepBatch
from llm_jax.inference.request import MAX_LOGPROBS
from llm_jax.models import Decoder

Array = jax.Array
Pools = list[tuple[Array, ...]]


def hidden(model: Decoder, params: Any, pools: Pools, last_S: Array, batch: StepBatch) -> tuple[Any, Pools]:
    """Writes the tokens' keys and values: hidden states [1, N, D] and the pools; arguments as of `forward`."""
    known_N = jnp.where(batch.token_N < 0, jnp.take(last_S, ~batch.token_N, mode="clip"), batch.token_N)
    made: Any = model.apply({"params": params}, known_N[None], batch.context.position_N[None], batch.context, pools,
                            method="hidden")
    return made


def forward(model: Decoder, params: Any, pools: Pools, last_S: Array, batch: StepBatch
            ) -> tuple[Pools, Array, Array, Array, Array, Array]:
    """Writes the tokens' keys and values, and takes the likeliest token of each row.

    Args:
      model: with unrolled layers.
      params: per-layer parameters (`models.unstack`).
      pools: what `kernels.paged.make_pool` makes, one entry a layer; donated.
      last_S: int32 [S + 1], the last token of each sequence slot, and a spare one.
      batch: see `StepBatch`.
    Returns:
      pools, last tokens, int32 likeliest tokens [R], their float32 log-probabilities [R], float32 logits [R, V], hidden
      states [N, D] in the execution dtype.
    """
    x_1ND, pools = hidden(model, params, pools, last_S, batch)
    logits_1RV: Any = model.apply({"params": params}, x_1ND[:, batch.out_R], method="logits")
    logits_RV = logits_1RV[0]
    token_R, logprob_R = sampling.greedy(logits_RV)
    return pools, last_S.at[batch.slot_R].set(token_R), token_R, logprob_R, logits_RV, x_1ND[0]


def draw(last_S: Array, logits_RV: Array, model_RV: Array, slot_R: Array, batch: sampling.SamplingBatch
         ) -> tuple[Array, Array, Array]:
    """Draws a token a row.

    Args:
      last_S: as `forward` gave it.
      logits_RV: what is drawn from.
      model_RV: the model's own logits, of which the log-probabilities are.
      slot_R: as of the step.
      batch: how each row is drawn.
    Returns:
      last tokens, int32 tokens [R], float32 log-probabilities [R].
    """
    token_R, logprob_R = sampling.sample(logits_RV, batch, model_RV)
    return last_S.at[slot_R].set(token_R), token_R, logprob_R


def top(logits_RV: Array) -> tuple[Array, Array]:
    """The likeliest tokens of each row: int32 ids and float32 log-probabilities, [R, MAX_LOGPROBS]."""
    return penalties.top(logits_RV, min(MAX_LOGPROBS, logits_RV.shape[-1]))


def score(model: Decoder, params: Any, x_ND: Array, start: Array, target_C: Array) -> tuple[Array, Array, Array]:
    """How likely the model finds the tokens of a prompt: `penalties.target_logprobs` from x_ND[start] on."""
    x_CD = jax.lax.dynamic_slice_in_dim(x_ND, start, target_C.shape[0])
    logits_1CV: Any = model.apply({"params": params}, x_CD[None], method="logits")
    return penalties.target_logprobs(logits_1CV[0], target_C, min(MAX_LOGPROBS, logits_1CV.shape[-1]))
