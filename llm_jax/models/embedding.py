"""Tokens to vectors, and vectors to logits."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import fan_in_normal, linear, make_norm, weight

Array = jax.Array


class Embedding(nn.Module):
    """Token ids to vectors, with whatever is added to them; and vectors to logits."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        small = nn.initializers.normal(0.02)
        self.table_VD = weight(self, "embedding", small, (c.vocab_size, c.embed_dim), ("vocab", "embed"))
        if c.positions == "learned":
            self.position_CD = weight(self, "position", small, (c.max_context, c.embed_dim), ("positions", "embed"))
        if c.token_types:
            self.token_type_YD = weight(self, "token_type", small, (c.token_types, c.embed_dim),
                                        ("token_types", "embed"))
        if c.embed_norm:
            self.norm = make_norm(c)

    def __call__(self, tokens_BT: Array, positions_BT: Array, dtype: Any, token_types_BT: Array | None = None) -> Array:
        c = self.config
        x_BTD = _rows(self.table_VD, tokens_BT)
        if c.embed_scale is not None:
            x_BTD = x_BTD * c.embed_scale
        if c.positions == "learned":
            x_BTD = x_BTD + _rows(self.position_CD, positions_BT)
        if c.token_types:
            types_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
            x_BTD = x_BTD + _rows(self.token_type_YD, types_BT)
        x_BTD = x_BTD.astype(dtype)
        return self.norm(x_BTD) if c.embed_norm else x_BTD

    def logits(self, x_BTD: Array, unembed_DV: Any = None, bias_V: Array | None = None) -> Array:
        """float32 logits [B, T, V] of a last hidden state.

        Args:
          x_BTD: the hidden state.
          unembed_DV: the output projection (`output_weight`); None where it is the table of embeddings.
          bias_V: added to the logits.
        """
        c = self.config
        if c.logit_scale is not None:
            x_BTD = x_BTD * c.logit_scale
        if unembed_DV is None:
            dims = (((x_BTD.ndim - 1,), (1,)), ((), ()))
            logits_BTV = jax.lax.dot_general(x_BTD, self.table_VD.astype(x_BTD.dtype), dims,
                                             preferred_element_type=jnp.float32)
        else:
            logits_BTV = linear(x_BTD, unembed_DV, out_dtype=jnp.float32)
        if bias_V is not None:
            logits_BTV = logits_BTV + bias_V.astype(jnp.float32)
        if c.logit_soft_cap is not None:
            logits_BTV = c.logit_soft_cap * jnp.tanh(logits_BTV / c.logit_soft_cap)
        return nn.with_logical_constraint(logits_BTV, ("batch", "length", "activation_vocab"))


def output_weight(module: nn.Module, config: ModelConfig) -> Any:
    """The output projection of `module`, in its `setup`; None where it is the table of embeddings."""
    if config.tie_embeddings:
        return None
    return weight(module, "unembed", fan_in_normal(config.embed_dim), (config.embed_dim, config.vocab_size),
                  ("embed", "vocab"))


def _rows(table: Array, index: Array) -> Array:
    return jnp.take(table, index, axis=0, mode="clip").astype(jnp.float32)


def positions_along(tokens_BT: Array, config: ModelConfig) -> Array:
    """0, 1, 2, … along each row; UserError where a table of learned positions ends before."""
    if config.positions == "learned" and tokens_BT.shape[1] > config.max_context:
        raise UserError(f"rows of {tokens_BT.shape[1]} tokens are longer than the model's {config.max_context} learned "
                        f"positions; packed rows need positions that begin anew with each document")
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
