"""Making parameters, naming their axes, and moving between the stacked and the per-layer layout.

The canonical layout, the one in checkpoints, is stacked: every leaf under "layers" has a leading axis L. The server
runs per-layer weights ("layers_0", "layers_1", …), because slicing a stack inside its step costs a copy a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.models.decoder import Decoder

Params = Any


def _boxed(model: Decoder, key: jax.Array) -> Any:
    return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def init_params(model: Decoder, key: jax.Array) -> Params:
    """Fresh float32 parameters, as a plain tree of arrays; jit it with `out_shardings` to create them sharded."""
    return nn.meta.unbox(_boxed(model, key))


def abstract_params(model: Decoder) -> Params:
    """`jax.ShapeDtypeStruct`s of the parameters, at no cost in memory."""
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))


def logical_axes(model: Decoder) -> Params:
    """The logical axis names of every parameter: the tree of `init_params` with tuples such as ("layers", "embed",
    "mlp") for leaves."""
    boxed = jax.eval_shape(lambda key: _boxed(model, key), jax.random.key(0))
    specs = nn.get_partition_spec(boxed)
    return jax.tree.map(tuple, specs, is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec))


@contextlib.contextmanager
def activation_rules(rules: Sequence[tuple[str, Any]] | Mapping[str, Any]) -> Iterator[None]:
    """Within, the model's activations are constrained by `rules` (logical name → mesh axes) on the mesh that is set.

    Names used: batch, length, activation_embed, activation_mlp, activation_vocab. A name absent from the rules is
    left to the compiler.
    """
    items = rules.items() if isinstance(rules, Mapping) else rules
    with nn.logical_axis_rules(list(items)):
        yield


def unstack(params: Params, *, free: bool = False) -> Params:
    """Stacked parameters as per-layer ones. With `free`, each stacked leaf is deleted once its slices exist."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    leaves, treedef = jax.tree.flatten(params["layers"])
    layers: list[list[Any]] = [[] for _ in range(leaves[0].shape[0])]
    for leaf in leaves:
        for i, layer in enumerate(layers):
            layer.append(leaf[i])
        if free and isinstance(leaf, jax.Array):
            jax.block_until_ready([layer[-1] for layer in layers])
            leaf.delete()
    return rest | {f"layers_{i}": jax.tree.unflatten(treedef, layer) for i, layer in enumerate(layers)}


def stack(params: Params) -> Params:
    """The inverse of `unstack`."""
    count = sum(name.startswith("layers_") for name in params)
    layers = [params[f"layers_{i}"] for i in range(count)]
    rest = {name: value for name, value in params.items() if not name.startswith("layers_")}
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
