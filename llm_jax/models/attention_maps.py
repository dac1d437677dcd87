"""Attention weights to look at: how much each token of a row takes from each token before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.kernels.attention import DenseContext, attention
from llm_jax.models.config import ModelConfig

Array = jax.Array
MAPS = "attention_maps"


def keep_map(module: nn.Module, q_BTHK: Array, k_BSGK: Array, context: Any, **options: Any) -> None:
    """Called by attention modules: keeps their weights [B, T, H, S] if `apply` was asked for the collection MAPS.

    Attention to values that are the rows of the unit matrix gives the weights themselves, whatever masks, windows and
    caps are in force.
    """
    if not module.is_mutable_collection(MAPS) or module.is_initializing() or not isinstance(context, DenseContext):
        return
    S, G = k_BSGK.shape[1:3]
    unit_BSGS = jnp.broadcast_to(jnp.eye(S, dtype=jnp.float32)[None, :, None], (k_BSGK.shape[0], S, G, S))
    weights_BTHS, _ = attention(q_BTHK.astype(jnp.float32), k_BSGK.astype(jnp.float32), unit_BSGS,
                                dataclasses.replace(context, backend="dense"), **options)
    module.sow(MAPS, "weights", weights_BTHS)


def attention_maps(params: Any, tokens_T: Array, config: ModelConfig, layers: Sequence[int],
                   dtype: str = "float32") -> dict[int, Array]:
    """The weights of some layers of a decoder on one row, to be jitted.

    Args:
      params: stacked parameters.
      tokens_T: int32, one document.
      config: the model's.
      layers: which; those above the highest are not computed.
      dtype: of activations.

    Returns:
      Layer → float32 [H, T, T]; what query t takes from key s is at [h, t, s].
    """
    from llm_jax.models.config import Execution
    from llm_jax.models.parameters import build, unstack

    model = build(config, Execution(dtype=dtype, scan_layers=False, rope_context=tokens_T.shape[0]))
    _, kept = model.apply({"params": unstack(params, config)}, tokens_T[None], mutable=[MAPS])
    return {layer: jnp.swapaxes(kept[MAPS][f"layers_{layer}"]["attention"]["weights"][0][0], 0, 1) for layer in layers}
