"""The GPU kernels, interpreted on a CPU, against float64 NumPy; what cuDNN is asked for. That they compile for a GPU is
benchmarks/compile_gpu.py's to show, that they are right on one benchmarks/attention_check.py's."""

from __future__ import annotations

import functools

import jax
import pytest

from llm_jax.kernels import attention_call, cudnn_attention, triton_attention
from llm_jax.kernels.attention import choose
from llm_jax.kernels.attention_call import Call
from tests.kernels.attention_cases import Case, assert_close, results

CASES = {
    "packed, window, soft cap, narrow values": Case(segments="packed", window=9, soft_cap=2.0, V=5),
    "encoder, packed": Case(causal=False, segments="packed", H=2),
    "causal, odd group": Case(H=3, G=1, K=20, V=20),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name):
    case = CASES[name]
    attend = functools.partial(triton_attention.attend, segment_ids_BT=case.segment_ids()[0], causal=case.causal,
                               blocks=(16, 32, 32, 16), interpret=True, **case.options())
    assert_close(results(attend, *case.inputs()), case.expected(), 1e-5)


def test_documents_of_a_row():
    first, last = triton_attention._documents(jax.numpy.array([[4, 4, 4, 2, 0, 0], [1, 2, 2, 2, 2, 3]]))
    assert first.tolist() == [[0, 0, 0, 3, 4, 4], [0, 1, 1, 1, 1, 5]]
    assert last.tolist() == [[2, 2, 2, 3, 5, 5], [0, 4, 4, 4, 4, 5]]


def test_what_they_can_not_do_is_said():
    call = functools.partial(Call, 4096, 4096, 8, 2)
    for unsupported, takes, refusals in (
            (triton_attention.unsupported, call(64, 48, "float32", segments=True, window=8, soft_cap=2.0),
             [(call(64, 64, "bfloat16", bias=True), "bias"), (call(256, 256, "bfloat16"), "256 entries"),
              (Call(8, 9, 8, 2, 64, 64, "bfloat16", causal=False), "encoder's"), (call(64, 64, "mixed"), "mixed")]),
            (cudnn_attention.unsupported, call(64, 64, "float16", window=8),
             [(call(64, 64, "bfloat16", segments=True), "one document"), (call(64, 64, "float32"), "float32"),
              (call(64, 48, "bfloat16"), "48"), (call(64, 64, "bfloat16", soft_cap=1.0), "soft cap")])):
        assert unsupported(takes) is None
        for refused, why in refusals:
            assert why in unsupported(refused)


def test_a_gpu_takes_cudnn_or_triton_or_neither(monkeypatch):
    monkeypatch.setattr(attention_call, "platform", lambda: "gpu")
    monkeypatch.setattr(attention_call, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    call = functools.partial(Call, 4096, 4096, 8, 2)
    assert choose(call(64, 64, "bfloat16")) == "cudnn"
    assert choose(call(64, 64, "bfloat16", segments=True)) == "triton"
    assert choose(call(64, 64, "float32")) == "triton"
    assert choose(call(512, 512, "bfloat16")) == "chunked"
    assert choose(call(64, 64, "bfloat16", bias=True)) == "dense"
    monkeypatch.setattr(attention_call, "device_kind", lambda: "AMD Instinct MI300X")
    assert choose(call(64, 64, "bfloat16")) == "chunked"


def test_cudnn_is_asked_for_the_same_window(monkeypatch):
    """cuDNN itself is not there; what it is given is computed by XLA instead."""
    given = jax.nn.dot_product_attention

    def instead(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return given(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    for case in (Case(window=9), Case(causal=False)):
        attend = functools.partial(cudnn_attention.attend, causal=case.causal, **case.options())
        assert_close(results(attend, *case.inputs()), case.expected(), 1e-5)
