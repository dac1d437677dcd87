"""Rotary frequencies of every scaling against transformers' own, and the rotation by property."""

from __future__ import annotations

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.interop.families import config_from_hf
from llm_jax.models import ModelConfig, RopeScaling, rope
from llm_jax.models.rope import frequencies, rotate, rotations

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "rope.npz")
CASES = {case["name"]: case for case in json.loads(str(GOLDEN["cases"]))}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name):
    case = CASES[name]
    config = config_from_hf(case["config"])
    length = case["length"] or 1
    got_k, factor = frequencies(config.rotary_width, config.rope_theta, config.rope_scaling, config.max_context, length)
    np.testing.assert_allclose(got_k, GOLDEN[f"{name}/inv_freq"], rtol=5e-7)
    assert math.isclose(factor, float(GOLDEN[f"{name}/attention_factor"]), rel_tol=1e-6)


def test_the_golden_file_has_every_scaling_on_both_sides_of_its_threshold():
    kinds = {name.split("_")[0] for name in CASES}
    assert kinds == {"linear", "dynamic", "yarn", "llama3", "longrope"}
    for short, long in (("dynamic_at", "dynamic_past"), ("longrope_short", "longrope_long")):
        assert not np.allclose(GOLDEN[f"{short}/inv_freq"], GOLDEN[f"{long}/inv_freq"], rtol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_only_the_distance_matters_and_lengths_stay(interleaved):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 12)), jnp.float32) for _ in range(2))
    config = ModelConfig(vocab_size=4, num_layers=1, embed_dim=12, num_heads=1, num_kv_heads=1, head_dim=12, mlp_dim=4,
                         max_context=64, rotary_dim=8)

    def turned(x, position):
        rotation = rotations(config, jnp.full((1, 1), position), None)["global"]
        return np.asarray(rotate(x, rotation, interleaved))[0, 0, 0]

    products = [turned(q, p + 5) @ turned(k, p) for p in (0, 7, 40)]
    np.testing.assert_allclose(products, products[0], rtol=1e-5)
    assert abs(turned(q, 9) @ turned(k, 0) - products[0]) > 1e-3
    np.testing.assert_allclose(np.linalg.norm(turned(q, 33)), np.linalg.norm(q), rtol=1e-6)
    np.testing.assert_array_equal(turned(q, 33)[8:], q[0, 0, 0, 8:])  # what lies past rotary_dim does not turn


def test_a_server_fixes_what_switches_on_length():
    scaling = RopeScaling("longrope", factor=4.0, original_context=8, short_factors=(1.0, 1.0), long_factors=(2.0, 3.0))
    config = ModelConfig(vocab_size=4, num_layers=1, embed_dim=4, num_heads=1, num_kv_heads=1, head_dim=4, mlp_dim=4,
                         max_context=32, rope_scaling=scaling)
    short, long = jnp.arange(8)[None], jnp.arange(9)[None]
    free = [rotations(config, p, None)["global"][0][0, :8] for p in (short, long)]
    fixed = [rotations(config, p, 32)["global"][0][0, :8] for p in (short, long)]
    assert not np.allclose(*free)
    np.testing.assert_array_equal(*fixed)
    np.testing.assert_array_equal(fixed[0], free[1])


def test_what_a_lone_cpu_makes_in_a_loop_is_what_others_make_at_once(monkeypatch):
    config = ModelConfig(vocab_size=4, num_layers=2, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=4,
                         max_context=64, attention_pattern=("local", "global"), sliding_window=4, local_rope_theta=50.0)
    positions = jnp.asarray([[0, 1, 2, 3, 4], [7, 8, 0, 1, 63]])
    looped = rotations(config, positions, None)
    assert "scan" in str(jax.make_jaxpr(lambda: rotations(config, positions, None))())
    monkeypatch.setattr(rope, "is_lone_cpu", lambda: False)
    at_once = rotations(config, positions, None)
    assert jax.tree.map(jnp.shape, looped) == jax.tree.map(jnp.shape, at_once)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), looped, at_once)
