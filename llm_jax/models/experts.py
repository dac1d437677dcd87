"""Mixture of experts: a feed-forward layer of which each token passes through a few of many copies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from llm_jax.kernels.capacity import (
    capacity_mlp,
    emptied_slots,
    expert_capacity,
    filled_slots,
    shared_slots,
    slots_mlp,
)
from llm_jax.kernels.grouped import Weights, grouped_mlp
from llm_jax.kernels.paged import PagedContext
from llm_jax.models.activations import mesh_axes
from llm_jax.models.config import Execution, ModelConfig
from llm_jax.models.facts import Experts as Facts
from llm_jax.models.layers import Mlp, activation, fan_in_normal, weight
from llm_jax.models.ring_weight import RingWeight, unwrapped
from llm_jax.models.routing import route, router_sums
from llm_jax.models.rows import row_cut
from llm_jax.parallel.rings import Rings
from llm_jax.parallel.rules import devices_along
from llm_jax.parallel.sequence import row_order

Array = jax.Array


class Experts(nn.Module):
    """Σ over a token's chosen experts of weight · down(act(gate(x)) · up(x)), and a shared layer where there is one.

    No token is dropped, unless `Execution.expert_capacity` says so and whole rows are computed: a serving step never
    drops, so one request's tokens don't change another's. Padding is sent to no expert and takes no room.

    Where a caller makes the collection "router" mutable, the layer sows what `routing.router_sums` describes in it.
    """

    config: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(self, x_BTD: Array, context: Any) -> Array:
        c, facts = self.config, self.config.experts
        assert facts is not None  # ModelConfig has checked it
        d, f, e = c.embed_dim, facts.mlp_dim, facts.count
        residual_scale = (2 * c.num_layers) ** -0.5
        router_DE = weight(self, "router", fan_in_normal(d), (d, e), ("embed", "expert_router"))
        bias_E = None
        if facts.selection_bias:
            bias_E = weight(self, "selection_bias", nn.initializers.zeros_init(), (e,), ("expert_router",))
        weights = (weight(self, "gate", fan_in_normal(d), (e, d, f), ("experts", "embed", "mlp")),
                   weight(self, "up", fan_in_normal(d), (e, d, f), ("experts", "embed", "mlp")),
                   weight(self, "down", fan_in_normal(f, residual_scale), (e, f, d), ("experts", "mlp", "embed")))

        weight_BTA, chosen_BTA, score_BTE = _routed(x_BTD, router_DE, bias_E, facts)
        is_token_BT = _is_token(x_BTD, context)
        capacity = None
        if self.execution.expert_capacity is not None and not isinstance(context, PagedContext):
            capacity = expert_capacity(self.execution.expert_capacity, x_BTD.shape[1], facts.per_token, e)
        if self.is_mutable_collection("router"):
            for name, value in router_sums(chosen_BTA, score_BTE, is_token_BT, capacity).items():
                self.sow("router", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)

        chosen_BTA = jnp.where(is_token_BT[..., None], chosen_BTA, e)
        rings = weights[0].lie.rings if isinstance(weights[0], RingWeight) else None
        out_BTD = _on_mesh(x_BTD, chosen_BTA, weight_BTA, tuple(unwrapped(w).astype(x_BTD.dtype) for w in weights),
                           activation(c.activation), capacity, rings)
        if facts.shared_dim:
            out_BTD = out_BTD + Mlp(c, residual_scale, width=facts.shared_dim, name="shared")(x_BTD)
        return out_BTD


def _is_token(x_BTD: Array, context: Any) -> Array:
    """bool [B, T], false for padding."""
    if isinstance(context, PagedContext):
        return context.position_N[None] >= 0
    segment_ids_BT = getattr(context, "segment_ids_BT", None)
    return jnp.ones(x_BTD.shape[:2], bool) if segment_ids_BT is None else segment_ids_BT > 0


def _compute(x_BTD: Array, chosen_BTA: Array, weight_BTA: Array, weights: Weights, act: Callable[[Array], Array],
             capacity: int | None) -> Array:
    """The experts' part of the layer on one device, in x's dtype."""
    if capacity is not None:
        return capacity_mlp(x_BTD, chosen_BTA, weight_BTA, weights, act, capacity).astype(x_BTD.dtype)
    x_ND, chosen_NA, weight_NA = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, chosen_BTA, weight_BTA))
    return grouped_mlp(x_ND, chosen_NA, weight_NA, weights, act).astype(x_BTD.dtype).reshape(x_BTD.shape)


def _routed(x_BTD: Array, router_DE: Array, bias_E: Array | None, facts: Facts) -> tuple[Array, Array, Array]:
    """`route`, each device for its own tokens: left to itself, the compiler gathers all tokens' scores to sort them."""
    rows, length = _dividing(x_BTD)
    if not (rows or length):
        return route(x_BTD, router_DE, bias_E, facts)
    tokens, whole = PartitionSpec(rows, length), PartitionSpec()
    return jax.shard_map(lambda x, router, bias: route(x, router, bias, facts), in_specs=(tokens, whole, whole),
                         out_specs=tokens, axis_names={*rows, *length}, check_vma=False)(x_BTD, router_DE, bias_E)


