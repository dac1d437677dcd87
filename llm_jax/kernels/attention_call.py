"""What kernels of attention are told of a call, and how one that the compiler can't divide runs on a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Call:
    """The static facts by which a kernel says whether it can do it.

    Attributes:
      queries, keys: tokens of a row (T, S).
      heads, kv_heads: H and G.
      width, value_width: of a head's keys and values (K, V).
      dtype: of all three arrays; "mixed" where they differ.
      causal, window, soft_cap: as of `attention.attention`.
      segments: whether the queries' documents are told apart.
      other_keys: whether the keys' documents are given by themselves.
      bias: whether one is added to the scores.
    """

    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: str
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    segments: bool = False
    other_keys: bool = False
    bias: bool = False


def platform() -> str:
    """Where what is being traced will run, as `jax.default_backend` names it: that of the mesh in force, which may be
    of devices that aren't there (programs compiled ahead of time), or this process's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def is_lone_cpu() -> bool:
    """Whether what is being traced will run on one CPU device, so that nothing is divided."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and (mesh.empty or mesh.size == 1)


def device_kind() -> str:
    """The name of the devices of `platform`."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return (jax.devices()[0] if device is None else device).device_kind


def on_mesh(kernel: Callable[..., Array], q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, segment_ids_BT: Array | None,
            batch_axes: tuple[str, ...], head_axes: tuple[str, ...]) -> Array:
    """kernel(q, k, v, segment_ids), each device on its own rows and heads.

    Rows and heads have nothing to do with one another, so nothing is exchanged. An axis of the mesh that doesn't divide
    them, or is not named, has all its devices compute the same.

    Args:
      kernel: [B, T, H, V] of its arguments.
      q_BTHK, k_BSGK, v_BSGV, segment_ids_BT: whole arrays, however they lie on the mesh in force.
      batch_axes, head_axes: axes of the mesh that rows and heads (of queries, and of keys alike) lie along.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Inside another shard_map some axes, or all, are divided already.
    free = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual]
    if math.prod(mesh.shape[name] for name in free) == 1:
        return kernel(q_BTHK, k_BSGK, v_BSGV, segment_ids_BT)

    def dividing(axes: tuple[str, ...], length: int) -> tuple[str, ...]:
        axes = tuple(axis for axis in axes if axis in free)
        return () if length % math.prod(mesh.shape[axis] for axis in axes) else axes

    rows, heads = dividing(batch_axes, q_BTHK.shape[0]), dividing(head_axes, k_BSGK.shape[2])
    by_head = PartitionSpec(rows or None, None, heads or None)
    operands = (q_BTHK, k_BSGK, v_BSGV) + (() if segment_ids_BT is None else (segment_ids_BT,))
    specs = (by_head, by_head, by_head, PartitionSpec(rows or None))[:len(operands)]
    return jax.shard_map(lambda q, k, v, segment_ids=None: kernel(q, k, v, segment_ids), in_specs=specs,
                         out_specs=by_head, axis_names=set(free), check_vma=False)(*operands)
