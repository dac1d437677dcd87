"""Blocks, and stacks of them: what decoders and encoders are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from llm_jax.models.attention import Attention
from llm_jax.models.config import Execution, ModelConfig
from llm_jax.models.experts import Experts
from llm_jax.models.latent_attention import LatentAttention
from llm_jax.models.layers import Mlp, make_norm
from llm_jax.models.layout import LayerKind, groups, layer_kinds, slot_name
from llm_jax.models.rope import Rotations

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


def add_layers(module: nn.Module, block: type[nn.Module], config: ModelConfig, execution: Execution,
               num_shared: int) -> None:
    """Gives `module`, in its `setup`, a stack of blocks; `num_shared` arguments are the same for all of them."""
    block = rematerialised(block, execution)
    if execution.scan_layers:
        for group in groups(config):
            setattr(module, group.name, scanned(block, config, execution, group.pattern, group.repeats, num_shared))
    else:
        module.layers = [block(config, execution, kind) for kind in layer_kinds(config)]


def through_layers(module: nn.Module, config: ModelConfig, execution: Execution, x_BTD: Array, *shared: Any,
                   cache: Any = None) -> tuple[Array, Any]:
    """The output of the stack that `add_layers` made.

    Args:
      module, config, execution: as given to `add_layers`.
      x_BTD: embedded tokens.
      *shared: the arguments that are the same for all blocks.
      cache: an entry a layer (layers unrolled), for blocks that keep one; None keeps nothing.
    Returns:
      [B, T, D], and the cache as the blocks wrote it.
    """
    x_BTD = nn.with_logical_constraint(x_BTD, RESIDUAL)
    if execution.scan_layers:
        for group in groups(config):
            x_BTD, _ = getattr(module, group.name)(x_BTD, None, *shared)
        return x_BTD, cache
    written = []
    for block, layer_cache in zip(module.layers, cache or [None] * config.num_layers, strict=True):
        x_BTD, layer_cache = block(x_BTD, layer_cache, *shared)
        written.append(layer_cache)
    return x_BTD, written if cache is not None else None
