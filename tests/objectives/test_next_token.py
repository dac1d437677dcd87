from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.objectives.next_token import next_token_loss, next_token_sums, targets_and_weights

TOKENS = np.array([[5, 6, 7, 8, 9, 0], [1, 2, 3, 4, 5, 6]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)
WEIGHTS = np.array([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0]], np.float32)


def table_model(variables, tokens, segment_ids=None, positions=None):
    """Logits that depend on the current token alone: row `token` of a table."""
    return variables["params"][tokens]


def in_float64(table, tokens, targets, weights, z_loss):
    logits = np.asarray(table, np.float64)[tokens]
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (nll * weights).sum(), (z_loss * log_z**2 * weights).sum()


def test_targets_stay_within_documents_and_skip_padding():
    targets, weights = targets_and_weights({"tokens": jnp.asarray(TOKENS), "segment_ids": jnp.asarray(SEGMENTS)})
    np.testing.assert_array_equal(weights, WEIGHTS)
    np.testing.assert_array_equal(targets[:, :-1], TOKENS[:, 1:])


def test_uniform_logits_cost_log_of_the_vocabulary():
    batch = {"tokens": jnp.asarray(TOKENS), "segment_ids": jnp.asarray(SEGMENTS)}
    loss, sums = next_token_loss(table_model, jnp.zeros((10, 10)), batch, None)
    np.testing.assert_allclose(loss, np.log(10), rtol=1e-6)
    assert sums["weight_sum"] == 8


def test_loss_and_z_loss_equal_float64_numpy():
    table = np.random.default_rng(0).normal(size=(10, 10)).astype(np.float32) * 3
    batch = {"tokens": jnp.asarray(TOKENS), "segment_ids": jnp.asarray(SEGMENTS)}
    total, sums = next_token_sums(table_model, jnp.asarray(table), batch, None, z_loss=0.01)
    loss, z = in_float64(table, TOKENS, np.pad(TOKENS[:, 1:], ((0, 0), (0, 1))), WEIGHTS, 0.01)
    np.testing.assert_allclose([total, sums["loss_sum"], sums["z_loss_sum"]], [loss + z, loss, z], rtol=1e-5)


def test_given_targets_and_weights_are_used():
    table = np.random.default_rng(1).normal(size=(10, 10)).astype(np.float32)
    targets, weights = TOKENS[::-1].copy(), np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 6)
    batch = {"tokens": jnp.asarray(TOKENS), "targets": jnp.asarray(targets), "weights": jnp.asarray(weights)}
    mean, sums = next_token_loss(table_model, jnp.asarray(table), batch, None)
    loss, _ = in_float64(table, TOKENS, targets, weights, 0.0)
    np.testing.assert_allclose(mean, loss / weights.sum(), rtol=1e-5)


def test_bfloat16_logits_are_summed_in_float32():
    table = (np.random.default_rng(2).normal(size=(10, 10)) * 4).astype(jnp.bfloat16)
    batch = {"tokens": jnp.asarray(TOKENS), "segment_ids": jnp.asarray(SEGMENTS)}
    total, _ = next_token_sums(table_model, jnp.asarray(table), batch, None)
    loss, _ = in_float64(table.astype(np.float32), TOKENS, np.pad(TOKENS[:, 1:], ((0, 0), (0, 1))), WEIGHTS, 0.0)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, loss, rtol=1e-5)


def test_a_batch_of_padding_alone_costs_nothing_and_has_no_gradient():
    batch = {"tokens": jnp.zeros((1, 4), jnp.int32), "segment_ids": jnp.zeros((1, 4), jnp.int32)}
    loss, grad = jax.value_and_grad(lambda t: next_token_loss(table_model, t, batch, None)[0])(jnp.ones((10, 10)))
    assert loss == 0 and not np.any(grad)
