"""Losses for models with a task's head (`ModelConfig.head`), kept as sums until the very end; see `next_token`.

Each is a pure function of (apply, params, batch, rng) that gives the sum to minimise and sums for metrics, among them
`weight_sum`, by which a mean is taken.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.objectives.next_token import Apply, Batch, token_losses

Array = jax.Array
IGNORED = -100  # the label of what does not count


def run(apply: Apply, params: Any, batch: Batch, rng: Array | None = None) -> Any:
    """What a model says of a batch.

    Args:
      apply: a decoder's or an encoder's `apply`.
      params: its parameters.
      batch: `tokens` [B, T] int32, and if they are there `segment_ids` (0 is padding), `positions` and, for encoders,
        `token_types`, all [B, T] int32.
      rng: key for whatever the model draws in training.
    """
    inputs = {f"{name}_BT": batch[name] for name in ("segment_ids", "positions", "token_types") if name in batch}
    streams = {} if rng is None else {"rngs": {"dropout": rng}}
    return apply({"params": params}, batch["tokens"], **inputs, **streams)


def classification_sums(apply: Apply, params: Any, batch: Batch,
                        rng: Array | None = None) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the labels of sequences, or of tokens.

    Args:
      apply, params, rng: see `run`; the model's head is "sequence_classification" or "token_classification".
      batch: see `run`; and `labels`, int32 [B] or [B, T], −100 where none counts.
    Returns:
      The sum over labels (float32 scalar, nats), and `loss_sum`, `weight_sum` (labels that count), `correct_sum`.
    """
    return label_sums(run(apply, params, batch, rng), batch["labels"])


def label_sums(logits: Array, labels: Array) -> tuple[Array, dict[str, Array]]:
    """`classification_sums` of logits [..., C] (a head's, or BERT's "nsp") and int32 labels [...]."""
    counts = (labels != IGNORED).astype(jnp.float32)
    losses, _ = token_losses(logits, labels)
    loss_sum = jnp.sum(jnp.where(counts > 0, losses, 0.0))
    correct_sum = jnp.sum((jnp.argmax(logits, axis=-1) == labels) * counts)
    return loss_sum, {"loss_sum": loss_sum, "weight_sum": jnp.sum(counts), "correct_sum": correct_sum}


def regression_sums(apply: Apply, params: Any, batch: Batch,
                    rng: Array | None = None) -> tuple[Array, dict[str, Array]]:
    """Squared error of the numbers that a head gives, (x − y)², each number by its weight.

    Args:
      apply, params, rng: see `run`; the model's head is "regression", "reward" or "value".
      batch: see `run`; `targets` float32 of the shape of the head's result, and `weights` of that shape or one that
        broadcasts to it, if not all count alike.
    Returns:
      The sum (float32 scalar), and `loss_sum`, `weight_sum`; with weights of 1 their quotient is the mean squared
      error over all numbers.
    """
    result = run(apply, params, batch, rng)
    if result.shape != batch["targets"].shape:
        raise ValueError(f"the head's result has shape {result.shape}, the targets {batch['targets'].shape}")
    weights = jnp.broadcast_to(jnp.asarray(batch.get("weights", 1.0), jnp.float32), result.shape)
    loss_sum = jnp.sum(jnp.square(result - batch["targets"].astype(jnp.float32)) * weights)
    return loss_sum, {"loss_sum": loss_sum, "weight_sum": jnp.sum(weights)}


def preference_sums(apply: Apply, params: Any, batch: Batch,
                    rng: Array | None = None) -> tuple[Array, dict[str, Array]]:
    """−log σ(r_chosen − r_rejected) of pairs: how unlikely a choice is under Bradley & Terry's model, when rewards are
    its log-odds (1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

    Args:
      apply, params, rng: see `run`; the model's head is "reward".
      batch: `chosen` and `rejected`, each a batch for `run` of as many rows; row i of both is one pair.
    Returns:
      The sum over pairs (float32 scalar, nats), and `loss_sum`, `weight_sum` (pairs), `correct_sum` (pairs whose chosen
      side has the higher reward), `margin_sum` (differences of the rewards).
    """
    margin_B = run(apply, params, batch["chosen"], rng) - run(apply, params, batch["rejected"], rng)
    loss_sum = jnp.sum(jax.nn.softplus(-margin_B))
    return loss_sum, {"loss_sum": loss_sum, "weight_sum": jnp.float32(margin_B.shape[0]),
                      "correct_sum": jnp.sum(margin_B > 0).astype(jnp.float32), "margin_sum": jnp.sum(margin_B)}
