"""A mixture of experts on eight virtual devices with an expert axis, against one device."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.analysis.hlo import summary
from llm_jax.errors import UserError
from llm_jax.kernels.attention import DenseContext
from llm_jax.models import Execution, Experts, experts
from llm_jax.objectives.balance import balance_loss
from llm_jax.parallel import rules
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.parallel.sequence import row_order
from llm_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
from llm_jax.training.state import init_state, state_shardings
from llm_jax.training.step import gradients, make_train_step
from tests.parallel.test_sharded_training import assert_close, batch
from tests.training.common import LENGTH, MODEL, ROWS

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
        with models.activation_rules(rules.ACTIVATIONS):
            grads, sums = gradients(model, params, rows, None, mesh=mesh, gradient_shardings=shardings.params)
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


@pytest.fixture(scope="module")
def on_many(params):
    """`compute` on a mesh, once for each way."""
    return functools.cache(lambda config, way: compute(config, way, params))


@pytest.mark.parametrize("way", WAYS, ids=["dropless", "capacity"])
@pytest.mark.parametrize("config", MESHES, ids=["data2-expert4", "fsdp2-expert2-tensor2"])
def test_loss_gradients_and_load_are_those_of_one_device(config, way, on_many, single):
    grads, loss, router, _ = on_many(config, way)
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


def exchanged(config: MeshConfig, compiled) -> dict[str, tuple[float, float]]:
    """kind → (executions, bytes) of what devices along the axis of experts exchange."""
    return summary(compiled.as_text(), make_mesh(config).shape).along("expert").collectives


@pytest.mark.parametrize("config", MESHES, ids=["data2-expert4", "fsdp2-expert2-tensor2"])
def test_with_a_capacity_slots_are_exchanged_and_nothing_else(config, on_many):
    """Each layer: slots (C = ⌈1.0 · 2 · 32 / 8⌉ of each of 8 experts for each of a device's rows), their weights and
    the results, and back again their gradients."""
    sent = exchanged(config, on_many(config, WAYS[1])[3])
    rows = ROWS // (config.data * config.fsdp * config.expert)
    slots = rows * 8 * 8
    assert sent["all-to-all"] == (6 * MODEL.num_layers, MODEL.num_layers * 4 * slots * (4 * MODEL.embed_dim + 2))
    assert set(sent) <= {"all-to-all", "all-reduce"}, "and gradients added up"


def test_matrices_are_gathered_and_their_gradients_scattered(on_many):
    """Along fsdp, each layer's gate, up and down (4 experts, half their inner width): twice gathered, never kept."""
    config = MESHES[1]
    program = summary(on_many(config, WAYS[1])[3].as_text(), make_mesh(config).shape).along("fsdp")
    of_experts = [op for op in program.collective_ops if "experts/shard_map" in op.op_name and op.num_bytes > 1024]
    whole = 4 * 4 * MODEL.embed_dim * 16 // 2
    assert sorted((op.kind, op.num_bytes, op.times) for op in of_experts) == sorted(
        [("all-gather", whole, MODEL.num_layers)] * 6 + [("reduce-scatter", whole, MODEL.num_layers)] * 3)


def test_without_one_tokens_are_gathered_and_results_scattered(on_many):
    """Each layer: x and its results' gradient gathered, the results and x's gradient scattered; choices, weights."""
    sent = exchanged(MESHES[0], on_many(MESHES[0], WAYS[0])[3])
    tokens = 4 * (ROWS // 8) * LENGTH  # of four devices, in each half of the mesh
    assert sent["all-gather"] == (4 * MODEL.num_layers, MODEL.num_layers * 4 * tokens * (2 * MODEL.embed_dim + 2 * 2))
    assert sent["reduce-scatter"] == (3 * MODEL.num_layers, MODEL.num_layers * 4 * tokens * (2 * MODEL.embed_dim + 2))
    assert "all-to-all" not in sent


@pytest.mark.parametrize("capacity", [None, 0.6], ids=["dropless", "capacity"])
@pytest.mark.parametrize("config", [MeshConfig(sequence=2, expert=4), MeshConfig(sequence=2, expert=2, tensor=2)],
                         ids=["sequence2-expert4", "sequence2-expert2-tensor2"])
def test_a_layer_of_rows_that_are_cut_among_devices(config, capacity):
    """0.6 of an even share is 5 slots an expert and row, for two devices that share a row."""
    plain = dataclasses.replace(MIXTURE, experts=Experts(8, 2, 16))
    layer = experts.Experts(plain, Execution(expert_capacity=capacity))
    random = np.random.default_rng(0)
    x, factor = random.normal(size=(2, ROWS, LENGTH, MODEL.embed_dim)).astype(np.float32)
    segments = np.broadcast_to(np.arange(LENGTH) < 29, (ROWS, LENGTH)).astype(np.int32)
    weights = nn.meta.unbox(layer.init(jax.random.key(0), x, DenseContext(segments)))
    order = row_order(LENGTH, 2)

    def run(table, order):
        def mean(weights, x):
            with models.activation_rules(table):
                out = layer.apply(weights, x[:, order], DenseContext(segments[:, order]))
            return (out * factor[:, order]).mean(), out

        return jax.jit(jax.grad(mean, (0, 1), has_aux=True))(weights, x)

    with jax.set_mesh(make_mesh(config)):
        grads, out = run({}, np.arange(LENGTH))
        assert_close((grads, out[:, order]), run(rules.ACTIVATIONS, order), tolerance=2e-6)


def test_no_device_ever_gathers_anothers_experts(single, on_many):
    """Among the compiled program's arrays there is none with all eight experts' matrices, as there is on one device."""
    gathered = "f32[8,32,16]"  # gate and up of one layer
    *_, compiled = on_many(MESHES[0], WAYS[0])
    assert gathered not in compiled.as_text() and "f32[2,32,16]" in compiled.as_text()
    assert gathered in single[None][3].as_text()


def test_rows_that_are_not_spread_are_computed_by_all(params):
    """As in a serving step on a mesh: one row, by rules that leave rows whole, and by rules that it does not divide."""
    row = {name: array[:1] for name, array in batch().items()}

    def on(config, batch_axes, transform):
        model, mesh, _, shardings = on_mesh(config)

        def mean_square(params):
            with models.activation_rules({**rules.ACTIVATIONS, "batch": batch_axes}):
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
