"""Layers over the mesh axis `pipeline` on eight virtual devices, against one device."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.analysis.hlo import summary
from llm_jax.errors import UserError
from llm_jax.models import Execution, Experts
from llm_jax.parallel import pipeline, rules
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.parallel.pipeline import Schedule
from llm_jax.training.step import gradients
from tests.parallel.test_sharded_training import assert_close, batch
from tests.training.common import LENGTH, MODEL, ROWS

DEEP = dataclasses.replace(MODEL, num_layers=8)
# Four periods of a local and a global layer, and a last layer that is outside of the pipeline.
PATTERN = dataclasses.replace(MODEL, num_layers=9, attention_pattern=("local", "global"), sliding_window=5)
MIXTURE = dataclasses.replace(MODEL, num_layers=4, mlp_pattern=("experts",),
                              experts=Experts(8, 2, 16, balance_weight=0.1))
CONFIGS = (DEEP, PATTERN, MIXTURE)
VOCABULARY = ("tensor", "pipeline")
_QUICKLY = {"xla_backend_optimization_level": 0}  # each program runs once


@dataclasses.dataclass(frozen=True)
class Case:
    mesh: MeshConfig
    config: models.ModelConfig = DEEP
    execution: Execution = Execution()
    accumulation: int = 1
    vocabulary: str | tuple[str, ...] = "tensor"
    tolerance: float = 1e-6


CASES = {
    # On one device, in other microbatches, the few keys of the last layer's rows come to 3e-6.
    "2, a pattern": Case(MeshConfig(pipeline=2), PATTERN, Execution(remat="full"), tolerance=5e-6),
    "4, two stretches": Case(MeshConfig(pipeline=4), execution=Execution(pipeline_repeats=2)),
    "2 × data 2 × fsdp 2": Case(MeshConfig(pipeline=2, data=2, fsdp=2),
                                execution=Execution(remat="stage", pipeline_repeats=4)),
    "4 × tensor 2, accumulated": Case(MeshConfig(pipeline=4, tensor=2), execution=Execution(remat="dots"),
                                      accumulation=2, vocabulary=VOCABULARY),
    "2 × expert 2 × tensor 2": Case(MeshConfig(pipeline=2, expert=2, tensor=2), MIXTURE, Execution(
        remat="save_attention", expert_capacity=1.0, pipeline_microbatches=4)),
}


def compute(case: Case, params, mesh_config: MeshConfig):
    """(gradients, loss, the router's sums or {}, the compiled program).

    Of rows with few different tokens: rounding alone (the same rows on one device, in other microbatches) comes to half
    of 1e-6 of a gradient's largest entry with two of them in eight layers, and with four in mixtures.
    """
    model, mesh = models.Decoder(case.config, case.execution), make_mesh(mesh_config)
    table = rules.RULES | {"vocab": case.vocabulary}
    placed = rules.shardings(mesh, models.logical_axes(model), table, shapes=models.abstract_params(model))

    def run(params, rows):
        with models.activation_rules(rules.ACTIVATIONS | {"activation_vocab": case.vocabulary}):
            grads, sums = gradients(model, params, rows, None, mesh=mesh, gradient_shardings=placed,
                                    accumulation=case.accumulation)
        return grads, sums["loss_sum"] / sums["weight_sum"], sums.get("router", {})

    with jax.set_mesh(mesh):
        rows = jax.device_put(batch(vocab=2 if case.config == DEEP else 4), rules.batch_sharding(mesh))
        params = jax.device_put(params, placed)
        compiled = jax.jit(run, out_shardings=(placed, None, None)).lower(params, rows).compile(_QUICKLY)
        return *compiled(params, rows), compiled


@pytest.fixture(scope="module")
def params():
    return {config: jax.device_get(jax.jit(models.init_params, static_argnums=0)(models.Decoder(config),
                                                                                 jax.random.key(0)))
            for config in CONFIGS}


@pytest.fixture(scope="module")
def single(params):
    return {config: compute(Case(MeshConfig(), config, Execution(expert_capacity=1.0)), params[config], MeshConfig())
            for config in CONFIGS}


@pytest.fixture(scope="module")
def run(params):
    """`compute` of a case, once."""
    return functools.cache(lambda name: compute(CASES[name], params[CASES[name].config], CASES[name].mesh))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_one_device(name, run, single):
    grads, loss, router, _ = run(name)
    one_grads, one_loss, one_router, _ = single[CASES[name].config]
    np.testing.assert_allclose(loss, one_loss, rtol=1e-6)
    assert_close(one_grads, grads, CASES[name].tolerance)
    assert_close(one_router, router)


@pytest.mark.parametrize("name", CASES)
def test_each_device_holds_its_share_of_the_layers(name, run):
    """Gradients lie as parameters do, and the step's result is told where to lie by the same table."""
    case = CASES[name]
    for leaf in jax.tree.leaves(run(name)[0]["layers"]):
        shares = {shard.index[0].indices(leaf.shape[0])[:2] for shard in leaf.addressable_shards}
        assert len(shares) == case.mesh.pipeline
        assert {stop - start for start, stop in shares} == {leaf.shape[0] // case.mesh.pipeline}
    if case.vocabulary == VOCABULARY:
        assert run(name)[0]["unembed"].addressable_shards[0].data.size == MODEL.vocab_size * MODEL.embed_dim // 8


def microbatch_bytes(rows: int) -> int:
    return 4 * rows * LENGTH * MODEL.embed_dim


def layer_bytes() -> int:
    """float32 bytes of a layer, counted by hand."""
    c = MODEL
    return 4 * (c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) + 3 * c.embed_dim * c.mlp_dim
                + 2 * c.embed_dim)


@pytest.mark.parametrize("name, ticks, moved_layers", [
    ("2, a pattern", 2 + 1, 0), ("4, two stretches", 4 * 2 + 3, 8 // 4)])
def test_what_stages_send_each_other(name, ticks, moved_layers, run):
    """A microbatch each tick, forward and backward; stretches, where they are not neighbours; x and its gradient."""
    case = CASES[name]
    program = summary(run(name)[3].as_text(), make_mesh(case.mesh).shape)
    sent = program.along("pipeline").collectives
    assert set(program.collectives) == set(sent) == {"collective-permute", "all-reduce"}
    leaves = 9 if moved_layers else 0
    assert sent["collective-permute"] == (
        2 * ticks + 2 * case.execution.pipeline_repeats * leaves,
        2 * ticks * microbatch_bytes(ROWS // case.mesh.pipeline) + 2 * moved_layers * layer_bytes())
    assert sent["all-reduce"] == (2, 2 * microbatch_bytes(ROWS))


@pytest.mark.parametrize("stages, repeats, microbatches", [
    (2, 1, 2), (2, 1, 5), (2, 3, 4), (4, 1, 4), (4, 2, 8), (3, 2, 9)])
def test_the_bubble_is_that_of_a_simulated_pipeline(stages, repeats, microbatches):
    """Stages that work on whatever has come to them, oldest group first: no schedule is told, the order follows."""
    schedule = Schedule(stages, repeats, microbatches)
    waiting = [[] for _ in range(stages)]
    waiting[0] = [(micro // stages, 0, micro) for micro in range(microbatches)]
    idle, done, tick = 0, 0, 0
    while done < microbatches:
        moved = []
        for stage in range(stages):
            is_working, repeat, micro = (int(x) for x in schedule.work(tick, stage))
            assert bool(is_working) == bool(waiting[stage])
            if not waiting[stage]:
                idle += 1
                continue
            job = min(waiting[stage], key=lambda job: (job[0], -job[1], job[2]) if stage == 0 else job)
            waiting[stage].remove(job)
            group, turn, number = job
            assert (repeat, micro) == (turn, number)
            if stage + 1 < stages:
                moved.append((stage + 1, job))
            elif turn + 1 < repeats:
                moved.append((0, (group, turn + 1, number)))
            else:
                done += 1
        for stage, job in moved:
            waiting[stage].append(job)
        tick += 1
    assert tick == schedule.ticks
    assert idle == stages * (stages - 1)
    np.testing.assert_allclose(schedule.bubble, idle / (tick * stages))


@pytest.mark.parametrize("stages, repeats", [(s, r) for s in range(2, 7) for r in range(2, 7)])
def test_every_stretch_finds_its_stage_and_its_place(stages, repeats):
    moves = pipeline.exchange(stages, repeats)
    placed = {}
    for sent, received, pairs in zip(moves.sent, moves.received, moves.pairs, strict=True):
        assert {a for a, _ in pairs} == {b for _, b in pairs} == set(range(stages)), "all send, and all receive"
        for sender, receiver in pairs:
            placed[receiver, int(received[receiver])] = sender * repeats + int(sent[sender])
    assert placed == {(stage, repeat): repeat * stages + stage for stage in range(stages) for repeat in range(repeats)}


def test_a_policy_keeps_what_it_says(params):
    """Between the passes, of four layers a stage: each block's input in each tick, or that of the stage alone."""
    mesh, rows = make_mesh(MeshConfig(pipeline=2)), jax.tree.map(np.asarray, batch())
    kept = {}
    for remat in ("none", "full", "stage"):
        model = models.Decoder(DEEP, Execution(remat=remat))

        def loss(params, model=model):
            return jnp.sum(model.apply({"params": params}, rows["tokens"], rows["segment_ids"], rows["positions"]))

        with jax.set_mesh(mesh), models.activation_rules(rules.ACTIVATIONS):
            residuals = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params[DEEP])
        kept[remat] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))
    turns = 3 * 2  # ticks of two stages
    in_full, in_stage = 4 * turns, turns + 2  # with the two microbatches, which the first stage takes
    assert kept["full"] - kept["stage"] == (in_full - in_stage) * microbatch_bytes(ROWS // 2)
    assert kept["full"] < kept["none"] / 4


@pytest.mark.parametrize("mesh, execution, config, message", [
    (MeshConfig(pipeline=4), Execution(pipeline_repeats=4), DEEP, "8 layers .* 4 stages .* 4 stretches .* 16 does not"),
    (MeshConfig(pipeline=4), Execution(pipeline_microbatches=2), DEEP, "pipeline_microbatches=2 .* at least 4"),
    (MeshConfig(pipeline=2), Execution(pipeline_repeats=2, pipeline_microbatches=5), DEEP, "=5 .* a multiple of 2"),
    (MeshConfig(pipeline=2, data=4), Execution(pipeline_microbatches=4), DEEP, "8 rows on 4 devices .* multiple of 16"),
    (MeshConfig(pipeline=2), Execution(pipeline_repeats=4), PATTERN, "4 periods of 2 layers .* 8 does not divide 4"),
])
def test_what_does_not_divide_is_told_with_its_numbers(mesh, execution, config, message, params):
    with pytest.raises(UserError, match=message):
        compute(Case(mesh, config, execution), params[config], mesh)
