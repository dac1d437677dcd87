"""Tokens to vectors, and vectors to logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import fan_in_normal, linear, make_norm, weight
from llm_jax.models.lookup import look_up
from llm_jax.models.ring_weight import unwrapped

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What turns a last hidden state into logits: cap · tanh((scale · x · weight + bias) / cap).

    Attributes:
      weight: [D, V], or the table of embeddings [V, D].
      is_table: whether it is that table.
      scale: `ModelConfig.logit_scale`.
      soft_cap: `ModelConfig.logit_soft_cap`.
    """

    weight: Any
    is_table: bool = dataclasses.field(default=False, metadata={"static": True})
    scale: float | None = dataclasses.field(default=None, metadata={"static": True})
    soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})

    def scaled(self, x: Array) -> Array:
        """What is multiplied with the weight."""
        return x if self.scale is None else x * self.scale

    def product(self, x: Array, weight: Any) -> Array:
        """float32 x · weight (or its transpose, of a table), in x's dtype; x [..., D]."""
        if not self.is_table:
            return linear(x, weight, out_dtype=jnp.float32)
        dims = (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, unwrapped(weight).astype(x.dtype), dims, preferred_element_type=jnp.float32)

    def capped(self, logits: Array) -> Array:
        """The logits, kept within ± the soft cap where there is one."""
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def slope(self, logits: Array) -> Array | float:
        """∂ capped / ∂ uncapped, told by the capped logits."""
        return 1.0 if self.soft_cap is None else 1.0 - jnp.square(logits / self.soft_cap)


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
        x_BTD = look_up(unwrapped(self.table_VD), tokens_BT, "lookup_vocab")
        if c.embed_scale is not None:
            x_BTD = x_BTD * c.embed_scale
        if c.positions == "learned":
            x_BTD = x_BTD + look_up(self.position_CD, positions_BT)
        if c.token_types:
            types_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
            x_BTD = x_BTD + look_up(self.token_type_YD, types_BT)
        x_BTD = x_BTD.astype(dtype)
        return self.norm(x_BTD) if c.embed_norm else x_BTD

    def output(self, unembed_DV: Any = None) -> Output:
        """What makes the logits; `unembed_DV` is the output projection, None where it is the table of embeddings."""
        c = self.config
        return Output(self.table_VD if unembed_DV is None else unembed_DV, unembed_DV is None, c.logit_scale,
                      c.logit_soft_cap)

    def logits(self, x_BTD: Array, unembed_DV: Any = None, bias_V: Array | None = None) -> Array:
        """float32 logits [B, T, V] of a last hidden state.

        Args:
          x_BTD: the hidden state.
          unembed_DV: the output projection (`output_weight`); None where it is the table of embeddings.
          bias_V: added to the logits.
        """
        output = self.output(unembed_DV)
        logits_BTV = output.product(output.scaled(x_BTD), output.weight)
        if bias_V is not None:
            logits_BTV = logits_BTV + bias_V.astype(jnp.float32)
        logits_BTV = output.capped(logits_BTV)
        return nn.with_logical_constraint(logits_BTV, ("batch", "length", "activation_vocab"))


def output_weight(module: nn.Module, config: ModelConfig) -> Any:
    """The output projection of `module`, in its `setup`; None where it is the table of embeddings."""
    if config.tie_embeddings:
        return None
    return weight(module, "unembed", fan_in_normal(config.embed_dim), (config.embed_dim, config.vocab_size),
                  ("embed", "vocab"))


def positions_along(tokens_BT: Array, config: ModelConfig) -> Array:
    """0, 1, 2, … along each row; UserError where a table of learned positions ends before."""
    if config.positions == "learned" and tokens_BT.shape[1] > config.max_context:
        raise UserError(f"rows of {tokens_BT.shape[1]} tokens are longer than the model's {config.max_context} learned "
                        f"positions; packed rows need positions that begin anew with each document")
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
