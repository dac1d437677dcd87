from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import models
from llm_jax.checkpoints import Checkpoints
from llm_jax.data.loader import DataConfig, TrainLoader
from llm_jax.errors import UserError
from llm_jax.models.layers import linear
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.training import loop
from llm_jax.training import step as step_module
from llm_jax.training.guard import APPLIED, NOT_FINITE, OVERFLOW
from llm_jax.training.low_bit import LowBit
from llm_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
from llm_jax.training.precision import LossScale, PrecisionConfig
from llm_jax.training.state import TrainState, init_state, new_state, state_shardings
from llm_jax.training.step import gradients, make_train_step
from tests.models.drawn import drawn_params
from tests.training.common import LENGTH, MODEL, ROWS, settings
from tests.training.test_step import rows

STEPS = 30
CONFIG = OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=4)
# The scale of the first step is more than float16 can take, and it grows soon.
SCALED = PrecisionConfig(loss_scale=2.0**26, max_loss_scale=2.0**40, growth_interval=3)


def make(dtype: str = "float32", precision: PrecisionConfig = PrecisionConfig()):  # noqa: B008 (frozen)
    """A compiled step, and what makes a new state for it."""
    model = models.Decoder(MODEL, models.Execution(dtype=dtype))
    mesh = make_mesh(MeshConfig())
    optimizer = make_optimizer(CONFIG, STEPS, decay_mask(models.logical_axes(model)))
    shardings = state_shardings(model, optimizer, mesh)
    step = make_train_step(model, optimizer, learning_rate_schedule(CONFIG, STEPS), mesh, shardings,
                           precision=precision)
    return step, lambda: init_state(model, optimizer, 3, shardings, precision=precision)


@pytest.fixture(scope="module")
def batches(data_dir):
    loader = TrainLoader(DataConfig(data_dir, LENGTH, ROWS, prefetch=0))
    batches = [next(loader) for _ in range(STEPS)]
    loader.close()
    return batches


@pytest.fixture(scope="module")
def half():
    return make("float16", SCALED)


def losses(step, state, batches) -> tuple[np.ndarray, TrainState]:
    found = []
    for batch in batches:
        state, metrics = step(state, batch)
        found.append(metrics["loss"])
    return np.array([float(loss) for loss in found]), state


@pytest.fixture(scope="module")
def plain_step():
    return make()


@pytest.fixture(scope="module")
def plain(plain_step, batches):
    """The losses of a float32 run, and the state that it ends with."""
    step, new = plain_step
    return losses(step, new(), batches)


def test_the_scale_halves_at_an_overflow_and_grows_after_enough_good_steps():
    config = PrecisionConfig(loss_scale=8.0, growth_interval=2, min_loss_scale=2.0, max_loss_scale=16.0)
    scale, values = LossScale.new(config), []
    # good, dropped for another reason, or overflow: a step dropped for another reason neither counts nor resets.
    for event in "oggdgogggggooooo":
        scale = scale.after(config, jnp.asarray(event == "g"), jnp.asarray(event == "o"))
        values.append(float(scale.value))
    assert values == [4, 4, 8, 8, 8, 4, 4, 8, 8, 16, 16, 8, 4, 2, 2, 2] and int(scale.overflows) == 7


def test_an_overflow_drops_the_step_and_halves_the_scale_until_it_fits(half, batches):
    step, new = half
    state, outcomes, scales, schedule = new(), [], [], learning_rate_schedule(CONFIG, STEPS)
    before, applied = jax.device_get(state), 0
    for number, batch in enumerate(batches[:16], start=1):
        state, metrics = step(state, batch)
        after, outcome = jax.device_get(state), int(metrics["outcome"])
        outcomes.append(outcome)
        scales.append(float(metrics["loss_scale"]))
        assert scales[-1] == float(before.scale.value)
        np.testing.assert_allclose(metrics["learning_rate"], schedule(applied), rtol=1e-6)
        same = jax.tree.map(np.array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
        if outcome == OVERFLOW:
            assert all(jax.tree.leaves(same)) and float(after.scale.value) == float(before.scale.value) / 2
            assert np.isfinite(float(metrics["loss"])), "only the gradient overflowed"
        else:
            assert outcome == APPLIED and not all(jax.tree.leaves(same[0]))
            applied += 1
        assert int(after.step) == number and int(after.first_bad_step) == -1
        assert int(after.updates) == applied and int(metrics["overflow_steps"]) == number - applied
        before = after
    first = outcomes.index(APPLIED)
    assert first >= 4 and outcomes[:first] == [OVERFLOW] * first and outcomes[first:first + 3] == [APPLIED] * 3
    assert scales[:first + 4] == [2.0**(26 - n) for n in range(first)] + [scales[first]] * 3 + [2 * scales[first]]


def test_at_the_least_scale_it_is_not_the_scales_fault(monkeypatch):
    """Of a step whose gradient is not finite whatever the scale."""
    model = models.Decoder(MODEL, models.Execution(dtype="float16"))
    optimizer = make_optimizer(CONFIG, STEPS)
    schedule = learning_rate_schedule(CONFIG, STEPS)

    def overflowing(model, params, batch, rng, **options):
        sums = {"loss_sum": jnp.float32(2), "z_loss_sum": jnp.float32(0), "weight_sum": jnp.float32(1)}
        return jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), params), sums

    monkeypatch.setattr(step_module, "gradients", overflowing)
    precision = PrecisionConfig(loss_scale=4.0, min_loss_scale=2.0)
    step = jax.jit(lambda state: step_module.update(model, optimizer, schedule, state, rows(0), precision=precision))
    state = new_state(model, optimizer, jax.random.key_data(jax.random.key(0)), drawn_params(MODEL), precision)
    state, metrics = step(state)
    assert int(metrics["outcome"]) == OVERFLOW and float(state.scale.value) == 2.0 and int(state.first_bad_step) == -1
    state, metrics = step(state)
    assert int(metrics["outcome"]) == NOT_FINITE and float(state.scale.value) == 2.0 and int(state.first_bad_step) == 1


