"""Blocks, and stacks of them: what decoders and encoders are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from llm_jax.errors import UserError
from llm_jax.kernels.attention_call import is_lone_cpu
from llm_jax.models.activations import constrained, devices_along
from llm_jax.models.attention import Attention
from llm_jax.models.config import Execution, ModelConfig
from llm_jax.models.experts import Experts
from llm_jax.models.latent_attention import LatentAttention
from llm_jax.models.layers import Mlp, make_norm
from llm_jax.models.layout import Group, LayerKind, groups, layer_kinds, slot_name
from llm_jax.models.rope import Rotations
from llm_jax.parallel import pipeline

Array = jax.Array

_policies = jax.checkpoint_policies
_REMAT = {
    "full": None,
    "stage": None,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "save_attention": _policies.save_only_these_names("attention"),
}
# What a tick of the pipeline keeps: besides its input, what its blocks would keep.
_REMAT_TICK = {
    "none": pipeline.keep_all_but_slices,
    "full": _policies.save_only_these_names("block"),
    "stage": None,
    "dots": _policies.save_from_both_policies(_policies.save_only_these_names("block"), _REMAT["dots"]),
    "save_attention": _policies.save_only_these_names("block", "attention"),
}
_MOST_WRITTEN_OUT = 8
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
        x_BTD = checkpoint_name(x_BTD, "block")

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


def written_out(execution: Execution, repeats: int) -> int:
    """How many of a scan's `repeats` periods its program spells out, one after the other.

    One, so that a program does not grow with its layers. But where a lone CPU trains a small model, all: a scan
    fills, writes and slices stacks of activations, a tenth of a step (docs/performance.md). Not with remat, whose
    recomputation XLA would find out to be the same as what it has outside of a loop.
    """
    return repeats if is_lone_cpu() and execution.remat == "none" and repeats <= _MOST_WRITTEN_OUT else 1


def scanned(block: type[nn.Module], config: ModelConfig, execution: Execution, pattern: tuple[LayerKind, ...],
            repeats: int, num_shared: int, unroll: int = 1, **fields: Any) -> nn.Module:
    """`repeats` periods of `pattern` as one scan over stacked weights; each call takes `num_shared` arguments more,
    the same for all. `unroll` is `jax.lax.scan`'s, `fields` are the module's own (its parent)."""
    lifted: dict[str, Any] = {
        "variable_axes": {"params": 0, "router": 0}, "split_rngs": {"params": True, "dropout": True},
        "length": repeats, "unroll": unroll, "in_axes": (nn.broadcast,) * (1 + num_shared),
        # Layers that don't repeat can't be divided among devices.
        "metadata_params": {nn.PARTITION_NAME: "layers" if repeats > 1 else None}}
    if len(pattern) == 1:
        return nn.scan(block, **lifted)(config, execution, pattern[0], **fields)
    return nn.scan(Period, **lifted)(block, config, execution, pattern, **fields)


def add_layers(module: nn.Module, block: type[nn.Module], config: ModelConfig, execution: Execution,
               num_shared: int) -> None:
    """Gives `module`, in its `setup`, a stack of blocks; `num_shared` arguments are the same for all of them."""
    block = rematerialised(block, execution)
    if execution.scan_layers:
        for group in groups(config):
            unroll = 1 if module.is_initializing() else written_out(execution, group.repeats)
            setattr(module, group.name, scanned(block, config, execution, group.pattern, group.repeats, num_shared,
                                                unroll))
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
        stages = 1 if module.is_initializing() else pipeline.stages()
        for group in groups(config):
            if stages > 1 and group.repeats > 1:
                x_BTD = _through_stages(module, config, execution, group, stages, x_BTD, shared)
            else:
                x_BTD, _ = getattr(module, group.name)(x_BTD, None, *shared)
        return x_BTD, cache
    written = []
    for block, layer_cache in zip(module.layers, cache or [None] * config.num_layers, strict=True):
        x_BTD, layer_cache = block(x_BTD, layer_cache, *shared)
        written.append(layer_cache)
    return x_BTD, written if cache is not None else None


def pipeline_schedule(config: ModelConfig, execution: Execution, stages: int) -> pipeline.Schedule:
    """How microbatches pass through the layers of a decoder that lie over `stages` devices.

    Raises:
      UserError: the layers that repeat don't divide, the microbatches don't keep the stages busy, or it is no decoder.
    """
    if config.architecture != "decoder":
        raise UserError(f"MeshConfig.pipeline={stages} is for decoders; architecture={config.architecture!r} can lie "
                        "over the other axes")
    schedule = pipeline.schedule(stages, execution.pipeline_repeats, execution.pipeline_microbatches)
    repeated = max(groups(config), key=lambda group: group.repeats)
    schedule.check_layers(repeated.repeats, len(repeated.pattern))
    return schedule


def _through_stages(module: nn.Module, config: ModelConfig, execution: Execution, group: Group, stages: int,
                    x_BTD: Array, shared: tuple[Any, ...]) -> Array:
    """`group`'s layers on the mesh axis `pipeline` (see `parallel.pipeline`), with the weights that are `module`'s."""
    schedule = pipeline_schedule(config, execution, stages)
    schedule.check_rows(x_BTD.shape[0], devices_along("batch"))
    periods = group.repeats // (stages * schedule.repeats)
    layers = scanned(rematerialised(Block, execution), config, execution, group.pattern, periods, len(shared),
                     parent=None)
    # The decoder's shared arguments are one entry a row.
    per_row, structure = jax.tree.flatten(shared)
    gathers = module.is_mutable_collection("router")

    def stretch(weights: Any, x_bTD: Array, per_row: list[Array]) -> tuple[Array, Any]:
        (x_bTD, _), made = layers.apply({"params": weights}, x_bTD, None, *jax.tree.unflatten(structure, per_row),
                                        mutable=["router"] if gathers else [])
        return x_bTD, made.get("router", {})

    def cut(x: Array, names: tuple[str | None, ...]) -> Array:
        return constrained(pipeline.cut(x, schedule.microbatches), (None, *names))

    out, router = pipeline.through_stages(
        stretch, nn.meta.unbox(module.variables["params"][group.name]), cut(x_BTD, RESIDUAL),
        [cut(leaf, ("batch", "length", *[None] * leaf.ndim)[:leaf.ndim]) for leaf in per_row], schedule,
        _REMAT_TICK[execution.remat])
    if gathers and router:
        module.put_variable("router", group.name, router)
    return nn.with_logical_constraint(pipeline.join(out), RESIDUAL)
