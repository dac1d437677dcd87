"""Attention of training compiled for TPUs that are not there (make test-tpu): "auto" takes the kernel, forward and
backward, on one chip and divided over four. Nothing runs; that it is right is tests/kernels/test_splash_attention.py's
to show."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU machine to ask about itself
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # test workers side by side

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.kernels.attention import DenseContext, dense_attention

jax.config.update("jax_enable_compilation_cache", False)  # what is compiled without the device cannot be read back
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
LAYER = {"rows": 2, "length": 4096, "heads": (32, 8), "widths": (128, 128)}  # of an 8B Llama


@functools.cache
def devices(chip):
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices


def compiled(chip, dtype="bfloat16", shape=(1, 1), packed=True, causal=True, backend="auto", options=None, **changes):
    """Gradients of q, k and v, of rows over `fsdp` and heads over `tensor`."""
    layer = {**LAYER, **changes}
    (H, G), (K, V), B, T = layer["heads"], layer["widths"], layer["rows"], layer["length"]
    mesh = topologies.make_mesh(topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]), (2, 2),
                                ("fsdp", "tensor")) if shape == (2, 2) else jax.sharding.Mesh(
        [[devices(chip)[0]]], ("fsdp", "tensor"))

    def array(*dims, dtype=dtype, spec=("fsdp", None, "tensor")):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def loss(q, k, v, segment_ids):
        context = DenseContext(segment_ids, causal=causal, backend=backend, batch_axes=("fsdp",),
                               head_axes=("tensor",))
        out = dense_attention(q, k, v, context, scale=0.1, **options or {})
        return jnp.sum(out.astype(jnp.float32) ** 2)

    segment_ids = array(B, T, dtype="int32", spec=("fsdp",)) if packed else None
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(
            array(B, T, H, K), array(B, T, G, K), array(B, T, G, V), segment_ids).compile()


def check(program, layer=None):
    """A kernel forward and two backward; nothing of the size of all scores, nothing exchanged."""
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert not any(name in text for name in ("all-gather(", "all-reduce(", "all-to-all(", "collective-permute("))
    layer = {**LAYER, **(layer or {})}
    if layer["length"] >= 4096:
        scores = layer["rows"] * layer["heads"][0] * layer["length"] ** 2
        assert program.memory_analysis().temp_size_in_bytes < scores


@pytest.mark.parametrize("chip", CHIPS)
def test_a_layer_of_an_8b_model(chip):
    check(compiled(chip))


@pytest.mark.parametrize("chip", CHIPS)
def test_rows_and_heads_over_four_chips(chip):
    check(compiled(chip, shape=(2, 2)))


def test_windows_soft_caps_and_wide_heads():
    changes = {"heads": (8, 4), "widths": (256, 256), "rows": 1}
    for chip in CHIPS:
        check(compiled(chip, options={"window": 1024, "soft_cap": 50.0}, **changes), changes)


@pytest.mark.parametrize("changes", [
    {"widths": (64, 64), "heads": (12, 12)}, {"widths": (192, 128), "heads": (16, 16)}, {"widths": (80, 80)},
    {"length": 1000, "packed": False}, {"length": 200, "causal": False}, {"length": 640, "dtype": "float32"}])
def test_other_shapes(changes):
    check(compiled("v5e", **changes), {k: v for k, v in changes.items() if k in LAYER})


def test_a_long_row():
    check(compiled("v5e", rows=1, length=32768, heads=(8, 2)), {"rows": 1, "length": 32768, "heads": (8, 2)})


def test_blocks_in_plain_jax_too():
    text = compiled("v5e", backend="chunked", rows=1, length=1024, heads=(4, 2)).as_text()
    assert "tpu_custom_call" not in text