def test_float16_follows_float32(half, batches, plain):
    step, new = half
    state = new()
    usual = dataclasses.replace(LossScale.new(PrecisionConfig()), good_steps=jnp.int32(-STEPS))  # it need not grow here
    state = dataclasses.replace(state, scale=usual)
    found, _ = losses(step, state, batches)
    assert plain[0][0] - plain[0][-1] > 1.0, "a run that learns nothing follows everything"
    # float16 rounds to 5e-4; over 30 steps of Adam at 1e-2 that grows to a few hundredths at most.
    np.testing.assert_allclose(found, plain[0], atol=0.03)


def test_bfloat16_follows_float32_without_a_scale(batches, plain):
    step, new = make("bfloat16")
    found, state = losses(step, new(), batches)
    # It rounds to 4e-3, eight times as coarsely as float16.
    np.testing.assert_allclose(found, plain[0], atol=0.06)
    assert np.abs(found - plain[0]).max() > 1e-4, "nothing was rounded"
    assert int(state.updates) == STEPS and float(state.scale.value) == float(new().scale.value)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.opt_state))} == {"float32", "int32"}


def test_a_resumed_run_keeps_its_scale(data_dir, tmp_path):
    """Ten steps, some of them overflows, are four and six: the same bits, the scale among them."""
    optimizer = dataclasses.replace(CONFIG, decay_steps=STEPS)
    common = dict(optimizer=optimizer, execution=models.Execution(dtype="float16"), log_every=1, eval_batches=1,
                  precision=SCALED)
    for folder, steps in (("whole", 10), ("parts", 4), ("parts", 10)):
        metrics = loop.train(**settings(tmp_path / folder, data_dir, num_steps=steps, checkpoint_every=4, **common))
    found = []
    for folder in ("whole", "parts"):
        with Checkpoints(tmp_path / folder / "checkpoints", read_only=True) as checkpoints:
            found.append(checkpoints.restore_params())
        extra = json.loads((tmp_path / folder / "checkpoints" / "10" / "extra" / "metadata").read_text())
        lines = (tmp_path / folder / "logs" / "metrics.jsonl").read_text().splitlines()
        scales = [row["loss_scale"] for row in map(json.loads, lines) if row["kind"] == "train"]
        found.append((extra["state"], scales))
    jax.tree.map(np.testing.assert_array_equal, found[0], found[2])
    assert found[1] == found[3]
    scales = found[1][1]
    assert scales[:3] == [2.0**26, 2.0**25, 2.0**24] and len(scales) == 10
    assert metrics["overflow_steps"] == found[1][0]["scale"]["overflows"] >= 3
    events = [json.loads(line) for line in (tmp_path / "parts" / "logs" / "events.jsonl").read_text().splitlines()]
    assert [e["kind"] for e in events] == ["overflow"] * metrics["overflow_steps"]
    assert [e["step"] for e in events][:3] == [1, 2, 3] and events[0]["loss_scale"] == 2.0**26
    assert events[0]["documents"] and events[0]["action"] == "skipped"


def test_a_checkpoint_without_a_scale_is_restored_with_the_first_one():
    saved = {"params": {}, "opt_state": {}, "step": jnp.asarray(7), "rng": jnp.zeros(2, jnp.uint32)}
    state = TrainState.from_checkpoint(saved, None, PrecisionConfig(loss_scale=4.0))
    assert float(state.scale.value) == 4.0 and int(state.updates) == 7
    state = dataclasses.replace(state, scale=LossScale(jnp.float32(0.1), jnp.int32(3), jnp.int32(2)))
    again = TrainState.from_checkpoint(saved, json.loads(json.dumps(state.facts())))
    jax.tree.map(np.testing.assert_array_equal, state, again)


