"""Weights whose width is divided along several rings of chips (`parallel.rings`): their gradients are scattered as they
are summed. Left to itself, the compiler sums the whole gradient on every device, and cuts it then."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from llm_jax.models import layers
from llm_jax.parallel.rings import Rings, rings_along
from llm_jax.parallel.rules import ShardingRules, devices_along, mesh_axes

Array = jax.Array

# Beside projections: the experts' matrices, and what the logits are made with.
_EXPERTS = ("gate", "up", "down")
_OUTPUTS = ("unembed", "embedding")


@dataclasses.dataclass(frozen=True)
class Lie:
    """Where a weight lies on the mesh, and the rows of tokens that it multiplies.

    Attributes:
      rings: along them lies the weight's axis `divided`, and rows do.
      divided: an axis of the weight.
      weight: mesh axes of each of the weight's axes.
      rows, length: mesh axes of tokens [B, T].
    """

    rings: Rings
    divided: int
    weight: tuple[tuple[str, ...], ...]
    rows: tuple[str, ...]
    length: tuple[str, ...]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The mesh axes among which tokens are divided."""
        return (*self.rows, *self.length)

    def of_tokens(self, axes: Sequence[int]) -> PartitionSpec:
        """Of an array [B, T, ...] whose further axes are these of the weight: no two of its axes on one mesh axis."""
        rest = (tuple(axis for axis in self.weight[i] if axis not in self.tokens) for i in axes)
        return PartitionSpec(self.rows, self.length, *rest)

    def divides(self, B: int, T: int) -> bool:
        """Whether each device has as many of the tokens."""
        mesh = jax.sharding.get_abstract_mesh()
        return B % devices_along(mesh, self.rows) == 0 and T % devices_along(mesh, self.length) == 0

    def summed(self, local: Callable[..., Array], *operands: tuple[Array, PartitionSpec]) -> Array:
        """The sum over all devices of what each makes of its part of the operands, an array of the weight's shape."""
        mesh = jax.sharding.get_abstract_mesh()

        def on_device(*parts: Array) -> Array:
            mine = self.rings.psum_scatter(local(*parts), self.divided)
            others = tuple(axis for axis in self.tokens if axis != self.rings.axis)
            return jax.lax.psum(mine, others) if others else mine

        # In a stage of the pipeline that axis is divided already.
        free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
        arrays, specs = zip(*operands, strict=True)
        return jax.shard_map(on_device, in_specs=specs, out_specs=PartitionSpec(*self.weight), axis_names=free,
                             check_vma=False)(*arrays)

    def gradient_of_weight(self, contract: int, out_dtype: Any, x: Array, g: Array) -> Array:
        """`layers.gradient_of_weight`, scattered."""
        return self.summed(functools.partial(layers.gradient_of_weight, contract, out_dtype),
                           (x, self.of_tokens(range(contract))),
                           (g, self.of_tokens(range(contract, len(self.weight)))))

    def added_up(self, parts: Array) -> Array:
        """The sum of gradients [R, S, ...] of which each device along rows (R) and length (S) has one."""
        if not self.divides(*parts.shape[:2]):
            return jnp.sum(parts, axis=(0, 1))
        return self.summed(lambda part: part.sum((0, 1)), (parts, self.of_tokens(range(len(self.weight)))))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["lie"])
@dataclasses.dataclass(frozen=True)
class RingWeight:
    """A weight that `layers.linear` multiplies as any other; its gradient is scattered along rings."""

    w: Array
    lie: Lie

    def linear(self, x: Array, contract: int, out_dtype: Any) -> Array:
        """x · w; arguments as those of `layers.linear`."""
        dtype, w = jnp.dtype(out_dtype or x.dtype), self.w.astype(x.dtype)
        if x.ndim - contract != 2 or not self.lie.divides(*x.shape[:2]):
            return layers.product(contract, dtype, x, w)
        return layers.product_with(self.lie.gradient_of_weight, contract, dtype, x, w)


def unwrapped(w: Any) -> Any:
    """A weight itself, for what does not ask for its gradient to be scattered."""
    return w.w if isinstance(w, RingWeight) else w


def wrapped_apply(apply: Callable[..., Any], axes: Any, mesh: Mesh, rules: ShardingRules) -> Callable[..., Any]:
    """A model's `apply` whose weights' gradients are scattered along the rings of `mesh`; it takes the same parameters.

    Args:
      apply: ({"params": params}, …) → anything.
      axes: logical axes of its parameters (`models.logical_axes`).
      mesh: where it will run. Where each of its axes is one ring, or it has none, nothing is to be done.
      rules: where parameters and tokens lie.
    """
    rings = {axis: found for axis in mesh.axis_names if (found := rings_along(mesh, axis)) is not None}
    if not rings:
        return apply

    def wrap(path: tuple, names: tuple[str, ...], leaf: Any) -> Any:
        keys = [getattr(key, "key", "") for key in path]
        is_expert = len(keys) > 1 and keys[-2] == "experts" and keys[-1] in _EXPERTS
        if not (layers.is_projection(path) or is_expert or keys[-1] in _OUTPUTS):
            return leaf
        lie = _lie(names[1:] if names[0] == "layers" else names, rings, mesh, rules)
        return leaf if lie is None else RingWeight(leaf, lie)

    def call(variables: dict[str, Any], *args: Any, **options: Any) -> Any:
        params = jax.tree_util.tree_map_with_path(wrap, axes, variables["params"], is_leaf=_is_names)
        return apply(variables | {"params": params}, *args, **options)

    return call


def _is_names(x: Any) -> bool:
    return isinstance(x, tuple)


def _lie(names: Sequence[str], rings: dict[str, Rings], mesh: Mesh, rules: ShardingRules) -> Lie | None:
    """Where a weight with these logical axes lies; None if no axis of it lies along rings, or rows don't."""

    def along(axes: Any) -> tuple[str, ...]:
        return tuple(axis for axis in mesh_axes(axes) if mesh.shape[axis] > 1)

    weight = tuple(along(rules.parameters[name]) for name in names)
    rows, length = along(rules.activations["batch"]), along(rules.activations["length"])
    for place, axes in enumerate(weight):
        if len(axes) == 1 and axes[0] in rings and axes[0] in (*rows, *length):
            return Lie(rings[axes[0]], place, weight, rows, length)
    return None
