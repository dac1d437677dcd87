"""Projections: on CPUs with gradients of their own, which are those of autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import blocks, layers
from llm_jax.models.config import Execution

SHAPES = {1: ((2, 3, 8), (8, 5)), 2: ((2, 3, 2, 4), (2, 4, 5, 3))}


def value_and_gradients(x, w, contract, out_dtype):
    y, back = jax.vjp(lambda x, w: layers.linear(x, w, contract, out_dtype), x, w)
    seed = jax.random.normal(jax.random.key(2), y.shape, y.dtype)
    return y, *back(seed)


@pytest.mark.parametrize("contract", SHAPES)
@pytest.mark.parametrize(("dtype", "out_dtype"), [("float32", None), ("bfloat16", None), ("bfloat16", "float32")])
def test_gradients_of_a_projection_are_those_of_autodiff(contract, dtype, out_dtype, monkeypatch):
    keys = jax.random.split(jax.random.key(1))
    x, w = (jax.random.normal(key, shape) for key, shape in zip(keys, SHAPES[contract], strict=True))
    as_matrices = value_and_gradients(x.astype(dtype), w, contract, out_dtype)
    monkeypatch.setattr(layers, "is_lone_cpu", lambda: False)
    own = value_and_gradients(x.astype(dtype), w, contract, out_dtype)
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    wanted = value_and_gradients(x.astype(dtype), w, contract, out_dtype)
    for a, b in zip(as_matrices + own, wanted + wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-5)


def test_layers_are_written_out_only_for_one_device_few_layers_and_without_remat(monkeypatch):
    assert blocks.written_out(Execution(), 6) == 6
    assert blocks.written_out(Execution(), 9) == 1
    assert blocks.written_out(Execution(remat="full"), 6) == 1
    with jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])):
        assert blocks.written_out(Execution(), 6) == 1
    monkeypatch.setattr(blocks, "is_lone_cpu", lambda: False)
    assert blocks.written_out(Execution(), 6) == 1


def test_a_projection_of_no_rows_is_nothing():
    assert layers.linear(jnp.zeros((0, 8)), jnp.ones((8, 5))).shape == (0, 5)
