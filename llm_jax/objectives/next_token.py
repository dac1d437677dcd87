"""Cross-entropy of the next token, in float32, kept as sums until the very end.

Sums, not means: a batch cut into microbatches then gives exactly the whole batch's loss, however unevenly padding
falls on them. (The loss that balances a mixture's experts is a product of means, and so the exception: see
`next_token_sums`.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models import ModelConfig, router_by_layer
from llm_jax.models.rows import laid_out
from llm_jax.objectives.balance import balance_loss
from llm_jax.objectives.chunked_loss import chunked_sums

Array = jax.Array
Apply = Callable[..., Any]
Batch = Mapping[str, Array]


def targets_and_weights(batch: Batch) -> tuple[Array, Array]:
    """What each position has to predict, and whether it counts.

    Args:
      batch: `tokens` [B, T] int32, `segment_ids` [B, T] int32 (0 is padding); or `targets` [B, T] int32 and `weights`
        [B, T] float32, which are returned as they are.

    Returns:
      targets_BT int32, and weights_BT float32: 1 where the next token belongs to the same document, else 0.
    """
    if "targets" in batch:
        return batch["targets"], batch["weights"].astype(jnp.float32)
    tokens_BT, segments_BT = batch["tokens"], batch["segment_ids"]
    targets_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    next_segments_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
    return targets_BT, ((segments_BT > 0) & (segments_BT == next_segments_BT)).astype(jnp.float32)


def token_losses(logits_BTV: Array, targets_BT: Array) -> tuple[Array, Array]:
    """Cross-entropy of each position, -log softmax(logits)[target].

    The target's logit is picked by a masked sum and not by a gather: it fuses with the reduction beside it, its
    gradient is no scatter, and a vocabulary that is sharded stays where it is.

    Returns:
      losses_BT in nats and log_z_BT (log of the softmax's denominator), both float32.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    is_target_BTV = jnp.arange(logits_BTV.shape[-1], dtype=jnp.int32) == targets_BT[..., None]
    return log_z_BT - jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1), log_z_BT


def next_token_sums(apply: Apply, params: Any, batch: Batch, rng: Array | None = None, *, z_loss: float = 0.0,
                    config: ModelConfig | None = None,
                    loss_chunk: int | None = None) -> tuple[Array, dict[str, Any]]:
    """The objective summed over the positions that count.

    Args:
      apply: a model's `apply`: ({"params": params}, tokens, segment_ids, positions) → logits [B, T, V].
      params: the model's parameters.
      batch: see `targets_and_weights`; `positions` [B, T] int32 too.
      rng: key for whatever the model draws in training, handed to `apply` as the "dropout" stream; None draws nothing.
      z_loss: weight of log² z, which keeps the softmax's denominator near 1 (Chowdhery et al. 2022, arXiv:2204.02311,
        section 5).
      config: of the model; if it has experts, what their routers did is gathered, and `Experts.balance_weight` times
        `balance_loss` of this batch, times the positions that count, is part of the sum to minimise. Over microbatches
        that comes to the mean of their own balance losses, weighted by their positions, and not to the loss of all
        their tokens together. None gathers nothing.
      loss_chunk: the most tokens whose logits a device holds at once, for models with a method `states`
        (`models.Decoder`); see `chunked_loss`. None holds those of the whole batch.

    Returns:
      The sum to minimise (float32 scalar), and sums for metrics: `loss_sum` (cross-entropy alone, nats), `z_loss_sum`,
      `weight_sum` (positions that count), and for a model with experts `router` (see `models.router_by_layer`).
    """
    experts = None if config is None else config.experts
    targets_BT, weights_BT = targets_and_weights(batch)
    streams = {} if rng is None else {"rngs": {"dropout": rng}}
    gathered: dict[str, Any] = {} if experts is None else {"mutable": ["router"]}
    if loss_chunk is not None:
        gathered |= {"method": "states"}
    with laid_out({**batch, "targets": targets_BT, "weights": weights_BT}) as batch:
        made: Any = apply({"params": params}, batch["tokens"], batch.get("segment_ids"), batch.get("positions"),
                          **streams, **gathered)
    targets_BT, weights_BT = batch["targets"], batch["weights"]
    if experts is not None:
        made, collections = made
    metrics: dict[str, Any]
    if loss_chunk is None:
        losses_BT, log_z_BT = token_losses(made, targets_BT)
        loss_sum = jnp.sum(losses_BT * weights_BT)
        z_loss_sum = z_loss * jnp.sum(jnp.square(log_z_BT) * weights_BT) if z_loss else jnp.zeros((), jnp.float32)
        objective_sum, metrics = loss_sum + z_loss_sum, {"loss_sum": loss_sum, "z_loss_sum": z_loss_sum}
    else:
        objective_sum, metrics = chunked_sums(made[0], made[1], targets_BT, weights_BT, chunk=loss_chunk,
                                              z_loss=z_loss)
    weight_sum = jnp.sum(weights_BT)
    metrics["weight_sum"] = weight_sum
    if experts is not None:
        metrics["router"] = router_by_layer(collections["router"], config)
        if experts.balance_weight:
            objective_sum += experts.balance_weight * balance_loss(metrics["router"]) * weight_sum
    return objective_sum, metrics


def next_token_loss(apply: Apply, params: Any, batch: Batch, rng: Array | None = None, *, z_loss: float = 0.0,
                    config: ModelConfig | None = None,
                    loss_chunk: int | None = None) -> tuple[Array, dict[str, Any]]:
    """`next_token_sums` per position that counts: (mean objective in nats per token, the same sums)."""
    objective_sum, metrics = next_token_sums(apply, params, batch, rng, z_loss=z_loss, config=config,
                                             loss_chunk=loss_chunk)
    return objective_sum / jnp.maximum(metrics["weight_sum"], 1.0), metrics
