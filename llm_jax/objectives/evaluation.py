"""Loss, perplexity and bits per byte on held-out text."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from llm_jax.objectives.next_token import next_token_sums


@functools.lru_cache(maxsize=8)
def make_eval_step(model: Any) -> Callable[[Any, dict], tuple[jax.Array, jax.Array]]:
    """A jitted (params, batch) → (sum of losses in nats, tokens), compiled once per model and shape.

    Experts with a limited capacity in training have none here, as none when serving.
    """
    execution = getattr(model, "execution", None)
    if execution is not None and execution.expert_capacity is not None:
        model = model.clone(execution=dataclasses.replace(execution, expert_capacity=None))
    loss_chunk = None if execution is None else execution.loss_chunk

    @jax.jit
    def eval_step(params: Any, batch: dict) -> tuple[jax.Array, jax.Array]:
        _, sums = next_token_sums(model.apply, params, batch, loss_chunk=loss_chunk)
        return sums["loss_sum"], sums["weight_sum"]

    return eval_step


def evaluate_loss(model: Any, params: Any, batches: Iterable[dict], *, byte_lengths: np.ndarray | None = None,
                  put: Callable[[dict], dict] | None = None, eval_step: Callable | None = None) -> dict[str, float]:
    """Mean loss over all that `batches` hold; every position counts by its weight, so padding changes nothing.

    Args:
      model: the Flax module.
      params: its parameters, with any sharding.
      batches: dicts as `data.windows.evaluation_windows` yields: `tokens`, `targets`, `segment_ids`, `positions` int32
        [B, T], `weights` float32 [B, T]; all of one shape, or each new shape is compiled.
      byte_lengths: int [V], UTF-8 bytes that each token stands for (`Tokenizer.byte_lengths`); adds `bytes` and
        `bits_per_byte`. Tokens that stand for no bytes (the end of a document) count in the loss all the same: a model
        has to say where text ends.
      put: brings a batch to the devices; None leaves it to jit.
      eval_step: from `make_eval_step`, or one with the same arguments; None makes it.

    Returns:
      `loss` (nats per token), `perplexity`, `tokens`, and with `byte_lengths` also `bytes`, `bits_per_byte`. Without
      any token the loss is NaN.
    """
    eval_step = eval_step or make_eval_step(model)
    sums: list[tuple[jax.Array, jax.Array]] = []
    num_bytes = 0
    for batch in batches:
        if byte_lengths is not None:
            num_bytes += int(byte_lengths[batch["targets"][batch["weights"] > 0]].sum())
        sums.append(eval_step(params, put(batch) if put else batch))
        if len(sums) > 2:  # keep the host from queueing a whole corpus on the device
            jax.block_until_ready(sums[-3])
    host_sums = np.array(jax.device_get(sums), np.float64).reshape(-1, 2)
    loss_sum, tokens = math.fsum(host_sums[:, 0]), math.fsum(host_sums[:, 1])
    return _summary(loss_sum, int(tokens), num_bytes if byte_lengths is not None else None)


def _summary(loss_sum: float, tokens: int, num_bytes: int | None) -> dict[str, float]:
    loss = loss_sum / tokens if tokens else math.nan
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
    if num_bytes is not None:
        result["bytes"] = num_bytes
        result["bits_per_byte"] = loss_sum / math.log(2) / num_bytes if num_bytes else math.nan
    return result
