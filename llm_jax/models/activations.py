"""Where activations lie: constraints by logical names, and how many devices share an axis."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from llm_jax.parallel import rules

Array = jax.Array


def constrained(x: Array, names: Sequence[str | None]) -> Array:
    """`x`, laid out by the rules of `activation_rules` on the mesh that is set; as it is where there are none.

    Args:
      x: an array with as many axes as names.
      names: a logical name for each axis, None for one that is not divided.
    """
    return nn.with_logical_constraint(x, tuple(names))


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that the rules in force give a logical axis."""
    return rules.mesh_axes((nn.logical_to_mesh_axes((name,)) or (None,))[0])


def devices_along(name: str) -> int:
    """Among how many devices the rules divide the logical axis `name`; 1 without rules or without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else rules.devices_along(mesh, mesh_axes(name))
