"""Mixture of experts: a feed-forward layer of which each token passes through a few of many copies."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.kernels.capacity import capacity_mlp, expert_capacity
from llm_jax.kernels.grouped import Weights, grouped_mlp
from llm_jax.kernels.paged import PagedContext
from llm_jax.models.config import Execution, ModelConfig
from llm_jax.models.layers import Mlp, activation, fan_in_normal, weight
from llm_jax.models.routing import route, router_sums

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

        weight_BTA, chosen_BTA, score_BTE = route(x_BTD, router_DE, bias_E, facts)
        is_token_BT = _is_token(x_BTD, context)
        capacity = None
        if self.execution.expert_capacity is not None and not isinstance(context, PagedContext):
            capacity = expert_capacity(self.execution.expert_capacity, x_BTD.shape[1], facts.per_token, e)
        if self.is_mutable_collection("router"):
            for name, value in router_sums(chosen_BTA, score_BTE, is_token_BT, capacity).items():
                self.sow("router", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)

        chosen_BTA = jnp.where(is_token_BT[..., None], chosen_BTA, e)
        out_BTD = _on_mesh(functools.partial(_compute, act=activation(c.activation), capacity=capacity), x_BTD,
                           chosen_BTA, weight_BTA, tuple(w.astype(x_BTD.dtype) for w in weights))
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


def _on_mesh(compute: Callable[..., Array], x_BTD: Array, chosen_BTA: Array, weight_BTA: Array,
             weights: Weights) -> Array:
    """`compute` on the mesh that is set, by the rules that are set (`models.activation_rules`); alone where there are
    none.

    Each device keeps its own experts ("activation_experts") and its own slice of their inner width ("activation_mlp"),
    and computes only what is sent to them. Devices that lie along the axis of experts first show each other their
    tokens (one all-gather of x, of the choices and of their weights) and at the end add up their results, each keeping
    its own rows (one reduce-scatter); those that share the inner width add up theirs (one all-reduce). Routing is not
    even, so a device may have to take every token: what is exchanged is what is needed in the worst case. Where rows
    are not spread over the axis, or don't divide, all its devices hold them and the results are added up.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, experts, inner = (_mesh_axes(name) for name in ("batch", "activation_experts", "activation_mlp"))
    if mesh.empty or not (rows or experts or inner):
        return compute(x_BTD, chosen_BTA, weight_BTA, weights)
    if x_BTD.shape[0] % math.prod(mesh.shape[axis] for axis in rows):
        rows = ()
    spread = set(experts) <= set(rows) and experts != ()

    def local(x_BTD: Array, chosen_BTA: Array, weight_BTA: Array, weights: Weights) -> Array:
        if spread:
            x_BTD, chosen_BTA, weight_BTA = (jax.lax.all_gather(a, experts, tiled=True)
                                             for a in (x_BTD, chosen_BTA, weight_BTA))
        first = jax.lax.axis_index(experts) * weights[0].shape[0] if experts else 0
        out_BTD = compute(x_BTD, chosen_BTA - first, weight_BTA, weights)
        if spread:
            out_BTD = jax.lax.psum_scatter(out_BTD, experts, tiled=True)
        elif experts:
            out_BTD = jax.lax.psum(out_BTD, experts)
        return jax.lax.psum(out_BTD, inner) if inner else out_BTD

    by_row, matrix = PartitionSpec(rows), PartitionSpec(experts, None, inner)
    return jax.shard_map(local, in_specs=(by_row, by_row, by_row, (matrix, matrix, PartitionSpec(experts, inner))),
                         out_specs=by_row, check_vma=False)(x_BTD, chosen_BTA, weight_BTA, weights)


def _mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that the rules in force give a logical axis."""
    spec = nn.logical_to_mesh_axes((name,)) or PartitionSpec(None)
    axes = spec[0]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
