"""The decoder by its properties, and against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.models import Decoder, Execution, ModelConfig
from llm_jax.models.config import REMAT_POLICIES
from tests.models import reference

T = 12


def config(**changes) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 61, "num_layers": 3, "embed_dim": 24, "num_heads": 4, "num_kv_heads": 2,
                          "head_dim": 6, "mlp_dim": 40, "max_context": 64, "rope_theta": 100.0, **changes})


def make_params(c: ModelConfig):
    """Random everywhere: at initialisation norm scales are all one, which would hide a scale that is not applied."""
    params = jax.jit(lambda key: models.init_params(Decoder(c), key))(jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32), params)


@pytest.fixture(scope="module")
def model():
    return Decoder(config())


@pytest.fixture(scope="module")
def params():
    return make_params(config())


@pytest.fixture(scope="module")
def tokens_BT():
    return jax.random.randint(jax.random.key(2), (2, T), 0, 61)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "num_kv_heads": 4}, {"num_kv_heads": 1}])
def test_logits_equal_a_float64_reference(changes, tokens_BT):
    c = config(**changes)
    params = make_params(c)
    logits_BTV = jax.jit(lambda p, t: Decoder(c).apply({"params": p}, t))(params, tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    for row in range(2):
        expected = reference.logits(c, params, tokens_BT[row])
        np.testing.assert_allclose(logits_BTV[row], expected, atol=2e-5 * np.abs(expected).max())


def test_causality_by_gradient_is_exact(model, params, tokens_BT):
    """∂ logits_t / ∂ x_s is exactly 0 for s > t, and not 0 for s ≤ t."""
    embedded = params["embed"]["embedding"]
    table = jnp.concatenate([embedded, jnp.zeros((T, 24))])  # position s reads its own row, so it has its own gradient
    own_rows = 61 + jnp.arange(T)[None]
    wide = Decoder(config(vocab_size=61 + T))
    p = {**params, "embed": {"embedding": table}, "unembed": jnp.pad(params["unembed"], ((0, 0), (0, T)))}

    def position_logits(rows_TD):
        filled = {**p, "embed": {"embedding": table.at[61:].set(rows_TD)}}
        return wide.apply({"params": filled}, own_rows)[0].sum(-1)

    jacobian_TTD = jax.jit(jax.jacrev(position_logits))(embedded[tokens_BT[0]])
    size_TT = np.abs(np.asarray(jacobian_TTD)).sum(-1)
    assert (size_TT[np.triu_indices(T, 1)] == 0).all()
    assert (size_TT[np.tril_indices(T)] > 0).all()


def test_segments_do_not_leak(model, params, tokens_BT):
    """Documents packed in one row give the logits that each gives alone, whatever stands in the padding."""
    apply = jax.jit(lambda t, s, q: model.apply({"params": params}, t, s, q))
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
    packed = apply(tokens_BT[:1], segments, positions)
    alone = jax.jit(lambda t: model.apply({"params": params}, t))
    np.testing.assert_allclose(packed[0, :5], alone(tokens_BT[:1])[0, :5], atol=1e-6)
    np.testing.assert_allclose(packed[0, 5:9], alone(jnp.roll(tokens_BT[:1], -5, axis=1))[0, :4], atol=1e-6)
    other = apply(tokens_BT[:1].at[:, 9:].set(7).at[:, :5].set(3), segments, positions)
    assert (other[0, 5:9] == packed[0, 5:9]).all()
    assert np.isfinite(packed).all()


def test_scan_equals_unrolled(model, params, tokens_BT):
    unrolled = Decoder(config(), Execution(scan_layers=False))
    a = jax.jit(lambda p: model.apply({"params": p}, tokens_BT))(params)
    b = jax.jit(lambda p: unrolled.apply({"params": models.unstack(p, config())}, tokens_BT))(params)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_gradients_of_scan_equal_those_of_unrolled(model, params, tokens_BT):
    def grads(m, p):
        return jax.jit(jax.grad(lambda p: jnp.square(m.apply({"params": p}, tokens_BT)).mean()))(p)

    scanned = grads(model, params)
    layers = models.unstack(params, config())
    unrolled = models.stack(grads(Decoder(config(), Execution(scan_layers=False)), layers), config())
    assert jax.tree.structure(scanned) == jax.tree.structure(unrolled)
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(a).max())


def test_remat_changes_nothing(params, tokens_BT):
    def grads(policy):
        m = Decoder(config(), Execution(remat=policy))
        loss = jax.jit(jax.value_and_grad(lambda p: jnp.square(m.apply({"params": p}, tokens_BT)).mean()))
        return loss(params)

    kept = grads("none")
    for policy in REMAT_POLICIES[1:]:
        for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(grads(policy)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(a).max())


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(params, tokens_BT):
    run = jax.jit(lambda p: Decoder(config(), Execution(dtype="bfloat16")).apply({"params": p}, tokens_BT))
    logits = run(params)
    assert logits.dtype == jnp.float32
    exact = np.asarray(reference.logits(config(), params, tokens_BT[0]))
    error = np.linalg.norm(logits[0] - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 3e-2  # too exact would mean that float32 was used after all


def test_stack_and_unstack_are_inverse_and_free(params):
    copied = jax.tree.map(jnp.copy, params)
    layers = models.unstack(copied, config(), free=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copied["layers"]))
    again = models.stack(layers, config())
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_count_and_axes(tied):
    m = Decoder(config(tie_embeddings=tied))
    shapes = models.abstract_params(m)
    c = m.config
    a_layer = c.embed_dim * (c.head_dim * 2 * (c.num_heads + c.num_kv_heads) + 3 * c.mlp_dim + 2)
    by_hand = c.num_layers * a_layer + c.embed_dim * (c.vocab_size * (1 if tied else 2) + 1)
    assert sum(s.size for s in jax.tree.leaves(shapes)) == c.num_params() == by_hand
    axes = models.logical_axes(m)
    jax.tree.map(lambda s, a: None if len(s.shape) == len(a) else pytest.fail(f"{s.shape} {a}"), shapes, axes)


def test_training_flops_by_hand():
    """One layer, D = H·K = 8, F = 16, V = 32, untied: 4·64 + 3·128 + 256 = 896 multiplying weights."""
    c = ModelConfig(vocab_size=32, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=16,
                    max_context=10)
    # Attention: 2 products · 2 flops · H·K · context / 2 seen on average, backward twice that: 6 · 8 · 10.
    assert c.flops_per_token(10) == 6 * 896 + 6 * 8 * 10
