"""Eight virtual devices, fsdp 4 × tensor 2, against one: the same numbers, an eighth of the bytes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.parallel import rules
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
from llm_jax.training.state import init_state, num_bytes_per_device, state_shardings
from llm_jax.training.step import gradients, make_train_step
from tests.training.common import LENGTH, MODEL, ROWS

SHARDED = MeshConfig(fsdp=4, tensor=2)
CONFIG = OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1)
DECODER = models.Decoder(MODEL)


def batch(vocab: int = 4) -> dict[str, np.ndarray]:
    """Rows of several lengths with two documents each.

    Of four different tokens: among hundreds, float32 rounding alone (the same rows in another order on one device)
    comes to 1e-6 of a gradient's largest entry; among four it stays at half of that.

    Args:
      vocab: how many different tokens.
    """
    random = np.random.default_rng(0)
    lengths = np.arange(LENGTH) < np.arange(LENGTH, LENGTH - ROWS, -1)[:, None]
    segments = (1 + (np.arange(LENGTH) >= 11)) * lengths
    positions = np.where(np.arange(LENGTH) >= 11, np.arange(LENGTH) - 11, np.arange(LENGTH)) * lengths
    return {"tokens": random.integers(0, vocab, (ROWS, LENGTH)).astype(np.int32) * lengths,
            "segment_ids": segments.astype(np.int32), "positions": positions.astype(np.int32)}


def on_mesh(config: MeshConfig):
    mesh = make_mesh(config)
    optimizer = make_optimizer(CONFIG, 4, decay_mask(models.logical_axes(DECODER)))
    shardings = state_shardings(DECODER, optimizer, mesh)
    return mesh, optimizer, shardings, init_state(DECODER, optimizer, 0, shardings)


def loss_and_gradients(mesh, shardings, params, vocab=4):
    def compute(params, rows):
        with models.activation_rules(rules.ACTIVATIONS):
            grads, sums = gradients(DECODER, params, rows, None, mesh=mesh, gradient_shardings=shardings.params)
        return grads, sums["loss_sum"] / sums["weight_sum"]

    with jax.set_mesh(mesh):
        rows = jax.device_put(batch(vocab), rules.batch_sharding(mesh))
        return jax.jit(compute, out_shardings=(shardings.params, None))(params, rows)


@pytest.fixture(scope="module")
def single():
    mesh, _, shardings, state = on_mesh(MeshConfig())
    return state, loss_and_gradients(mesh, shardings, state.params)


@pytest.fixture(scope="module")
def sharded():
    mesh, optimizer, shardings, state = on_mesh(SHARDED)
    return mesh, optimizer, shardings, state, loss_and_gradients(mesh, shardings, state.params)


def assert_close(one, other, tolerance=1e-6):
    one, other = jax.device_get((one, other))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(a).max(), err_msg=jax.tree_util.keystr(path))


def test_parameters_are_those_of_one_device(single, sharded):
    assert_close(single[0].params, sharded[3].params)


def test_loss_and_gradients_are_those_of_one_device(single, sharded):
    (grads, loss), (sharded_grads, sharded_loss) = single[1], sharded[4]
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    assert_close(grads, sharded_grads)


def test_so_are_those_of_a_batch_of_all_tokens(sharded):
    """Logits are float32 whatever the dtype, so float64 can't show it; over five seeds rounding came to 1.7e-6."""
    mesh, _, shardings, state, _ = sharded
    one, _, one_shardings, one_state = on_mesh(MeshConfig())
    grads, loss = loss_and_gradients(one, one_shardings, one_state.params, MODEL.vocab_size)
    sharded_grads, sharded_loss = loss_and_gradients(mesh, shardings, state.params, MODEL.vocab_size)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    assert_close(grads, sharded_grads, tolerance=4e-6)


def promised_bytes() -> int:
    """float32 bytes of all parameters on one of 4 × 2 devices, counted by hand: matrices by eight, norms whole."""
    c = MODEL
    attention = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    matrices = c.num_layers * (attention + 3 * c.embed_dim * c.mlp_dim) + 2 * c.vocab_size * c.embed_dim
    norms = (2 * c.num_layers + 1) * c.embed_dim
    return 4 * (matrices // 8 + norms)


def moments(state):
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    return adam.mu, adam.nu


def test_bytes_per_device_are_as_promised_before_and_after_a_step(sharded):
    mesh, optimizer, shardings, state, (grads, _) = sharded
    assert num_bytes_per_device(grads) == promised_bytes()
    step = make_train_step(DECODER, optimizer, learning_rate_schedule(CONFIG, 4), mesh, shardings)
    copy = jax.tree.map(lambda x: jax.device_put(np.asarray(x), x.sharding), state)
    after, _ = step(copy, jax.device_put(batch(), rules.batch_sharding(mesh)))
    for one in (state, after):
        mu, nu = moments(one)
        assert [num_bytes_per_device(tree) for tree in (one.params, mu, nu)] == [promised_bytes()] * 3


def test_a_rule_table_that_does_nothing_would_be_noticed():
    nothing = rules.ShardingRules(dict.fromkeys(rules.RULES))
    mesh = make_mesh(SHARDED)
    optimizer = make_optimizer(CONFIG, 4)
    shardings = state_shardings(DECODER, optimizer, mesh, nothing)
    params = jax.tree.map(lambda leaf, sharding: jax.device_put(np.zeros(leaf.shape, leaf.dtype), sharding),
                          models.abstract_params(DECODER), shardings.params)
    assert num_bytes_per_device(params) == 4 * MODEL.num_params() > 7 * promised_bytes()
