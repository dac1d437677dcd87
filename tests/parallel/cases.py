"""A whole train step on meshes of every kind, each compiled and run once for all tests that look at it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from experiments import gin_reader
from llm_jax import models
from llm_jax.models import Execution, Experts, ModelConfig, blocks
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.parallel.rules import ShardingRules, batch_sharding
from llm_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
from llm_jax.training.state import TrainState, init_state, state_shardings
from llm_jax.training.step import make_train_step
from tests.parallel.test_sharded_training import batch
from tests.training.common import MODEL

# The first moment of the first step is (1 − b1) times the gradient, if nothing is clipped.
OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1, clip_norm=None)
MIXTURE = dataclasses.replace(MODEL, mlp_pattern=("experts",), experts=Experts(8, 2, 16, balance_weight=0.1))
# Windows, soft caps and a group of query heads for each head of keys: all that attention may be asked for.
LOCAL = dataclasses.replace(MODEL, attention_pattern=("local",), sliding_window=5, attention_soft_cap=20.0)
CAPACITY = Execution(expert_capacity=1.0)


@dataclasses.dataclass(frozen=True)
class Case:
    mesh: MeshConfig
    config: ModelConfig = MODEL
    execution: Execution = Execution()
    rules: str = "fsdp"


AXES = {
    "data": Case(MeshConfig(data=4)),
    "fsdp": Case(MeshConfig(fsdp=4)),
    "zero1": Case(MeshConfig(fsdp=4), rules="zero1"),
    "tensor": Case(MeshConfig(tensor=2)),
    "sequence": Case(MeshConfig(sequence=4)),
    "sequence, gathered": Case(MeshConfig(sequence=4), execution=Execution(sequence_attention="gather")),
    "sequence, local": Case(MeshConfig(sequence=4), LOCAL),
    "expert": Case(MeshConfig(expert=4), MIXTURE),
    "expert, capacity": Case(MeshConfig(expert=4), MIXTURE, CAPACITY),
}
PRODUCTS = {
    "data × fsdp × tensor": Case(MeshConfig(data=2, fsdp=2, tensor=2)),
    "fsdp × sequence × tensor": Case(MeshConfig(fsdp=2, sequence=2, tensor=2), LOCAL, rules="fsdp_sequence"),
    "expert × sequence × tensor": Case(MeshConfig(expert=2, sequence=2, tensor=2), MIXTURE, CAPACITY),
    "pipeline × zero1 × sequence": Case(MeshConfig(pipeline=2, fsdp=2, sequence=2), rules="zero1"),
}
CASES = AXES | PRODUCTS


@functools.cache
def table(name: str) -> ShardingRules:
    """The table of gin/rules/{name}.gin."""
    settings = gin_reader.read_file(str(gin_reader.ROOT / f"gin/rules/{name}.gin"))
    return ShardingRules(**{setting.parameter: setting.value for setting in settings})


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a step made.

    Attributes:
      before, after: the state.
      loss: nats per token.
      gradients: of the parameters, on the host.
      compiled: the program.
      mesh: where it ran.
    """

    before: TrainState
    after: TrainState
    loss: float
    gradients: Any
    compiled: jax.stages.Compiled
    mesh: jax.sharding.Mesh


def run(case: Case, rules: ShardingRules | None = None) -> Ran:
    """The first step of a run, from the parameters of `first_state`."""
    rules = rules or table(case.rules)
    model, mesh = models.Decoder(case.config, case.execution), make_mesh(case.mesh)
    optimizer = make_optimizer(OPTIMIZER, 4, decay_mask(models.logical_axes(model)))
    shardings = state_shardings(model, optimizer, mesh, rules)
    step = make_train_step(model, optimizer, learning_rate_schedule(OPTIMIZER, 4), mesh, shardings, rules=rules)
    state = jax.device_put(first_state(case.config), shardings)
    rows = jax.device_put(batch(), batch_sharding(mesh, rules.activations))
    with mock.patch.object(blocks, "_MOST_WRITTEN_OUT", 0):  # on one device the same loops as on several
        lowered = step.lower(state, rows)
    # Half the time of a compile, and the same arrays and collectives.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    after, metrics = compiled(jax.tree.map(lambda x: x.copy(), state), rows)
    gradients = jax.tree.map(lambda mu: np.asarray(mu) / (1 - OPTIMIZER.b1), moments(after)[0])
    return Ran(state, after, float(metrics["loss"]), gradients, compiled, mesh)


@functools.cache
def first_state(config: ModelConfig) -> TrainState:
    """A state on the host, whatever the mesh."""
    model = models.Decoder(config)
    optimizer = make_optimizer(OPTIMIZER, 4, decay_mask(models.logical_axes(model)))
    shardings = state_shardings(model, optimizer, make_mesh(MeshConfig()))
    return jax.device_get(init_state(model, optimizer, 0, shardings))


def moments(state: TrainState) -> tuple[Any, Any]:
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    return adam.mu, adam.nu


@functools.cache
def ran(name: str) -> Ran:
    """`run` of a case, once."""
    return run(CASES[name])


@functools.cache
def single(name: str) -> Ran:
    """The same on one device."""
    case = CASES[name]
    return alone(case.config, case.execution)


@functools.cache
def alone(config: ModelConfig, execution: Execution) -> Ran:
    """A step on one device, once."""
    return run(Case(MeshConfig(), config, dataclasses.replace(execution, sequence_attention="ring")))


def assert_same_gradients(one: Ran, many: Ran) -> None:
    """The loss and every gradient, up to 1e-6 of each array's largest entry."""
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one.gradients), jax.tree.leaves(many.gradients),
                            strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * np.abs(a).max(), err_msg=jax.tree_util.keystr(path))
