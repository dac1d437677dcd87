"""A mixture of experts on eight virtual devices with an expert axis, against one device."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.models import Execution, Experts
from llm_jax.objectives.balance import balance_loss
from llm_jax.parallel import rules
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
from llm_jax.training.state import init_state, state_shardings
from llm_jax.training.step import ACTIVATION_RULES, gradients, make_train_step
from tests.parallel.test_sharded_training import assert_close, batch
from tests.training.common import MODEL

MIXTURE = dataclasses.replace(MODEL, mlp_pattern=("experts",), experts=Experts(
    8, 2, 16, scoring="sigmoid", groups=4, groups_kept=2, selection_bias=True, shared_dim=16, balance_weight=0.1))
OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1)
MESHES = [MeshConfig(data=2, expert=4), MeshConfig(fsdp=2, expert=2, tensor=2)]
WAYS = [Execution(), Execution(expert_capacity=1.0)]


def on_mesh(config: MeshConfig, execution: Execution = WAYS[0]):
    model = models.Decoder(MIXTURE, execution)
    mesh = make_mesh(config)
    optimizer = make_optimizer(OPTIMIZER, 4, decay_mask(models.logical_axes(model)))
    shardings = state_shardings(model, optimizer, mesh)
    return model, mesh, optimizer, shardings


def compute(config: MeshConfig, execution: Execution, params):
    """(gradients, loss, the router's sums, the compiled program) of a batch with padding and two documents a row."""
    model, mesh, _, shardings = on_mesh(config, execution)

    def run(params, rows):
        with models.activation_rules(ACTIVATION_RULES):
            grads, sums = gradients(model, params, rows, None, mesh=mesh, param_shardings=shardings.params)
        return grads, sums["loss_sum"] / sums["weight_sum"], sums["router"]

    with jax.set_mesh(mesh):
        rows = jax.device_put(batch(), rules.batch_sharding(mesh))
        placed = jax.device_put(params, shardings.params)
        compiled = jax.jit(run, out_shardings=(shardings.params, None, None)).lower(placed, rows).compile()
        return *compiled(placed, rows), compiled


@pytest.fixture(scope="module")
def params():
    model, _, optimizer, shardings = on_mesh(MeshConfig())
    made = jax.device_get(init_state(model, optimizer, 0, shardings).params)
    # Large enough to leave some experts without a token, and to move tokens between groups.
    bias = np.random.default_rng(1).normal(0, 0.2, (MODEL.num_layers, 8)).astype(np.float32)
    made["layers"]["experts"]["selection_bias"] = bias
    return made


@pytest.fixture(scope="module")
def single(params):
    return {way.expert_capacity: compute(MeshConfig(), way, params) for way in WAYS}


@pytest.mark.parametrize("way", WAYS, ids=["dropless", "capacity"])
@pytest.mark.parametrize("config", MESHES, ids=["data2-expert4", "fsdp2-expert2-tensor2"])
def test_loss_gradients_and_load_are_those_of_one_device(config, way, params, single):
    grads, loss, router, _ = compute(config, way, params)
    one_grads, one_loss, one_router, _ = single[way.expert_capacity]
    np.testing.assert_allclose(loss, one_loss, rtol=1e-6)
    assert_close(one_grads, grads)
    for name in ("assigned", "tokens", "dropped"):
        np.testing.assert_array_equal(router[name], one_router[name], err_msg=name)
    assert (way.expert_capacity is None) == (not np.any(router["dropped"]))
    np.testing.assert_allclose(balance_loss(router), balance_loss(one_router), rtol=1e-6)


def test_each_device_holds_its_own_experts_before_and_after_a_step():
    model, mesh, optimizer, shardings = on_mesh(MESHES[1])
    state = init_state(model, optimizer, 0, shardings)
    step = make_train_step(model, optimizer, learning_rate_schedule(OPTIMIZER, 4), mesh, shardings)
    after, metrics = step(jax.tree.map(lambda x: jax.device_put(np.asarray(x), x.sharding), state),
                          jax.device_put(batch(), rules.batch_sharding(mesh)))
    assert metrics["router_load"].shape == (MODEL.num_layers, 8)
    adam = next(part for part in after.opt_state if hasattr(part, "mu"))
    for tree in (state.params, after.params, adam.mu, adam.nu):
        experts = tree["layers"]["experts"]
        for name, shape in (("gate", (2, 4, 16, 8)), ("up", (2, 4, 16, 8)), ("down", (2, 4, 8, 16))):
            assert {s.data.shape for s in experts[name].addressable_shards} == {shape}
            first = {s.index[1].start for s in experts[name].addressable_shards}
            assert first == {0, 4}, "two devices along the axis, experts 0–3 and 4–7"


def test_no_device_ever_gathers_anothers_experts(single, params):
    """Among the compiled program's arrays there is none with all eight experts' matrices, as there is on one device."""
    gathered = "f32[8,32,16]"  # gate and up of one layer
    *_, compiled = compute(MESHES[0], WAYS[0], params)
    assert gathered not in compiled.as_text() and "f32[2,32,16]" in compiled.as_text()
    assert gathered in single[None][3].as_text()


def test_rows_that_are_not_spread_are_computed_by_all(params):
    """As in a serving step on a mesh: one row, by rules that leave rows whole, and by rules that it does not divide."""
    row = {name: array[:1] for name, array in batch().items()}

    def on(config, batch_axes, transform):
        model, mesh, _, shardings = on_mesh(config)

        def mean_square(params):
            with models.activation_rules({**ACTIVATION_RULES, "batch": batch_axes}):
                logits = model.apply({"params": params}, row["tokens"], row["segment_ids"], row["positions"])
            return (logits**2).mean()

        with jax.set_mesh(mesh):
            return jax.jit(transform(mean_square))(jax.device_put(params, shardings.params))

    one, one_grads = on(MeshConfig(), None, jax.value_and_grad)
    value, grads = on(MESHES[1], None, jax.value_and_grad)
    np.testing.assert_allclose([value, on(MESHES[1], ("fsdp", "expert"), lambda f: f)], one, rtol=1e-6)
    assert_close(one_grads, grads, tolerance=2e-6)


def test_experts_that_do_not_divide_are_named():
    few = dataclasses.replace(MIXTURE, experts=Experts(4, 2, 16))
    model = models.Decoder(few)
    with pytest.raises(UserError, match=r"experts/\w+ .* axis 'experts' of length 4 .* 8 devices of mesh axis expert"):
        rules.shardings(make_mesh(MeshConfig(expert=8)), models.logical_axes(model),
                        shapes=models.abstract_params(model))
