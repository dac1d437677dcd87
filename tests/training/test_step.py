from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.objectives.next_token import next_token_sums
from llm_jax.parallel import rules
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
from llm_jax.training.state import init_state, state_shardings
from llm_jax.training.step import gradients, make_train_step, microbatches
from tests.models.drawn import drawn_params
from tests.training.common import LENGTH, MODEL, ROWS, VOCAB

DECODER = models.Decoder(MODEL)
CONFIG = OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=1)


def rows(seed: int) -> dict[str, np.ndarray]:
    """Rows of very different lengths, so that a mean of means would be wrong: one of four microbatches has nothing to
    predict."""
    random = np.random.default_rng(seed)
    filled = np.arange(LENGTH) < np.array([32, 3, 20, 0, 32, 15, 16, 1])[:, None]
    return {"tokens": (random.integers(1, VOCAB, (ROWS, LENGTH)) * filled).astype(np.int32),
            "segment_ids": filled.astype(np.int32),
            "positions": (np.arange(LENGTH) * filled).astype(np.int32)}


@pytest.fixture(scope="module")
def setup():
    mesh = make_mesh(MeshConfig())
    optimizer = make_optimizer(CONFIG, 10, decay_mask(models.logical_axes(DECODER)))
    shardings = state_shardings(DECODER, optimizer, mesh)
    step = make_train_step(DECODER, optimizer, learning_rate_schedule(CONFIG, 10), mesh, shardings)
    state = jax.device_get(init_state(DECODER, optimizer, 3, shardings))
    return mesh, shardings, step, lambda: jax.device_put(state, shardings)


def test_microbatches_hold_every_row_once_and_stay_on_their_devices():
    x = np.arange(8)[:, None]
    cut = np.asarray(microbatches({"x": jnp.asarray(x)}, 2)["x"])[..., 0]
    # Two devices hold rows 0-3 and 4-7: each microbatch has two rows of either, in that order.
    np.testing.assert_array_equal(cut, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_a_loss_does_not_depend_on_the_length_of_other_rows_once_the_rope_context_is_fixed():
    scaling = models.RopeScaling("longrope", 4.0, 16, short_factors=(1.0,) * 4, long_factors=(3.0,) * 4)
    config = dataclasses.replace(MODEL, num_layers=1, rope_scaling=scaling)
    params, batch = drawn_params(config), rows(0)  # some rows are longer than 16 tokens, some shorter
    order = np.argsort((batch["segment_ids"] > 0).sum(axis=1), kind="stable")
    short_first = {name: value[order] for name, value in batch.items()}

    def loss(rope_context, rows):
        model = models.Decoder(config, models.Execution(rope_context=rope_context))
        return float(jax.jit(lambda p, b: next_token_sums(model.apply, p, b)[0])(
            params, {name: value[rows] for name, value in short_first.items()}))

    halves = slice(0, 4), slice(4, 8)
    assert abs(sum(loss(LENGTH, h) for h in halves) / loss(LENGTH, slice(8)) - 1) < 1e-6
    assert abs(sum(loss(None, h) for h in halves) / loss(None, slice(8)) - 1) > 1e-4


def test_accumulated_gradients_equal_those_of_the_large_batch(setup):
    _, _, _, state = setup
    params, batch = state().params, rows(0)

    def compute(accumulation):
        both = jax.jit(lambda p, b, scale: gradients(DECODER, p, b, None, z_loss=1e-3, accumulation=accumulation,
                                                     loss_scale=scale))
        return [both(params, batch, jnp.float32(scale)) for scale in (1.0, 2.0**20)]

    ((whole, whole_sums), _), ((parts, part_sums), (scaled, _)) = compute(1), compute(4)
    jax.tree.map(np.testing.assert_array_equal, scaled, parts)  # a power of two changes no bit
    for name, value in whole_sums.items():
        np.testing.assert_allclose(part_sums[name], value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(a).max())


def test_steps_lower_the_loss_and_report_what_they_did(setup):
    mesh, _, step, new = setup
    state, batch = new(), jax.device_put(rows(1), rules.batch_sharding(mesh))
    losses = []
    for number in range(5):
        before = state
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        assert int(state.step) == number + 1 and int(metrics["first_bad_step"]) == -1
    assert losses[-1] < losses[0] - 0.5
    assert before.params["embed"]["embedding"].is_deleted(), "the state was not donated"
    assert float(metrics["tokens"]) == rows(1)["segment_ids"].sum()
    leaves = jax.tree.leaves(jax.device_get(state.params))
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))
    np.testing.assert_allclose(float(metrics["param_norm"]), norm, rtol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_and_is_remembered(setup):
    mesh, shardings, step, new = setup
    batch = jax.device_put(rows(2), rules.batch_sharding(mesh))
    state, _ = step(new(), batch)
    host = jax.device_get(state)
    poisoned = dict(host.params, final_norm={"scale": np.full_like(host.params["final_norm"]["scale"], np.nan)})
    state = jax.device_put(dataclasses.replace(host, params=poisoned), shardings)
    for _ in range(2):
        state, metrics = step(state, batch)
        assert int(metrics["first_bad_step"]) == 1 and int(state.step) == 1
    # Even a batch that is finite again is not applied: the run stands still until someone looks.
    mended = dataclasses.replace(jax.device_get(state), params=host.params)
    state, metrics = step(jax.device_put(mended, shardings), batch)
    assert np.isfinite(metrics["loss"]) and int(metrics["first_bad_step"]) == 1
    after = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (host.params, host.opt_state))


def test_rows_have_to_divide_among_devices_and_microbatches():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    rules.check_rows(16, LENGTH, mesh, 4)
    with pytest.raises(UserError, match="12 rows .* 4 devices .* 2 microbatches; choose a multiple of 8, such as 16"):
        rules.check_rows(12, LENGTH, mesh, 2)
