from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
from tests.training.common import MODEL


def test_schedule_by_hand():
    config = OptimizerConfig(peak_learning_rate=1.0, warmup_steps=4, decay_steps=12, end_learning_rate_ratio=0.2)
    rates = [float(learning_rate_schedule(config, 99)(step)) for step in range(14)]
    # Warm-up by quarters; then 0.2 + 0.8 · (1 + cos(π k / 8)) / 2 for k = 1 … 8; then held.
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[5], 0.2 + 0.8 * (2 + 2**0.5) / 4, rtol=1e-6)
    np.testing.assert_allclose(rates[7], 0.6, rtol=1e-6)
    np.testing.assert_allclose(rates[11:], [0.2, 0.2, 0.2], rtol=1e-6)


def test_schedule_without_warmup_and_with_the_run_length():
    config = OptimizerConfig(peak_learning_rate=2.0, warmup_steps=0, end_learning_rate_ratio=0.0)
    schedule = learning_rate_schedule(config, 2)
    np.testing.assert_allclose([float(schedule(0)), float(schedule(1))], [1.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("changes", [{"peak_learning_rate": 0.0}, {"b1": 1.0}, {"eps": 0.0}, {"warmup_steps": -1},
                                     {"end_learning_rate_ratio": 1.5}, {"clip_norm": -1.0}, {"decay_steps": 0}])
def test_out_of_range_settings_are_named(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        OptimizerConfig(**changes)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warmup_steps=100 .* 20 steps"):
        learning_rate_schedule(OptimizerConfig(warmup_steps=100), 20)


def test_decay_skips_norms_and_biases_on_stacked_leaves():
    mask = decay_mask(models.logical_axes(models.Decoder(MODEL)))
    assert mask["layers"]["attention_norm"]["scale"] is False
    assert mask["layers"]["mlp_norm"]["scale"] is False
    assert mask["final_norm"]["scale"] is False
    assert mask["embed"]["embedding"] is True and mask["unembed"] is True
    assert all(mask["layers"]["attention"].values()) and all(mask["layers"]["mlp"].values())
    biases = {"q": {"bias": ("layers", "heads", "head_dim")}, "up_bias": ("mlp", "embed"), "x": ("layers", "mlp")}
    assert not any(jax.tree.leaves(decay_mask(biases)))


def adamw_in_numpy(params, gradients, config, rates, decayed):
    """AdamW in float64 as Loshchilov & Hutter write it (algorithm 2), with gradients clipped by their global norm."""
    first = {name: np.zeros_like(p) for name, p in params.items()}
    second = {name: np.zeros_like(p) for name, p in params.items()}
    for t, (grads, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1.0, config.clip_norm / norm)
            first[name] = config.b1 * first[name] + (1 - config.b1) * g
            second[name] = config.b2 * second[name] + (1 - config.b2) * g**2
            adam = (first[name] / (1 - config.b1**t)) / (np.sqrt(second[name] / (1 - config.b2**t)) + config.eps)
            pull = config.weight_decay * params[name] if decayed[name] else 0.0
            params[name] = params[name] - rate * (adam + pull)
    return params


def test_updates_equal_an_independent_adamw():
    config = OptimizerConfig(peak_learning_rate=0.05, warmup_steps=2, weight_decay=0.3, clip_norm=1.0, eps=1e-6)
    decayed = {"w": True, "scale": False}
    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(3, 4, 5)), "scale": random.normal(size=(3, 4))}
    # Some below the clipping norm, most above it.
    sizes = (0.05, 1, 3, 0.02, 9)
    gradients = [{name: random.normal(size=p.shape) * size for name, p in params.items()} for size in sizes]
    optimizer = make_optimizer(config, 5, decayed)
    schedule = learning_rate_schedule(config, 5)
    ours = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    state = optimizer.init(ours)
    for grads in gradients:
        updates, state = optimizer.update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads), state, ours)
        ours = jax.tree.map(lambda p, u: p + u, ours, updates)
    rates = [float(schedule(step)) for step in range(5)]
    expected = adamw_in_numpy(dict(params), gradients, config, rates, decayed)
    for name in params:
        np.testing.assert_allclose(ours[name], expected[name], rtol=2e-5, atol=2e-6)
