"""Training with products in int8 and fp8 on meshes of several axes, against one device that multiplies in the same."""

from __future__ import annotations

import functools
import re
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.models import blocks
from llm_jax.parallel import rules
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.training.step import gradients
from tests.parallel.test_sharded_training import batch
from tests.training.common import MODEL

DECODER = models.Decoder(MODEL)
MICROBATCHES = 2  # of the pipeline, whose operands have scales of their own as those of accumulation have


@functools.cache
def computed(kind: str, config: MeshConfig) -> tuple[Any, float, str]:
    """Gradients, the loss, and the program as it was before it was compiled."""
    mesh, is_piped = make_mesh(config), config.pipeline > 1
    placed = rules.shardings(mesh, models.logical_axes(DECODER), shapes=models.abstract_params(DECODER))

    def run(params: Any, rows: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        with models.activation_rules(rules.ACTIVATIONS):
            grads, sums = gradients(DECODER, params, rows, None, mesh=mesh, gradient_shardings=placed, matmul=kind,
                                    accumulation=1 if is_piped else MICROBATCHES)
        return grads, sums["loss_sum"] / sums["weight_sum"]

    with jax.set_mesh(mesh), mock.patch.object(blocks, "_MOST_WRITTEN_OUT", 0):  # the same loops everywhere
        rows = jax.device_put(batch(), rules.batch_sharding(mesh))
        params = jax.device_put(_first_params(), placed)
        lowered = jax.jit(run, out_shardings=(placed, None)).lower(params, rows)
        grads, loss = jax.device_get(lowered.compile()(params, rows))
    return grads, float(loss), lowered.as_text()


@functools.cache
def _first_params() -> Any:
    return jax.device_get(jax.jit(models.init_params, static_argnums=0)(DECODER, jax.random.key(0)))


# Where a last bit decides between two steps of the grid, a sum in another order rounds to the other one: a gradient
# then differs by some 1e-3, a tenth of what rounding itself does to it in int8 and a fiftieth of that in fp8.
@pytest.mark.parametrize("kind, dtype, config", [
    ("int8", "i8", MeshConfig(sequence=4)), ("int8", "i8", MeshConfig(pipeline=2, fsdp=2)),
    ("fp8", "f8E4M3FN", MeshConfig(pipeline=2, sequence=2, tensor=2))])
def test_loss_and_gradients_are_those_of_one_device(kind, dtype, config):
    (one, one_loss, _), (many, loss, program) = computed(kind, MeshConfig()), computed(kind, config)
    dots = [re.findall(r"tensor<(?:\d+x)*(\w+)>", line.rsplit(":", 1)[1]) for line in program.splitlines()
            if "stablehlo.dot_general" in line]
    assert sum(dtype in dot[:2] for dot in dots) >= 21, "seven projections, each of three products"
    assert loss == pytest.approx(one_loss, rel=2e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(many), strict=True):
        assert np.linalg.norm(b - a) <= 4e-3 * np.linalg.norm(a), jax.tree_util.keystr(path)
