"""What is worked out of a step's arithmetic against what its program says before any compiler has touched it."""

from __future__ import annotations

import dataclasses

import pytest

from llm_jax.analysis import flops, hlo
from llm_jax.data.loader import DataConfig
from llm_jax.models import Execution, Experts, ModelConfig
from llm_jax.parallel.mesh import MeshConfig
from llm_jax.training.assembly import Assembly
from llm_jax.training.optimizer import OptimizerConfig

ROWS, LENGTH = 4, 64
MODEL = ModelConfig(vocab_size=96, num_layers=3, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=80,
                    max_context=LENGTH)
SANDWICH = dataclasses.replace(MODEL, norm_placement="sandwich")
TIED = dataclasses.replace(MODEL, tie_embeddings=True)
SPARSE = dataclasses.replace(MODEL, mlp_pattern=("experts",), experts=Experts(count=4, per_token=2, mlp_dim=48))


def in_the_program(model: ModelConfig, execution: Execution, accumulation: int = 1) -> float:
    run = Assembly(model, execution, DataConfig("unused", LENGTH, ROWS), OptimizerConfig(), MeshConfig(), num_steps=200,
                   accumulation=accumulation)
    lowered = run.train_step.lower(run.abstract_state(), run.abstract_batch())
    return hlo.summary(lowered.as_text(dialect="hlo")).flops


@pytest.mark.parametrize(("model", "options"), [
    (MODEL, {}),
    (MODEL, {"remat": "full"}),
    (MODEL, {"remat": "dots"}),
    (MODEL, {"remat": "save_attention"}),
    (MODEL, {"attention": "chunked", "remat": "full"}),
    (SANDWICH, {"remat": "full"}),
    (TIED, {"loss_chunk": 32}),
    (SPARSE, {"expert_capacity": 1.5, "remat": "full"}),
])
def test_every_product_is_accounted_for(model, options):
    execution = Execution(**({"attention": "dense"} | options))
    expected = flops.step_flops(model, execution, ROWS, LENGTH, execution.attention)
    assert in_the_program(model, execution) == pytest.approx(expected.hardware, rel=0.02)


def test_microbatches_change_nothing():
    execution = Execution(attention="dense")
    expected = flops.step_flops(MODEL, execution, ROWS, LENGTH, "dense")
    assert in_the_program(MODEL, execution, accumulation=2) == pytest.approx(expected.hardware, rel=0.02)


def test_the_parts_by_hand():
    """A model of one layer, one head and one row, in whole numbers."""
    model = ModelConfig(vocab_size=10, num_layers=1, embed_dim=4, num_heads=1, num_kv_heads=1, head_dim=2, mlp_dim=3,
                        max_context=8)
    layer, output = 4 * 2 * 4 + 3 * 4 * 3, 4 * 10  # q, k, v, out; gate, up, down
    found = flops.step_flops(model, Execution(remat="full"), 1, 8, "dense")
    pairs = 8 * 8 * 2 * 2  # operations of one product: every query with every key, two entries wide
    assert found.model == 6 * (layer + output) * 8 + 6 * pairs / 2
    assert found.attention == 6 * pairs / 2
    assert found.recomputed == 2 * (layer - 4 * 3) * 8 + 2 * pairs
    assert found.slots == 0
    assert found.hardware == found.model + found.attention + found.recomputed
