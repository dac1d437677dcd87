"""Masked language modelling: the cross-entropy of tokens that an encoder was not shown (Devlin et al. 2019,
arXiv:1810.04805, section 3.1)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.objectives.next_token import Apply, Batch, token_losses
from llm_jax.objectives.tasks import run

Array = jax.Array


def mask_tokens(tokens_BT: Array, rng: Array, *, mask_id: int, vocab_size: int, rate: float = 0.15,
                maskable_BT: Array | None = None) -> tuple[Array, Array]:
    """Chooses the tokens to predict and hides them: of ten, eight become the mask, one a random token, one stays.

    Args:
      tokens_BT: int32 token ids.
      rng: key; the result is a function of it and of the tokens alone.
      mask_id: the mask's id.
      vocab_size: random tokens are drawn evenly from 0 … vocab_size − 1.
      rate: chance of each token to be chosen, independently.
      maskable_BT: bool, where a token may be chosen (not padding, not the special tokens around sentences). Absent:
        everywhere.
    Returns:
      What the model reads, int32 [B, T], and float32 [B, T] with 1 where a token has to be predicted.
    """
    choose, treat, draw = jax.random.split(rng, 3)
    chosen_BT = jax.random.uniform(choose, tokens_BT.shape) < rate
    if maskable_BT is not None:
        chosen_BT = chosen_BT & maskable_BT
    treatment_BT = jax.random.uniform(treat, tokens_BT.shape)
    drawn_BT = jax.random.randint(draw, tokens_BT.shape, 0, vocab_size, tokens_BT.dtype)
    hidden_BT = jnp.where(treatment_BT < 0.8, mask_id, jnp.where(treatment_BT < 0.9, drawn_BT, tokens_BT))
    return jnp.where(chosen_BT, hidden_BT, tokens_BT), chosen_BT.astype(jnp.float32)


def masked_lm_sums(apply: Apply, params: Any, batch: Batch, rng: Array | None = None) -> tuple[Array, dict[str, Array]]:
    """The cross-entropy of an encoder's "logits" summed over the positions to predict.

    Args:
      apply: an encoder's `apply`.
      params: its parameters.
      batch: `tokens` [B, T] int32 as the model reads them, `targets` [B, T] int32, `weights` [B, T] float32 (what
        `mask_tokens` gives), and what `tasks.run` takes besides.
      rng: see `next_token_sums`.
    Returns:
      The sum to minimise (float32 scalar, nats), and sums for metrics: `loss_sum`, `weight_sum`, `correct_sum`
      (positions whose likeliest token is the target).
    """
    logits_BTV = run(apply, params, batch, rng)["logits"]
    losses_BT, _ = token_losses(logits_BTV, batch["targets"])
    weights_BT = batch["weights"].astype(jnp.float32)
    correct_BT = jnp.argmax(logits_BTV, axis=-1) == batch["targets"]
    loss_sum = jnp.sum(losses_BT * weights_BT)
    return loss_sum, {"loss_sum": loss_sum, "weight_sum": jnp.sum(weights_BT),
                      "correct_sum": jnp.sum(correct_BT * weights_BT)}