def _on_mesh(x_BTD: Array, chosen_BTA: Array, weight_BTA: Array, weights: Weights, act: Callable[[Array], Array],
             capacity: int | None, rings: Rings | None = None) -> Array:
    """`_compute` on the mesh that is set, by the rules that are set (`models.activation_rules`); alone where there are
    none.

    Each device keeps its own experts ("activation_experts") and its own slice of their inner width ("activation_mlp"),
    and computes only what is sent to them; devices that share the inner width add up their results. Where the outer
    width is divided too ("experts_embed"), devices show each other their parts of the matrices, forward and backward,
    and add up each part's gradient where the part is; along `rings`, one after the other.

    With a capacity, each device packs the tokens of its rows into its slots of all experts, an all-to-all along the
    axis of experts brings the slots to their experts, and another one the results back: B · T · A · factor vectors each
    way, however many devices there are. A row whose tokens are divided ("length") is put together first, and the
    devices that share it share its slots.

    Without one, routing may send every token to one device, so buffers of a fixed size that hold what is exchanged in
    the worst case are as large as all tokens. Devices along the axis then show each other their tokens (one all-gather
    of x, of the choices and of their weights), and at the end add up their results, each keeping its own rows (one
    reduce-scatter).

    Where rows are not spread over the axis of experts, or don't divide, all its devices hold them and the results are
    added up.
    """
    rows, length = _dividing(x_BTD)
    experts, inner, outer = (_axes(name) for name in ("activation_experts", "activation_mlp", "experts_embed"))
    if not (rows or length or experts or inner):
        return _compute(x_BTD, chosen_BTA, weight_BTA, weights, act, capacity)
    mesh = jax.sharding.get_abstract_mesh()
    if not set(outer) <= {*rows, *length} or x_BTD.shape[-1] % devices_along(mesh, outer):
        outer = ()
    spread = set(experts) <= set(rows) and experts != ()
    cut = row_cut()
    order = None if cut is None or capacity is None else row_order(x_BTD.shape[1], cut.parts)
    if order is not None and not spread:
        # Places among a row's tokens are told from all of them, in the order of the row.
        in_row = np.argsort(order)
        x_BTD, chosen_BTA, weight_BTA = (a[:, in_row] for a in (x_BTD, chosen_BTA, weight_BTA))
        length = ()
    summed = inner if spread else (*experts, *inner)

    def local(x_BTD: Array, chosen_BTA: Array, weight_BTA: Array, weights: Weights) -> Array:
        if capacity is not None and spread:
            of_slots = _with_whole(functools.partial(slots_mlp, activation=act), outer, rings)
            return _exchanged(x_BTD, chosen_BTA, weight_BTA, weights, of_slots, capacity, experts, length, order)[None]
        if spread:
            x_BTD, chosen_BTA, weight_BTA = _gathered((x_BTD, chosen_BTA, weight_BTA), experts)
        first = jax.lax.axis_index(experts) * weights[0].shape[0] if experts else 0
        compute = _with_whole(functools.partial(_compute, act=act, capacity=capacity), outer, rings)
        out_BTD = compute(x_BTD, chosen_BTA - first, weight_BTA, weights)
        return (jax.lax.psum_scatter(out_BTD, experts, tiled=True) if spread else out_BTD)[None]

    tokens, matrix = PartitionSpec(rows, length), PartitionSpec(experts, outer, inner)
    # In a stage of the pipeline that axis is divided already.
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind != AxisType.Manual and mesh.shape[name] > 1}
    out_XBTD = jax.shard_map(
        local, in_specs=(tokens, tokens, tokens, (matrix, matrix, PartitionSpec(experts, inner, outer))),
        out_specs=PartitionSpec(summed, rows, length), axis_names=free, check_vma=False)(
            x_BTD, chosen_BTA, weight_BTA, weights)
    # Added up out here: the transpose of a sum within is a sum of gradients, which all these devices have already.
    out_BTD = jax.lax.reduce(out_XBTD, np.zeros((), out_XBTD.dtype), jax.lax.add, (0,))
    return out_BTD if order is None or length else out_BTD[:, order]


