"""Where activations lie: constraints by logical names, and how many devices share an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax

Array = jax.Array


def constrained(x: Array, names: Sequence[str | None]) -> Array:
    """`x`, laid out by the rules of `activation_rules` on the mesh that is set; as it is where there are none.

    Args:
      x: an array with as many axes as names.
      names: a logical name for each axis, None for one that is not divided.
    """
    return nn.with_logical_constraint(x, tuple(names))


def devices_along(name: str) -> int:
    """Among how many devices the rules divide the logical axis `name`; 1 without rules or without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = dict(reversed(list(nn.get_logical_axis_rules()))).get(name)
    if axes is None or mesh.empty:
        return 1
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
