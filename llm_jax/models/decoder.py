"""The decoder-only Transformer that trains, evaluates and serves (Vaswani et al. 2017; Touvron et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.kernels.attention import DenseContext
from llm_jax.models.attention import Attention
from llm_jax.models.config import Execution, ModelConfig
from llm_jax.models.experts import Experts
from llm_jax.models.heads import TaskHead, last_token
from llm_jax.models.latent_attention import LatentAttention
from llm_jax.models.layers import Mlp, fan_in_normal, linear, make_norm, weight
from llm_jax.models.layout import LayerKind, groups, layer_kinds, slot_name
from llm_jax.models.rope import Rotations, rotations

Array = jax.Array

_REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_attention": jax.checkpoint_policies.save_only_these_names("attention"),
}
RESIDUAL = ("batch", "length", "activation_embed")


def residual(config: ModelConfig, name: str, x_BTD: Array, f: Callable[[Array], Array]) -> Array:
    """x with f's contribution, normalised where `ModelConfig.norm_placement` says; for use inside a compact module."""
    if config.norm_placement == "post":
        out_BTD = make_norm(config, f"{name}_norm")(x_BTD + f(x_BTD))
    else:
        out_BTD = f(make_norm(config, f"{name}_norm")(x_BTD))
        if config.norm_placement == "sandwich":
            out_BTD = make_norm(config, f"{name}_post_norm")(out_BTD)
        out_BTD = x_BTD + out_BTD
    return nn.with_logical_constraint(out_BTD, RESIDUAL)


class Block(nn.Module):
    """Attention, then a feed-forward layer, each added to the residual stream."""

    config: ModelConfig
    execution: Execution
    kind: LayerKind = LayerKind()

    @nn.compact
    def __call__(self, x_BTD: Array, cache: Any, rotations: Rotations, context: Any,
                 bias_HTS: Any = None) -> tuple[Array, Any]:
        c = self.config
        written = cache

        def attend(normed_BTD: Array) -> Array:
            nonlocal written
            if c.latent is not None:
                out_BTD, written = LatentAttention(c, self.kind.attention, name="attention")(
                    normed_BTD, rotations, context, cache)
            else:
                out_BTD, written = Attention(c, self.kind.attention, name="attention")(
                    normed_BTD, rotations, context, cache, bias_HTS=bias_HTS)
            return out_BTD

        def feed_forward(normed_BTD: Array) -> Array:
            if self.kind.mlp == "experts":
                return Experts(c, self.execution, name="experts")(normed_BTD, context)
            return Mlp(c, (2 * c.num_layers) ** -0.5, name="mlp")(normed_BTD)

        x_BTD = residual(c, "attention", x_BTD, attend)
        return residual(c, "mlp", x_BTD, feed_forward), written


class Period(nn.Module):
    """The blocks of a group's pattern, one after the other: what a scan repeats."""

    block: Any
    config: ModelConfig
    execution: Execution
    pattern: tuple[LayerKind, ...]

    @nn.compact
    def __call__(self, x_BTD: Array, cache: Any, *shared: Any) -> tuple[Array, Any]:
        for slot, kind in enumerate(self.pattern):
            x_BTD, _ = self.block(self.config, self.execution, kind, name=slot_name(slot))(x_BTD, None, *shared)
        return x_BTD, cache


def rematerialised(block: type[nn.Module], execution: Execution) -> type[nn.Module]:
    """`block` with the execution's policy of what its backward pass recomputes."""
    if execution.remat == "none":
        return block
    return nn.remat(block, policy=_REMAT[execution.remat], prevent_cse=not execution.scan_layers)


def scanned(block: type[nn.Module], config: ModelConfig, execution: Execution, pattern: tuple[LayerKind, ...],
            repeats: int, num_shared: int) -> nn.Module:
    """`repeats` periods of `pattern` as one scan over stacked weights; each call takes `num_shared` arguments more,
    the same for all."""
    lifted: dict[str, Any] = {
        "variable_axes": {"params": 0, "router": 0}, "split_rngs": {"params": True, "dropout": True},
        "length": repeats, "in_axes": (nn.broadcast,) * (1 + num_shared),
        "metadata_params": {nn.PARTITION_NAME: "layers"}}
    if len(pattern) == 1:
        return nn.scan(block, **lifted)(config, execution, pattern[0])
    return nn.scan(Period, **lifted)(block, config, execution, pattern)


