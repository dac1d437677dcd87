from __future__ import annotations

import jax
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax.errors import UserError
from llm_jax.parallel import rules
from llm_jax.parallel.mesh import MeshConfig, make_mesh, mesh_shape


@pytest.mark.parametrize("config, devices, shape", [
    (MeshConfig(), 1, (1, 1, 1)), (MeshConfig(data=-1), 8, (8, 1, 1)), (MeshConfig(fsdp=2), 8, (1, 2, 1)),
    (MeshConfig(data=-1, fsdp=2, tensor=2), 8, (2, 2, 2)), (MeshConfig(fsdp=-1, tensor=2), 8, (1, 4, 2))])
def test_mesh_shape_fills_in_the_rest(config, devices, shape):
    assert mesh_shape(config, devices) == shape


@pytest.mark.parametrize("config", [MeshConfig(fsdp=3), MeshConfig(tensor=16), MeshConfig(data=-1, fsdp=5)])
def test_a_mesh_that_does_not_fit_says_how_many_devices_there_are(config):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(config)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"fsdp": -2}, {"tensor": 1.5}, {"data": -1, "fsdp": -1}])
def test_sizes_that_make_no_sense(sizes):
    with pytest.raises(UserError, match="MeshConfig"):
        MeshConfig(**sizes)


def test_logical_axes_become_mesh_axes():
    assert rules.partition_spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")
    assert rules.partition_spec(("vocab", "embed")) == P("tensor", "fsdp")
    assert rules.partition_spec(("layers", "heads", "head_dim", "embed")) == P(None, "tensor", None, "fsdp")
    assert rules.partition_spec(("batch", "length")) == P(("data", "fsdp"), None)
    with pytest.raises(UserError, match="no entry for the logical axis 'embde'"):
        rules.partition_spec(("embde", None))


def test_an_axis_that_cannot_be_divided_names_the_parameter():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    axes = {"layers": {"k": ("layers", "embed", "kv_heads", "head_dim")}}
    shapes = {"layers": {"k": jax.ShapeDtypeStruct((2, 32, 2, 8), "float32")}}
    with pytest.raises(UserError, match=r"layers/k .* axis 'kv_heads' of length 2 .* 4 devices of mesh axis tensor"):
        rules.shardings(mesh, axes, shapes=shapes)


def test_each_process_brings_an_equal_share_of_the_rows():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert rules.batch_shards(mesh) == 4
    assert rules.process_rows(rules.batch_sharding(mesh), 8) == (0, 1)
