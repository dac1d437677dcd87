"""The TPU kernel, interpreted on a CPU, against float64 NumPy, and divided over devices. That it compiles for TPUs is
tests/tpu's to show."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from llm_jax.kernels import attention_call, splash_attention
from llm_jax.kernels.attention import DenseContext, dense_attention
from llm_jax.kernels.attention_call import Call
from tests.kernels.attention_cases import Case, assert_close, results

CASES = {
    "packed, window, soft cap, narrow values": Case(T=150, S=150, segments="packed", window=40, soft_cap=2.0, V=5),
    "encoder, padding": Case(T=100, S=100, causal=False, segments="packed", H=2),
    "causal, one head of keys": Case(T=130, S=130, H=2, G=1),
    "cross, sees all": Case(T=20, S=140, causal=False, H=2),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name, monkeypatch):
    monkeypatch.setattr(splash_attention, "BLOCK", 128)  # short rows take several
    case = CASES[name]
    ids = case.segment_ids()[0]
    attend = functools.partial(splash_attention.attend, segment_ids_BT=ids, causal=case.causal, interpret=True,
                               **case.options())
    got = results(attend, *case.inputs())
    assert_close(got, case.expected(), 5e-3)


def test_divided_over_rows_and_heads(monkeypatch):
    """"auto" takes the kernel on a TPU; each device computes its own rows and heads."""
    monkeypatch.setattr(attention_call, "platform", lambda: "tpu")
    monkeypatch.setattr(splash_attention, "attend", functools.partial(splash_attention.attend, interpret=True))
    case = Case(T=128, S=128, H=4, G=2, segments="packed")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
                         devices=jax.devices()[:4])
    context = DenseContext(jnp.asarray(case.segment_ids()[0]), batch_axes=("data",), head_axes=("tensor",))
    with jax.set_mesh(mesh):
        got = results(lambda q, k, v: dense_attention(q, k, v, context, **case.options()), *case.inputs())
    assert got[0].sharding.spec[:3] == ("data", None, "tensor")
    assert_close(got, case.expected(), 5e-3)


def test_what_it_can_not_do_is_said():
    call = functools.partial(Call, 128, 128, 4, 2, 64, 64)
    assert splash_attention.unsupported(call("bfloat16", segments=True, window=8, soft_cap=2.0)) is None
    assert "bias" in splash_attention.unsupported(call("bfloat16", bias=True))
    assert "encoder's" in splash_attention.unsupported(call("bfloat16", other_keys=True))
    assert "float16" in splash_attention.unsupported(call("float16"))
    assert "512 entries" in splash_attention.unsupported(Call(128, 128, 4, 2, 512, 64, "bfloat16"))
