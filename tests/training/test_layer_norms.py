from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.models import Execution, ModelConfig
from llm_jax.models.facts import Experts
from llm_jax.training import layer_norms
from tests.training.common import MODEL

# Two periods of a local and a global layer, and one local layer that is left over; the first layer's mlp is dense.
PATTERNED = dataclasses.replace(MODEL, num_layers=5, attention_pattern=("local", "global"), sliding_window=8)
MIXED = dataclasses.replace(MODEL, num_layers=3, mlp_pattern=("dense", "experts", "experts"),
                            experts=Experts(count=4, per_token=2, mlp_dim=16))


def trees(config: ModelConfig, scan: bool):
    """Three trees of random numbers in the layout of the parameters, on the host."""
    model = models.build(config, Execution(scan_layers=scan))
    rng = np.random.default_rng(0)
    shapes = models.abstract_params(model)
    return model, [jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes) for _ in range(3)]


@pytest.mark.parametrize("config", [MODEL, PATTERNED, MIXED], ids=["plain", "patterned", "experts"])
@pytest.mark.parametrize("scan", [True, False], ids=["stacked", "unrolled"])
def test_norms_of_each_layer_are_those_of_its_own_weights(config, scan):
    """Against NumPy, layer by layer, in the per-layer layout."""
    model, (grads, updates, params) = trees(config, scan)
    measured = jax.device_get(layer_norms.measure(grads, updates, params, models.logical_axes(model)))
    found = layer_norms.by_layer(measured, config)
    split = [models.unstack(tree, config) if scan else tree for tree in (grads, updates, params)]
    for layer in range(config.num_layers):
        for part in ("attention", "mlp"):
            norms = [norm(tree[f"layers_{layer}"], part) for tree in split]
            np.testing.assert_allclose(found["gradient_norm"][part][layer], norms[0], rtol=1e-4)
            np.testing.assert_allclose(found["update_ratio"][part][layer], norms[1] / norms[2], rtol=1e-4)
    embed = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(grads["embed"])))
    np.testing.assert_allclose(found["gradient_norm"]["embed"], embed, rtol=1e-4)
    whole = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(params)))
    np.testing.assert_allclose(layer_norms.total(measured["weight"]), whole, rtol=1e-5)
    assert all(len(found["gradient_norm"][part]) == config.num_layers for part in ("attention", "mlp"))


def norm(layer, part: str) -> float:
    """Of a layer's half, its norms included; whatever is not attention is the mlp's."""
    halves = [name.startswith("attention") == (part == "attention") for name in layer]
    chosen = [value for value, is_in in zip(layer.values(), halves, strict=True) if is_in]
    return float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(chosen))))