class Embedding(nn.Module):
    """Token ids to vectors, with whatever is added to them; and (when tied) vectors to logits."""

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

    def logits(self, x_BTD: Array) -> Array:
        return jax.lax.dot_general(x_BTD, self.table_VD.astype(x_BTD.dtype), (((x_BTD.ndim - 1,), (1,)), ((), ())),
                                   preferred_element_type=jnp.float32)


def _rows(table: Array, index: Array) -> Array:
    return jnp.take(table, index, axis=0, mode="clip").astype(jnp.float32)


def positions_along(tokens_BT: Array, config: ModelConfig) -> Array:
    """0, 1, 2, … along each row; UserError where a table of learned positions ends before."""
    if config.positions == "learned" and tokens_BT.shape[1] > config.max_context:
        raise UserError(f"rows of {tokens_BT.shape[1]} tokens are longer than the model's {config.max_context} learned "
                        f"positions; packed rows need positions that begin anew with each document")
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)


class Decoder(nn.Module):
    """The whole model.

    `model.apply({"params": p}, tokens_BT, segment_ids_BT, positions_BT)` gives logits; `hidden` and `logits` are its
    two halves, for callers that need the logits of a few positions only (the server) or in pieces (the loss).
    """

    config: ModelConfig
    execution: Execution = Execution()

    def setup(self) -> None:
        c, e = self.config, self.execution
        if c.architecture != "decoder":
            raise UserError(f"a Decoder can't be made of architecture={c.architecture!r}; `models.build` chooses")
        block = rematerialised(Block, e)
        self.embed = Embedding(c)
        if e.scan_layers:
            for group in groups(c):
                setattr(self, group.name, scanned(block, c, e, group.pattern, group.repeats, 2))
        else:
            self.layers = [block(c, e, kind) for kind in layer_kinds(c)]
        self.final_norm = make_norm(c)
        if c.head is not None:
            self.head = TaskHead(c.head, bias=not c.head.per_sequence)
        elif not c.tie_embeddings:
            self.unembed = weight(self, "unembed", fan_in_normal(c.embed_dim), (c.embed_dim, c.vocab_size),
                                  ("embed", "vocab"))

    def hidden(self, tokens_BT: Array, positions_BT: Array, context: Any, cache: Any = None) -> tuple[Array, Any]:
        """The normalised output of the last block.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 position of each token in its own document.
          context: what each token may attend to: `kernels.attention.DenseContext` or `kernels.paged.PagedContext`.
          cache: with a paged context, the pools of each layer (a list; layers unrolled).
        Returns:
          [B, T, D] in the execution dtype, and the cache with this call's keys and values written.
        """
        c, e = self.config, self.execution
        x_BTD = self.embed(tokens_BT, positions_BT, jnp.dtype(e.dtype))
        x_BTD = nn.with_logical_constraint(x_BTD, RESIDUAL)
        # Constants of the step: without this, the scan's backward pass would carry their gradients along (4 %).
        turns = jax.lax.stop_gradient(rotations(c, positions_BT, e.rope_context))
        if e.scan_layers:
            for group in groups(c):
                x_BTD, _ = getattr(self, group.name)(x_BTD, None, turns, context)
        else:
            written = []
            for block, layer_cache in zip(self.layers, cache or [None] * c.num_layers, strict=True):
                x_BTD, layer_cache = block(x_BTD, layer_cache, turns, context)
                written.append(layer_cache)
            cache = written if cache is not None else None
        return self.final_norm(x_BTD), cache

    def logits(self, x_BTD: Array) -> Array:
        """float32 logits [B, T, V] of `hidden`'s output."""
        c = self.config
        if c.logit_scale is not None:
            x_BTD = x_BTD * c.logit_scale
        if c.tie_embeddings:
            logits_BTV = self.embed.logits(x_BTD)
        else:
            logits_BTV = linear(x_BTD, self.unembed, out_dtype=jnp.float32)
        if c.logit_soft_cap is not None:
            logits_BTV = c.logit_soft_cap * jnp.tanh(logits_BTV / c.logit_soft_cap)
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
          float32 logits [B, T, V]; with `ModelConfig.head`, that head's result, see `heads.TaskHead`. One result a
          sequence is read from the last token of the row that is not padding.
        """
        if positions_BT is None:
            positions_BT = positions_along(tokens_BT, self.config)
        x_BTD, _ = self.hidden(tokens_BT, positions_BT, DenseContext(segment_ids_BT))
        head = self.config.head
        if head is not None:
            return self.head(last_token(x_BTD, segment_ids_BT) if head.per_sequence else x_BTD)
        return self.logits(x_BTD)
