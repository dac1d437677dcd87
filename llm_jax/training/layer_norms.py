"""How large gradients, updates and weights are, part by part and layer by layer.

Measured in the step itself, as sums of squares: one reduction more of arrays that the update reads anyway. A layer's
"attention" and "mlp" are its two halves, each with its norms; experts are the mlp of theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.models import ModelConfig
from llm_jax.models.layout import STACKS, places

Array = jax.Array


def measure(grads: Any, updates: Any, params: Any, axes: Any) -> dict[str, dict[str, Array]]:
    """Sums of squares, to be called within the step.

    Args:
      grads: before clipping.
      updates: what is added to the parameters.
      params: after the update.
      axes: from `models.logical_axes`; all four have the same structure.

    Returns:
      "gradient", "update" and "weight", each: group → float32 scalar, or [L] where weights of L layers are stacked.
    """
    return {"gradient": _squares(grads, axes), "update": _squares(updates, axes), "weight": _squares(params, axes)}


def total(squares: Mapping[str, Array]) -> Array:
    """The norm of the whole: float32 scalar."""
    return jnp.sqrt(sum((jnp.sum(square) for square in squares.values()), start=jnp.zeros((), jnp.float32)))


def _squares(tree: Any, axes: Any) -> dict[str, Array]:
    found: dict[str, Array] = {}

    def add(path: tuple[Any, ...], leaf: Array, names: tuple[Any, ...]) -> None:
        own = tuple(i for i, name in enumerate(names) if name != "layers")
        squares = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=own)
        group = _group(tuple(str(getattr(key, "key", key)) for key in path))
        found[group] = found[group] + squares if group in found else squares

    jax.tree_util.tree_map_with_path(add, tree, axes)
    return found


def _group(path: tuple[str, ...]) -> str:
    """"layers/slot_1/mlp" of ("layers", "slot_1", "experts", "up"); of what is no layer's the first name alone."""
    depth = 0
    if path[0] in STACKS or path[0].startswith("layers_"):
        depth = 2 if len(path) > 1 and path[1].startswith("slot_") else 1
    if depth == 0:
        return path[0]
    part = "attention" if path[depth].startswith("attention") else "mlp"
    return "/".join((*path[:depth], part))


def by_layer(measured: Mapping[str, Mapping[str, Any]], config: ModelConfig) -> dict[str, dict[str, Any]]:
    """What people read: norms, and how far an update moves a weight relative to its size.

    Args:
      measured: from `measure`, on the host.
      config: the model's.

    Returns:
      "gradient_norm" and "update_ratio", each: "attention" and "mlp" → a list with a number a layer; and the name of
      each part outside the layers → a number. A ratio is None where the weights are zero.
    """
    gradient = _norms(measured["gradient"], config)
    update, weight = _norms(measured["update"], config), _norms(measured["weight"], config)
    return {"gradient_norm": gradient, "update_ratio": {
        name: [_ratio(u, w) for u, w in zip(update[name], weight[name], strict=True)]
        if isinstance(update[name], list) else _ratio(update[name], weight[name]) for name in update}}


def _norms(squares: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for group in squares:
        if not _is_of_layers(group):
            found[group] = _root(squares[group])
    for part in ("attention", "mlp"):
        layers = [_of_layer(squares, number, place.path, place.index, part)
                  for number, place in enumerate(_places(config))]
        if any(norm is not None for norm in layers):
            found[part] = layers
    return found


def _of_layer(squares: Mapping[str, Any], number: int, path: tuple[str, ...], index: int, part: str) -> float | None:
    unrolled = squares.get(f"layers_{number}/{part}")
    if unrolled is not None:
        return _root(unrolled)
    stacked = squares.get("/".join((*path, part)))
    return None if stacked is None else _root(np.asarray(stacked).reshape(-1)[index])


@functools.lru_cache(maxsize=8)
def _places(config: ModelConfig) -> tuple[Any, ...]:
    return places(config)


def _is_of_layers(group: str) -> bool:
    first = group.split("/")[0]
    return first in STACKS or first.startswith("layers_")


def _root(square: Any) -> float:
    return float(f"{float(np.sqrt(square)):.6g}")


def _ratio(update: float | None, weight: float | None) -> float | None:
    return float(f"{update / weight:.6g}") if update is not None and weight else None