@pytest.mark.parametrize("changes", [{"scaling": "sometimes"}, {"matmul": "int4"}, {"growth_interval": 0},
                                     {"backoff": 1.0}, {"loss_scale": 2.0**60}, {"min_loss_scale": 0.0}])
def test_settings_that_make_no_sense_are_named(changes):
    with pytest.raises(UserError, match=f"PrecisionConfig.{next(iter(changes))}"):
        PrecisionConfig(**changes)


def rounded(x, axes):
    """int8 by hand in float64: whole numbers, and the size of one along `axes` together."""
    step = np.max(np.abs(x), axis=axes, keepdims=True) / 127
    return np.round(x / step), step


def test_int8_products_equal_those_in_float64():
    random = np.random.default_rng(0)
    x, w, g = (random.normal(size=shape) for shape in ((2, 3, 4, 5), (4, 5, 6, 7), (2, 3, 6, 7)))
    y, back = jax.vjp(lambda x, w: linear(x, LowBit(w, "int8"), 2), jnp.float32(x), jnp.float32(w))
    dx, dw = back(jnp.float32(g))
    (qx, sx), (qw, sw) = rounded(x, (2, 3)), rounded(w, (0, 1))
    np.testing.assert_allclose(y, np.einsum("btij,ijhk->bthk", qx * sx, qw * sw), rtol=1e-5, atol=1e-5)
    # A gradient is rounded with the other's scale in it, along what its own product does not sum over.
    by_row, row_step = rounded(g * sw[0, 0], (2, 3))
    np.testing.assert_allclose(dx, np.einsum("bthk,ijhk->btij", by_row * row_step, qw), rtol=1e-5, atol=1e-5)
    by_column, column_step = rounded(g * sx, (0, 1))
    np.testing.assert_allclose(dw, np.einsum("btij,bthk->ijhk", qx, by_column * column_step), rtol=1e-5, atol=1e-5)
    assert np.abs(y - np.einsum("btij,ijhk->bthk", x, w)).max() > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_is_not_finite_stays_so(kind):
    x = jnp.ones((2, 4)).at[1, 2].set(jnp.nan)
    y = linear(x, LowBit(jnp.ones((4, 3)), kind))
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()
    back = jax.vjp(lambda x: linear(x, LowBit(jnp.ones((4, 3)), kind)), jnp.ones((2, 4)))[1]
    assert not np.isfinite(back(jnp.ones((2, 3)).at[0, 0].set(jnp.inf))[0][0]).any()


@pytest.fixture(scope="module", params=["int8", "fp8"])
def low(request):
    """A kind of product, and a compiled step that multiplies so."""
    return request.param, *make(precision=PrecisionConfig(matmul=request.param))


def test_low_bit_training_follows_float32(low, batches, plain):
    _, step, new = low
    found, _ = losses(step, new(), batches)
    # Batches of 8 × 32 tokens differ by more than a tenth of a nat among themselves; the run falls by more than one.
    np.testing.assert_allclose(found, plain[0], atol=0.1)
    assert np.abs(found - plain[0]).max() > 1e-4, "nothing was rounded"


def test_low_bit_gradients_point_where_float32s_do(low, batches, plain, plain_step):
    """Read from the first moments after a step from trained parameters: a tenth of the gradient, clipped as a whole."""
    _, step, new = low

    def moments(step, new):
        state = dataclasses.replace(new(), params=jax.tree.map(jnp.copy, plain[1].params))
        return optax.tree.get(step(state, batches[0])[0].opt_state, "mu")

    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(moments(step, new)),
                            jax.tree.leaves(moments(*plain_step)), strict=True):
        a, b = np.ravel(a), np.ravel(b)
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99, path
        assert not np.array_equal(a, b), path


@pytest.mark.parametrize("kind, dtype, sums", [("int8", "i8", "i32"), ("fp8", "f8E4M3FN", "f32")])
def test_the_program_multiplies_in_low_bits(kind, dtype, sums, batches):
    """Seven projections in the one block that is scanned, each of three products; nothing else."""
    model = models.Decoder(MODEL)
    compute = jax.jit(lambda p: gradients(model, p, batches[0], None, matmul=kind)[0])
    lowered = compute.lower(models.abstract_params(model))
    dots = [re.findall(r"tensor<(?:\d+x)*(\w+)>", line.rsplit(":", 1)[1]) for line in lowered.as_text().splitlines()
            if "stablehlo.dot_general" in line]
    assert [dot for dot in dots if dtype in dot[:2]] == [[dtype, dtype, sums]] * 21
    assert len(dots) > 21, "attention and logits are multiplied as they were"