def _exchanged(x_BTD: Array, chosen_BTA: Array, weight_BTA: Array, weights: Weights, of_slots: Callable[..., Array],
               capacity: int, experts: tuple[str, ...], length: tuple[str, ...],
               order: np.ndarray | None) -> Array:
    """`_compute` with a capacity on a device that has its own rows, and its own experts of those along `experts`.

    `of_slots` is `slots_mlp`; `order` is that of a row's tokens among the devices along `length`.
    """
    if length:
        x_BTD, chosen_BTA, weight_BTA = _gathered((x_BTD, chosen_BTA, weight_BTA), length, axis=1)
    if order is not None:
        in_row = np.argsort(order)
        x_BTD, chosen_BTA, weight_BTA = (a[:, in_row] for a in (x_BTD, chosen_BTA, weight_BTA))
    num_experts = weights[0].shape[0] * jax.lax.axis_size(experts)
    slots = filled_slots(x_BTD, chosen_BTA, weight_BTA, num_experts, capacity)
    if length:
        slots = shared_slots(slots, jax.lax.axis_size(length), jax.lax.axis_index(length), x_BTD.shape[1])

    def to_experts(by_expert: Array) -> Array:
        return jax.lax.all_to_all(by_expert, experts, split_axis=0, concat_axis=1, tiled=True)

    out = of_slots(to_experts(slots.x_EBCD), to_experts(slots.weight_EBC), weights).astype(x_BTD.dtype)
    out_EBCD = jax.lax.all_to_all(out, experts, split_axis=1, concat_axis=0, tiled=True)
    out_BTD = emptied_slots(out_EBCD, slots.position_EBC, x_BTD.shape[1]).astype(x_BTD.dtype)
    if order is not None:
        out_BTD = out_BTD[:, order]
    return jax.lax.psum_scatter(out_BTD, length, scatter_dimension=1, tiled=True) if length else out_BTD


def _with_whole(compute: Callable[..., Array], outer: tuple[str, ...], rings: Rings | None) -> Callable[..., Array]:
    """`compute`, whose last argument is a device's part of the matrices along the mesh axes `outer`, with the whole
    ones; they are gathered again in the backward pass instead of being kept."""
    if not outer:
        return compute

    def gathered(w: Array, axis: int) -> Array:
        if rings is not None and outer == (rings.axis,):
            return rings.all_gather(w, axis)
        return jax.lax.all_gather(w, outer, axis=axis, tiled=True)

    def whole(*arguments: Any) -> Array:
        *inputs, (gate, up, down) = arguments
        return compute(*inputs, (gathered(gate, 1), gathered(up, 1), gathered(down, 2)))

    return jax.checkpoint(whole, policy=lambda primitive, *_, **__: primitive.name != "all_gather", prevent_cse=False)


def _dividing(x_BTD: Array) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes among which the rules divide rows, and a row's tokens; none where they don't divide them evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, length = (() if size % devices_along(mesh, axes) else axes
                    for size, axes in zip(x_BTD.shape, (_axes("batch"), _axes("length")), strict=False))
    return rows, length


def _axes(name: str) -> tuple[str, ...]:
    """The mesh axes, of more than one device, that the rules in force give a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh_axes(name) if not mesh.empty and mesh.shape[axis] > 1)


def _gathered(arrays: tuple[Array, ...], axes: tuple[str, ...], axis: int = 0) -> list[Array]:
    return [jax.lax.all_gather(array, axes, axis=axis, tiled=True) for array in arrays]
