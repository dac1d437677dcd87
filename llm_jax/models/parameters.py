"""Making parameters, naming their axes, and moving between the stacked and the per-layer layout.

The canonical layout, the one in checkpoints, is stacked: every leaf under "layers" has a leading axis L (models whose
layers differ have more than one stack, see `layout`). The server runs per-layer weights ("layers_0", "layers_1", …),
because slicing a stack inside its step costs a copy a layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.models.config import Execution, ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.encoder import Encoder
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.layout import encoder_part, groups, places

Params = Any
Model = Decoder | Encoder | EncoderDecoder
_CLASSES: dict[str, Any] = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder}


def build(config: ModelConfig, execution: Execution | None = None) -> Model:
    """The module of a model, of the class that `ModelConfig.architecture` names."""
    return _CLASSES[config.architecture](config, execution or Execution())


def build_language_model(config: ModelConfig, execution: Execution | None = None) -> Decoder:
    """The module of a model that continues text; UserError if it is not a decoder, or has a task's head."""
    what = f"a {config.head.kind} head" if config.head else f"architecture={config.architecture!r}"
    if config.architecture != "decoder" or config.head is not None:
        raise UserError(f"this is for models that continue text, and one with {what} does not; call the model itself "
                        f"instead: model.apply({{'params': params}}, …)")
    return Decoder(config, execution or Execution())


def _boxed(model: Model, key: jax.Array) -> Any:
    tokens = jnp.zeros((1, 2), jnp.int32)
    inputs = (tokens, tokens) if isinstance(model, EncoderDecoder) else (tokens,)
    return model.init(key, *inputs)["params"]


def init_params(model: Model, key: jax.Array) -> Params:
    """Fresh float32 parameters, as a plain tree of arrays; jit it with `out_shardings` to create them sharded."""
    return nn.meta.unbox(_boxed(model, key))


def abstract_params(model: Model) -> Params:
    """`jax.ShapeDtypeStruct`s of the parameters, at no cost in memory."""
    return jax.tree.map(lambda leaf: leaf, _traced(model)[0])


def logical_axes(model: Model) -> Params:
    """The logical axis names of every parameter: the tree of `init_params` with tuples such as ("layers", "embed",
    "mlp") for leaves."""
    return jax.tree.map(tuple, _traced(model)[1], is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec))


@functools.lru_cache(maxsize=32)
def _traced(model: Model) -> tuple[Params, Params]:
    """Shapes and axes; kept, as tracing a model of many kinds of layers takes seconds. Callers copy the trees."""
    boxed = jax.eval_shape(lambda key: _boxed(model, key), jax.random.key(0))
    return jax.eval_shape(nn.meta.unbox, boxed), nn.get_partition_spec(boxed)


@contextlib.contextmanager
def activation_rules(rules: Sequence[tuple[str, Any]] | Mapping[str, Any]) -> Iterator[None]:
    """Within, the model's activations are constrained by `rules` (logical name → mesh axes) on the mesh that is set.

    Names used: batch, length, activation_embed, activation_mlp, activation_vocab, activation_experts. A name absent is
    left to the compiler.
    """
    items = rules.items() if isinstance(rules, Mapping) else rules
    with nn.logical_axis_rules(list(items)):
        yield


def unstack(params: Params, config: ModelConfig, *, free: bool = False) -> Params:
    """Stacked parameters as per-layer ones. With `free`, each stacked leaf is deleted once its slices exist."""
    names = {group.name for group in groups(config)}
    rest = {name: value for name, value in params.items() if name not in names}
    if config.encoder_layers:
        rest["encoder"] = unstack(params["encoder"], encoder_part(config), free=free)
    layers: list[Params] = [None] * config.num_layers
    for path, numbers in _slots(config).items():
        leaves, treedef = jax.tree.flatten(_at(params, path))
        taken: list[list[Any]] = [[] for _ in numbers]
        for leaf in leaves:
            for i, pieces in enumerate(taken):
                pieces.append(leaf[i])
            if free and isinstance(leaf, jax.Array):
                jax.block_until_ready([pieces[-1] for pieces in taken])
                leaf.delete()
        for number, pieces in zip(numbers, taken, strict=True):
            layers[number] = jax.tree.unflatten(treedef, pieces)
    return rest | {f"layers_{i}": layer for i, layer in enumerate(layers)}


def stack(params: Params, config: ModelConfig) -> Params:
    """The inverse of `unstack`."""
    stacked = {name: value for name, value in params.items() if not name.startswith("layers_")}
    if config.encoder_layers:
        stacked["encoder"] = stack(params["encoder"], encoder_part(config))
    for path, numbers in _slots(config).items():
        inner = stacked
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"layers_{i}"] for i in numbers))
    return stacked


def _slots(config: ModelConfig) -> dict[tuple[str, ...], list[int]]:
    """The numbers of the layers that lie in each stack."""
    slots: dict[tuple[str, ...], list[int]] = {}
    for number, place in enumerate(places(config)):
        slots.setdefault(place.path, []).append(number)
    return slots


def _at(tree: Params, path: Sequence[str]) -> Params:
    for name in path:
        tree = tree[name]
    return tree


def count(config: ModelConfig) -> tuple[int, int]:
    """The parameters of a model, and those that multiply a token's activations: no norms, biases or tables that are
    looked up, and of the experts the share that a token is sent to."""
    total = multiplying = 0
    tied = config.tie_embeddings and config.head is None
    tied &= config.architecture != "encoder" or "masked_lm" in config.encoder_heads
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(build(config))):
        names = [key.key for key in path]
        total += leaf.size
        if names[-1] == "embedding":
            multiplying += leaf.size if tied else 0
        elif names[-1] not in ("scale", "position", "token_type") and not names[-1].endswith("bias"):
            sparse = names[-2:-1] == ["experts"] and names[-1] != "router"
            multiplying += leaf.size * config.experts.per_token // config.experts.count if sparse else leaf.size
    return total, multiplying
