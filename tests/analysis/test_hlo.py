"""Counts of compiled programs against numbers worked out by hand."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from llm_jax.analysis import hlo
from llm_jax.analysis.device_groups import axes_of_groups, device_groups

F32 = 4


def counted(function, *shapes, mesh=None):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return hlo.summary(text, None if mesh is None else mesh.shape)


def test_a_product_is_two_operations_a_pair():
    program = counted(lambda a, b: a @ b, (8, 16), (16, 32))
    assert program.flops == 2 * 8 * 16 * 32
    assert program.collectives == {} and program.loops == ()


def test_products_of_a_batch():
    program = counted(lambda a, b: jnp.einsum("btgk,bsgk->bgts", a, b), (2, 8, 4, 16), (2, 24, 4, 16))
    assert program.flops == 2 * 2 * 4 * 8 * 24 * 16


def test_a_loop_counts_as_often_as_it_runs():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    program = counted(layers, (8, 16), (5, 16, 16))
    assert program.flops == 5 * 2 * 8 * 16 * 16
    assert [(loop.trips, loop.times, loop.flops) for loop in program.loops] == [(5, 1, program.flops)]
    assert program.unknown_loops == ()


def test_loops_in_loops_multiply():
    def step(x, w):
        inner = functools.partial(jax.lax.fori_loop, 0, 3, lambda _, x: jnp.tanh(x @ w))
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.sin(inner(x)), x)

    program = counted(step, (8, 16), (16, 16))
    assert program.flops == 7 * 3 * 2 * 8 * 16 * 16
    assert sorted((loop.trips, loop.times) for loop in program.loops if loop.flops) == [(3, 7), (7, 1)]


def test_a_gradient_is_three_times_the_layers():
    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    program = counted(jax.grad(loss), (5, 16, 16), (8, 16))
    # The first layer's input takes no gradient, but the loop computes it.
    assert program.flops == 3 * 5 * 2 * 8 * 16 * 16


def test_a_loop_whose_end_is_computed_is_said_to_be_unknown():
    def steps(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ w, x)

    program = counted(steps, (8, 16), (16, 16))
    assert program.flops == 2 * 8 * 16 * 16
    assert [loop.trips for loop in program.unknown_loops] == [None]


def test_the_longer_branch_counts():
    def either(x, w):
        return jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w @ w, lambda: x @ w)

    assert counted(either, (8, 16), (16, 16)).flops == 2 * 2 * 8 * 16 * 16


def test_a_convolution_counts_the_places_that_are_there():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1,), [(1, 1)])

    # Eight places of a window of three over eight entries, of which one at each end lies outside.
    assert counted(convolve, (2, 4, 8), (5, 4, 3)).flops == 2 * 2 * 4 * 5 * (3 * 8 - 2)


MESH = {"data": 2, "tensor": 4}


@pytest.fixture(scope="module")
def exchange():
    """One program of every collective that `shard_map` can write, in a scan of three trips."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    n = MESH["tensor"]

    def body(x, _):
        x = jax.lax.psum(jnp.tanh(x), "data")
        x = jax.lax.all_gather(jnp.sin(x), "tensor", tiled=True)
        x = jax.lax.psum_scatter(jnp.cos(x), "tensor", tiled=True)
        x = jax.lax.all_to_all(jnp.tanh(x), "tensor", 0, 0, tiled=True)
        x = jax.lax.ppermute(jnp.sin(x), "tensor", [(i, (i + 1) % n) for i in range(n)])
        return jax.lax.psum(jnp.cos(x), ("data", "tensor")), None

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("tensor"), out_specs=PartitionSpec("tensor"),
                       check_vma=False)
    def exchanged(x):
        return jax.lax.scan(body, x, length=3)[0]

    return counted(exchanged, (16, 32), mesh=mesh)


def test_collectives_are_counted_by_kind_and_trip(exchange):
    own = 16 // MESH["tensor"] * 32 * F32  # what a device holds
    assert exchange.collectives == {
        "all-reduce": (6, 6 * own), "all-gather": (3, 3 * 4 * own), "reduce-scatter": (3, 3 * 4 * own),
        "all-to-all": (3, 3 * own), "collective-permute": (3, 3 * own)}


def test_what_a_ring_sends(exchange):
    own = 16 // MESH["tensor"] * 32 * F32
    assert exchange.moved_bytes == pytest.approx({
        "all-reduce": 3 * own * (2 * 1 / 2 + 2 * 7 / 8), "all-gather": 3 * 3 * own, "reduce-scatter": 3 * 3 * own,
        "all-to-all": 3 * own * 3 / 4, "collective-permute": 3 * own})


def test_the_axes_that_collectives_go_along(exchange):
    assert set(exchange.along("data").collectives) == {"all-reduce"}
    assert set(exchange.along("tensor").collectives) == {"all-gather", "reduce-scatter", "all-to-all",
                                                         "collective-permute"}
    assert exchange.along("tensor", "data").collectives["all-reduce"][0] == 3


@pytest.mark.parametrize(("text", "groups"), [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("replica_groups=[2,4]<=[8], use_global_device_ids=true", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),)),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("replica_groups=mesh[a=2,b=2], device_ids=([2,2]<=[2,2]T(1,0)) {b}", ((0, 2), (1, 3))),
    ("replica_groups={}, channel_id=1", (tuple(range(8)),)),
])
def test_groups_in_every_spelling(text, groups):
    assert device_groups(f"channel_id=3, {text}", 8) == groups


def test_groups_that_are_no_product_of_axes():
    assert axes_of_groups(((0, 1), (2, 3), (4, 5), (6, 7)), MESH) is None
    assert axes_of_groups(((0, 5), (1, 4), (2, 7), (3, 6)), MESH) is None
    assert axes_of_groups(((0, 4), (1, 5), (2, 6), (3, 7)), MESH) == ("data",)


def test_programs_of_other_platforms():
    """As compilers for TPU and GPU write them, cut to what matters."""
    text = (pathlib.Path(__file__).parent / "other_platforms.hlo.txt").read_text()
    program = hlo.summary(text, {"data": 4, "tensor": 2}, kernel_share=0.75)
    (loop,) = program.loops
    assert loop.trips == 5  # 1, 3, … 9
    product = 2 * 4 * 64 * 32 * 32  # four of a batch, each 64 × 32 by 32 × 32
    splash = 0.75 * 2 * (2 * 2 * 8 * 128 * 128 * 32)  # two products of all pairs
    assert program.flops == 5 * product + 12345 + 2 * 16 * 16 * 128 + 2 * 64 * 32 * 16 + splash
    assert [call.op_name for call in program.uncounted] == ["jit(step)/theirs"]
    size = 16 * 128 * F32
    beside = 512 * 32 * 2  # begun, gone on and waited for in three fusions
    assert program.collectives == {"all-gather": (2, 8 * size + beside), "all-reduce": (1, 9 * size),
                                   "reduce-scatter": (1, size)}
    assert program.along("tensor").collectives == {"all-reduce": (1, 9 * size)}
    assert program.num_devices == 8


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="not the text of an HLO module"):
        hlo.summary("nothing here")
