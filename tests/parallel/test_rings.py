"""Sums scattered along several rings of chips: the numbers of one device, what is sent, and which axes are rings."""

from __future__ import annotations

import dataclasses
import math
import types
from unittest import mock

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.analysis.hlo import summary
from llm_jax.models import Execution, ring_weight
from llm_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from llm_jax.parallel.rings import Rings, rings_along
from tests.parallel import cases
from tests.training.common import MODEL

TIED = dataclasses.replace(MODEL, tie_embeddings=True)
CASES = {
    "three rings": (cases.Case(MeshConfig(fsdp=8), execution=Execution(loss_chunk=16)), (2, 2, 2)),
    "tensor, tied": (cases.Case(MeshConfig(fsdp=4, tensor=2), TIED), (2, 2)),
    "sequence": (cases.Case(MeshConfig(fsdp=4, sequence=2)), (2, 2)),
    "experts": (cases.Case(MeshConfig(fsdp=4, expert=2), cases.MIXTURE), (2, 2)),
    "pipeline": (cases.Case(MeshConfig(pipeline=2, fsdp=4)), (2, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_are_those_of_one_device_and_are_scattered(name):
    case, sizes = CASES[name]
    one = cases.alone(case.config, case.execution)
    with mock.patch.object(ring_weight, "rings_along",
                           lambda mesh, axis: Rings(axis, sizes) if axis == "fsdp" else None):
        many = cases.run(case)
    cases.assert_same_gradients(one, many)

    # A gradient goes whole into the first scatter, and what that leaves a device into the next.
    found = summary(many.compiled.as_text(), dict(many.mesh.shape))
    along_rings = sum(op.num_bytes * op.times for op in found.collective_ops
                      if op.kind == "reduce-scatter" and op.axes is None)  # a part of a mesh axis is no mesh axis
    assert along_rings == pytest.approx(_scattered_bytes(case, sizes), rel=0.01)
    assert found.along("fsdp").collectives["all-reduce"][1] < 0.05 * _scattered_bytes(case, sizes)


def _scattered_bytes(case, sizes):
    """Of what goes into each scatter of a step, by arithmetic from the shapes."""
    model, mesh, ticks = models.Decoder(case.config), case.mesh, 1
    if mesh.pipeline > 1:
        ticks = 2 * mesh.pipeline - 1
    total = 0.0
    leaves = jax.tree_util.tree_leaves_with_path(models.abstract_params(model))
    axes = jax.tree.leaves(models.logical_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    for (_, leaf), names in zip(leaves, axes, strict=True):
        if "embed" not in names or "expert_router" in names or len(names) - ("layers" in names) < 2 or (
                names == ("vocab", "embed") and not case.config.tie_embeddings):
            continue
        size = 4 * math.prod(leaf.shape)
        if {"vocab", "mlp", "heads", "kv_heads"} & set(names):
            size /= mesh.tensor
        if "experts" in names:
            size /= mesh.expert
        if "layers" in names:
            size *= ticks / mesh.pipeline
        total += sum(size / math.prod(sizes[:stage]) for stage in range(len(sizes)))
    return total


def axis(coords, shape=None, axes=("fsdp",)):
    """A mesh of devices at these places of a torus."""
    devices = np.empty(len(coords), object)
    devices[:] = [types.SimpleNamespace(coords=tuple(at)) for at in coords]
    shape = shape or (len(coords),)
    return types.SimpleNamespace(devices=devices.reshape(shape), shape=dict(zip(axes, shape, strict=True)),
                                 axis_names=axes)


def test_an_axis_along_several_dimensions_of_a_torus_is_a_grid_of_rings():
    plane = [(x, y, 0) for x in range(16) for y in range(16)]
    assert rings_along(axis(plane), "fsdp") == Rings("fsdp", (16, 16))
    assert rings_along(axis(plane, (64, 4), ("fsdp", "tensor")), "fsdp") == Rings("fsdp", (16, 4))
    both = axis(plane, (64, 4), ("fsdp", "tensor"))
    assert rings_along(both, "tensor") is None, "one ring, or a part of one"
    assert rings_along(axis(plane, (16, 16), ("fsdp", "tensor")), "fsdp") is None
    cube = [(x, y, z) for x in range(8) for y in range(8) for z in range(4)]
    assert rings_along(axis(cube), "fsdp") == Rings("fsdp", (8, 8, 4))
    assert rings_along(axis(cube, (4, 64), ("data", "fsdp")), "fsdp") == Rings("fsdp", (2, 8, 4))
    snake = [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]
    assert rings_along(axis(snake), "fsdp") is None, "one ring through a plane is a ring, and no grid"
    assert rings_along(axis(snake[:1]), "fsdp") is None
    bent = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 0, 1)]
    assert rings_along(axis(bent), "fsdp") is None


def test_devices_without_a_place_in_a_torus_have_no_rings():
    assert rings_along(jax.make_mesh((8,), ("fsdp",)), "fsdp") is None
    assert all(rings_along(jax.make_mesh((1,) * len(AXES), AXES), name) is None for name in AXES)


def test_a_wide_array_is_scattered_in_pieces_of_which_none_is_lost():
    # 263 blocks of 128, a number with a large odd factor, as vocabularies have; and an axis of one in between.
    x_NDV = np.random.default_rng(0).normal(size=(8, 8, 1, 263 * 128)).astype(np.float32)
    mesh = make_mesh(MeshConfig(fsdp=8))
    scattered = jax.jit(jax.shard_map(lambda x_NDV: Rings("fsdp", (4, 2)).psum_scatter(x_NDV[0], 0), mesh=mesh,
                                      in_specs=jax.P("fsdp"), out_specs=jax.P("fsdp"), check_vma=False))
    np.testing.assert_allclose(scattered(x_NDV), x_NDV.sum(0), rtol=0, atol=1e-5)
    assert scattered.lower(x_NDV).as_text().count("reduce_scatter") == 2 * 2, "256 blocks and 7, in two stages"


def test_groups_are_the_lines_of_the_grid():
    assert Rings("fsdp", (2, 3)).groups(0) == [[0, 3], [1, 4], [2, 5]]
    assert Rings("fsdp", (2, 3)).groups(1) == [[0, 1, 2], [3, 4, 5]]
