"""The decoder-only Transformer that trains, evaluates and serves (Vaswani et al. 2017; Touvron et al. 2023)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.attention import DenseContext, attention
from llm_jax.models.config import Execution, ModelConfig
from llm_jax.models.layers import GatedMlp, RMSNorm, fan_in_normal, linear, rotary, weight

Array = jax.Array

_REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_attention": jax.checkpoint_policies.save_only_these_names("attention"),
}


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (Ainslie et al. 2023, arXiv:2305.13245)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array, positions_BT: Array, context: Any, cache: Any) -> tuple[Array, Any]:
        c = self.config
        d, h, g, k = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        q_DHK = weight(self, "q", fan_in_normal(d), (d, h, k), ("embed", "heads", "head_dim"))
        k_DGK = weight(self, "k", fan_in_normal(d), (d, g, k), ("embed", "kv_heads", "head_dim"))
        v_DGK = weight(self, "v", fan_in_normal(d), (d, g, k), ("embed", "kv_heads", "head_dim"))
        o_HKD = weight(self, "o", fan_in_normal(h * k, (2 * c.num_layers) ** -0.5), (h, k, d),
                       ("heads", "head_dim", "embed"))
        q_BTHK = rotary(linear(x_BTD, q_DHK), positions_BT, c.rope_theta)
        k_BTGK = rotary(linear(x_BTD, k_DGK), positions_BT, c.rope_theta)
        out_BTHK, cache = attention(q_BTHK, k_BTGK, linear(x_BTD, v_DGK), context, cache)
        return linear(checkpoint_name(out_BTHK, "attention"), o_HKD, contract=2), cache


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array, cache: Any, positions_BT: Array, context: Any) -> tuple[Array, Any]:
        c = self.config
        normed_BTD = RMSNorm(c.norm_eps, name="attention_norm")(x_BTD)
        attended_BTD, cache = Attention(c, name="attention")(normed_BTD, positions_BT, context, cache)
        x_BTD = nn.with_logical_constraint(x_BTD + attended_BTD, ("batch", "length", "activation_embed"))
        normed_BTD = RMSNorm(c.norm_eps, name="mlp_norm")(x_BTD)
        x_BTD = x_BTD + GatedMlp(c.mlp_dim, (2 * c.num_layers) ** -0.5, name="mlp")(normed_BTD)
        return nn.with_logical_constraint(x_BTD, ("batch", "length", "activation_embed")), cache


class Embedding(nn.Module):
    """Token ids to vectors, and (when tied) vectors to logits."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.table_VD = weight(self, "embedding", nn.initializers.normal(0.02), (c.vocab_size, c.embed_dim),
                               ("vocab", "embed"))

    def __call__(self, tokens_BT: Array, dtype: Any) -> Array:
        return jnp.take(self.table_VD, tokens_BT, axis=0, mode="clip").astype(dtype)

    def logits(self, x_BTD: Array) -> Array:
        return jax.lax.dot_general(x_BTD, self.table_VD.astype(x_BTD.dtype), (((x_BTD.ndim - 1,), (1,)), ((), ())),
                                   preferred_element_type=jnp.float32)


class Decoder(nn.Module):
    """The whole model.

    `model.apply({"params": p}, tokens_BT, segment_ids_BT, positions_BT)` gives logits; `hidden` and `logits` are its
    two halves, for callers that need the logits of a few positions only (the server) or in pieces (the loss).
    """

    config: ModelConfig
    execution: Execution = Execution()

    def setup(self) -> None:
        c, e = self.config, self.execution
        block = Block
        if e.remat != "none":
            block = nn.remat(Block, policy=_REMAT[e.remat], prevent_cse=not e.scan_layers)
        self.embed = Embedding(c)
        if e.scan_layers:
            scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers,
                              in_axes=(0, nn.broadcast, nn.broadcast), metadata_params={nn.PARTITION_NAME: "layers"})
            self.layers = scanned(c)
        else:
            self.layers = [block(c) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            self.unembed = weight(self, "unembed", fan_in_normal(c.embed_dim), (c.embed_dim, c.vocab_size),
                                  ("embed", "vocab"))

    def hidden(self, tokens_BT: Array, positions_BT: Array, context: Any, cache: Any = None) -> tuple[Array, Any]:
        """The normalised output of the last block.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 position of each token in its own document.
          context: what each token may attend to: `kernels.attention.DenseContext` or `kernels.paged.PagedContext`.
          cache: with a paged context, the key and value pools, one entry a layer (a list, layers unrolled).
        Returns:
          [B, T, D] in the execution dtype, and the cache with this call's keys and values written.
        """
        x_BTD = self.embed(tokens_BT, jnp.dtype(self.execution.dtype))
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "activation_embed"))
        if self.execution.scan_layers:
            x_BTD, cache = self.layers(x_BTD, cache, positions_BT, context)
        else:
            caches = cache if cache is not None else [None] * self.config.num_layers
            written = []
            for block, layer_cache in zip(self.layers, caches, strict=True):
                x_BTD, layer_cache = block(x_BTD, layer_cache, positions_BT, context)
                written.append(layer_cache)
            cache = written if cache is not None else None
        return self.final_norm(x_BTD), cache

    def logits(self, x_BTD: Array) -> Array:
        """float32 logits [B, T, V] of `hidden`'s output."""
        if self.config.tie_embeddings:
            logits_BTV = self.embed.logits(x_BTD)
        else:
            logits_BTV = linear(x_BTD, self.unembed, out_dtype=jnp.float32)
        return nn.with_logical_constraint(logits_BTV, ("batch", "length", "activation_vocab"))

    def __call__(self, tokens_BT: Array, segment_ids_BT: Array | None = None,
                 positions_BT: Array | None = None) -> Array:
        """Causal logits of whole rows.

        Args:
          tokens_BT: int32 token ids.
          segment_ids_BT: int32, the document of each token in its row (0 is padding); tokens attend within their own
            document only. Absent: each row is one document.
          positions_BT: int32 position of each token in its document. Absent: 0, 1, 2, … along the row.
        Returns:
          float32 logits [B, T, V].
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        x_BTD, _ = self.hidden(tokens_BT, positions_BT, DenseContext(segment_ids_BT))
        return self.logits(x_BTD)
