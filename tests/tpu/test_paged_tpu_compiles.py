"""Paged attention compiled for TPUs that are not there (make test-tpu): an 8B model's layer, and shapes at the edge of
what the kernel takes. Nothing runs; that it is right is tests/kernels/test_paged_tpu.py's to show."""

from __future__ import annotations

import functools
import os
import re

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU machine to ask about itself
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # test workers side by side

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec

from llm_jax.kernels import paged_tpu
from llm_jax.kernels.paged import PagedContext

jax.config.update("jax_enable_compilation_cache", False)  # what is compiled without the device cannot be read back
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
LAYER = {"heads": 32, "widths": (8, 128, 128), "page": 16, "pages_per_row": 256, "decode": 64, "width": 1, "prefill": 4,
         "chunk": 256}


@functools.cache
def devices(chip):
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices


def compiled(chip, dtype="bfloat16", shards=1, **changes):
    """A layer's attention in a program that is given the pool to keep, and the pool; heads split over `shards`."""
    layer = {**LAYER, **changes}
    heads, (G, K, V), P = layer["heads"], layer["widths"], 1000
    mesh = jax.sharding.Mesh(devices(chip)[:shards], ("tensor",))
    N = layer["decode"] * layer["width"] + layer["prefill"] * layer["chunk"]
    rows = layer["decode"] + layer["prefill"]

    def array(*shape, dtype=dtype, split=None):
        spec = PartitionSpec(*("tensor" if axis == split else None for axis in range(len(shape))))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    of_tokens, of_rows = array(N, dtype="int32"), array(rows, dtype="int32")
    context = PagedContext(of_tokens, of_tokens, layer["decode"], layer["chunk"], length_R=of_rows, backend="tpu",
                           table_RP=array(rows, layer["pages_per_row"], dtype="int32"), decode_width=layer["width"])
    pool = jax.eval_shape(lambda: paged_tpu.make_pool_tpu(P, layer["page"], (G, K, V), dtype))[0].shape
    q, k, v = (array(1, N, h, width, split=2) for h, width in ((heads, K), (G, K), (G, V)))
    attend = functools.partial(paged_tpu.attend, scale=0.1, **layer.get("options", {}))
    if shards > 1:
        of_heads, of_pool = PartitionSpec(None, None, "tensor"), PartitionSpec(None, None, "tensor")
        attend = jax.shard_map(attend, in_specs=(of_heads, of_heads, of_heads, PartitionSpec(), (of_pool,)),
                               out_specs=(of_heads, (of_pool,)), check_vma=False)
    with jax.set_mesh(mesh):
        program = jax.jit(attend, donate_argnums=4).lower(q, k, v, context, (array(*pool, split=2),)).compile()
    return program, jax.ShapeDtypeStruct((*pool[:2], pool[2] // shards, pool[3]), dtype)


def check(program, pool, calls=2):
    """So many Mosaic kernels; the pool updated in place, never copied, and nothing beside it nearly as large."""
    text, memory = program.as_text(), program.memory_analysis()
    assert text.count('custom_call_target="tpu_custom_call"') == calls
    shape = re.escape(f"[{','.join(map(str, pool.shape))}]")
    assert re.search(rf"{shape}\S* parameter\(", text)
    assert not re.search(rf"{shape}\S* (copy|copy-start|transpose)\(", text)
    pool_bytes = pool.size * pool.dtype.itemsize
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 2


@pytest.mark.parametrize("chip", CHIPS)
def test_a_layer_of_an_8b_model(chip):
    check(*compiled(chip))


@pytest.mark.parametrize("chip", CHIPS)
def test_windows_soft_caps_and_several_tokens_a_decoding_row(chip):
    check(*compiled(chip, width=3, page=32, options={"window": 1024, "soft_cap": 50.0}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("heads, kv_heads, width", [(12, 12, 64), (9, 3, 64), (28, 4, 128), (7, 1, 128)])
def test_heads_that_no_tile_fits(dtype, heads, kv_heads, width):
    check(*compiled("v5e", dtype, heads=heads, widths=(kv_heads, width, width), decode=16, prefill=2, chunk=64))


def test_steps_of_one_kind():
    check(*compiled("v5e", prefill=0), calls=1)
    check(*compiled("v5e", decode=0), calls=1)


def test_heads_split_over_four_chips():
    check(*compiled("v5e", shards=4))


@pytest.mark.parametrize("chip", CHIPS)
def test_as_many_table_entries_as_are_allowed(chip):
    rows, pages_per_row = paged_tpu.TABLE_ENTRIES // 1024, 1024
    assert paged_tpu.supports(LAYER["widths"], 32, "bfloat16", rows=rows, pages_per_row=pages_per_row) is None
    assert paged_tpu.supports(LAYER["widths"], 32, "bfloat16", rows=rows, pages_per_row=pages_per_row + 1)
    check(*compiled(chip, decode=rows, prefill=1, chunk=64, pages_per_row=pages_per_row))


def test_what_is_said_not_to_work_does_not():
    """Were it to, `supports` could be more generous."""
    with pytest.raises(Exception, match="last dim size is not 128"):
        compiled("v5e", heads=8, widths=(4, 256, 256))
    with pytest.raises(Exception, match="smem"):
        compiled("v5e", decode=256, prefill=1, chunk=64, pages_per_row=1024)
