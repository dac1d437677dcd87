"""Heads for tasks: what stands on the last hidden state in place of the output vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.facts import Head
from llm_jax.models.layers import add_bias, fan_in_normal, linear, weight

Array = jax.Array


def dense(module: nn.Module, x: Array, width: int, bias: bool = True, axis: str | None = None) -> Array:
    """float32 x · kernel (+ bias), with `module`'s parameters "kernel" [D, width] and "bias" [width]."""
    d = x.shape[-1]
    kernel = weight(module, "kernel", fan_in_normal(d), (d, width), ("embed", axis))
    return add_bias(module, "bias", linear(x, kernel, out_dtype=jnp.float32), (axis,), bias)


class TaskHead(nn.Module):
    """A linear map, and the axes of the result that its kind of task has.

    Attributes:
      head: which kind, how many outputs.
      bias: whether one is added. As `transformers` has it, a decoder's head for sequences has none, the others have.
    """

    head: Head
    bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, D] where there is one result a sequence, [B, T, D] where there is one a token.

        Returns:
          float32 [B, labels] or [B, T, labels]; [B] for "reward", [B, T] for "value".
        """
        out = dense(self, x, self.head.labels, self.bias)
        return out[..., 0] if self.head.kind in ("reward", "value") else out


def last_token(x_BTD: Array, segment_ids_BT: Array | None) -> Array:
    """Of each row the vector of its last token that is not padding, [B, D]; without segment ids the last of all.

    In a row of several documents that is the last document's: a head of this kind judges rows, not documents.
    """
    if segment_ids_BT is None:
        return x_BTD[:, -1]
    last_B = jnp.max(jnp.where(segment_ids_BT != 0, jnp.arange(x_BTD.shape[1]), 0), axis=1)
    return jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]


def first_token(x_BTD: Array, segment_ids_BT: Array | None) -> Array:
    """Of each row the vector of its first token that is not padding, [B, D]."""
    if segment_ids_BT is None:
        return x_BTD[:, 0]
    first_B = jnp.argmax(segment_ids_BT != 0, axis=1)
    return jnp.take_along_axis(x_BTD, first_B[:, None, None], axis=1)[:, 0]


def mean_token(x_BTD: Array, segment_ids_BT: Array | None) -> Array:
    """The mean over each row's tokens that are not padding, float32 [B, D]; zeros for a row of padding."""
    x_BTD = x_BTD.astype(jnp.float32)
    if segment_ids_BT is None:
        return jnp.mean(x_BTD, axis=1)
    real_BT1 = (segment_ids_BT != 0)[..., None]
    return jnp.sum(jnp.where(real_BT1, x_BTD, 0), axis=1) / jnp.maximum(jnp.sum(real_BT1, axis=1), 1)


def with_head(config: ModelConfig, params: Any, head: Head, key: Array) -> tuple[ModelConfig, Any]:
    """A trained or imported model with a fresh head for a task.

    What stood on the last hidden state goes (the output projection; BERT's masked-LM and next-sentence heads; a task's
    head), all else stays as it is. An encoder that judges sequences does so from its pooled vector, and one that had
    no pooler gets a fresh one.

    Args:
      config: the model's.
      params: its parameters, stacked.
      head: the new head.
      key: what its weights are drawn with.
    Returns:
      The new config, and its parameters: leaves of `params`, and float32 ones that are new.
    Raises:
      UserError: an encoder–decoder.
    """
    from llm_jax.models.parameters import abstract_params, build, init_params

    if config.architecture == "encoder_decoder":
        raise UserError("heads for tasks stand on decoders and on encoders; an encoder–decoder answers in text")
    pooled = head.per_sequence and config.architecture == "encoder"
    config = dataclasses.replace(config, head=head, encoder_heads=("pooler",) if pooled else ())
    model = build(config)
    names = abstract_params(model)
    new = [name for name in names if name == "head" or name not in params]
    made = jax.jit(lambda key: {name: init_params(model, key)[name] for name in new})(key)
    return config, {name: made[name] if name in new else params[name] for name in names}
