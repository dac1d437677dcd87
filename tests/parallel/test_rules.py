from __future__ import annotations

from typing import NamedTuple

import jax
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax.errors import UserError
from llm_jax.parallel import rules
from llm_jax.parallel.mesh import AXES, MeshConfig, make_mesh, mesh_shape


@pytest.mark.parametrize("config, devices, shape", [
    (MeshConfig(), 1, {}), (MeshConfig(data=-1), 8, {"data": 8}), (MeshConfig(fsdp=2), 8, {"fsdp": 2}),
    (MeshConfig(data=-1, fsdp=2, tensor=2), 8, {"data": 2, "fsdp": 2, "tensor": 2}),
    (MeshConfig(fsdp=-1, tensor=2), 8, {"fsdp": 4, "tensor": 2}),
    (MeshConfig(data=2, expert=-1), 8, {"data": 2, "expert": 4}),
    (MeshConfig(pipeline=2, sequence=-1), 8, {"pipeline": 2, "sequence": 4})])
def test_mesh_shape_fills_in_the_rest(config, devices, shape):
    sizes = dict(zip(AXES, mesh_shape(config, devices), strict=True))
    assert sizes == dict.fromkeys(AXES, 1) | shape


@pytest.mark.parametrize("config", [MeshConfig(fsdp=3), MeshConfig(tensor=16), MeshConfig(data=-1, fsdp=5)])
def test_a_mesh_that_does_not_fit_says_how_many_devices_there_are(config):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(config)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"fsdp": -2}, {"tensor": 1.5}, {"data": -1, "fsdp": -1}])
def test_sizes_that_make_no_sense(sizes):
    with pytest.raises(UserError, match="MeshConfig"):
        MeshConfig(**sizes)


def test_logical_axes_become_mesh_axes():
    assert rules.partition_spec(("layers", "embed", "mlp")) == P("pipeline", "fsdp", "tensor")
    assert rules.partition_spec(("vocab", "embed")) == P("tensor", "fsdp")
    assert rules.partition_spec(("layers", "heads", "head_dim", "embed")) == P("pipeline", "tensor", None, "fsdp")
    assert rules.partition_spec(("batch", "length"), rules.ACTIVATIONS) == P(("data", "fsdp", "expert"), "sequence")
    assert rules.partition_spec(("layers", "experts", "embed", "mlp")) == P("pipeline", "expert", "fsdp", "tensor")
    with pytest.raises(UserError, match="no entry for the logical axis 'embde'"):
        rules.partition_spec(("embde", None))


def test_an_axis_that_cannot_be_divided_names_the_parameter():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    axes = {"layers": {"k": ("layers", "embed", "kv_heads", "head_dim")}}
    shapes = {"layers": {"k": jax.ShapeDtypeStruct((2, 32, 2, 8), "float32")}}
    with pytest.raises(UserError, match=r"layers/k .* axis 'kv_heads' of length 2 .* 4 devices of mesh axis tensor"):
        rules.shardings(mesh, axes, shapes=shapes)


def test_each_process_brings_an_equal_share_of_the_rows():
    for config in (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=2, expert=2, tensor=2)):
        mesh = make_mesh(config)
        assert rules.batch_shards(mesh) == 4
        assert rules.process_rows(rules.batch_sharding(mesh), 8) == (0, 1)


class Device(NamedTuple):
    process_index: int
    number: int


class Placed:
    """A sharding of 8 rows over devices given as (process, first row, row after the last)."""

    def __init__(self, *places):
        self.places = places

    def devices_indices_map(self, shape):
        return {Device(process, number): (slice(start, stop), slice(None))
                for number, (process, start, stop) in enumerate(self.places)}


@pytest.mark.parametrize("places, shares", [
    ([(0, 0, 2), (0, 2, 4), (1, 4, 6), (1, 6, 8)], [(0, 2), (1, 2)]),  # two processes with two devices
    ([(1, 0, 4), (0, 4, 8)], [(1, 2), (0, 2)]),  # the mesh decides the order, not the processes' numbers
    ([(0, 0, 4), (1, 0, 4), (2, 4, 8), (3, 4, 8)], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor axis over processes
    ([(0, 0, 8), (1, 0, 8)], [(0, 1), (0, 1)]),
])
def test_shares_of_several_processes(places, shares, monkeypatch):
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert rules.process_rows(Placed(*places), 8) == share


@pytest.mark.parametrize("places, message", [
    ([(0, 0, 2), (1, 2, 4), (0, 4, 6), (1, 6, 8)], "gives process 0 the rows 0–1, 4–5, which don't follow one another"),
    ([(0, 0, 2), (0, 2, 4), (1, 2, 4), (1, 4, 6), (2, 6, 8)], "processes the rows 0–3, 2–5, 6–7 of 8, .* equal parts"),
    ([(0, 0, 2), (0, 2, 4), (0, 4, 6), (1, 6, 8)], "processes the rows 0–5, 6–7 of 8"),
])
def test_rows_that_a_process_cannot_bring_as_one_part(places, message):
    with pytest.raises(UserError, match=message):
        rules.process_rows(Placed(*places), 8)
