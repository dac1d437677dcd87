"""Attention in blocks against float64 NumPy, gradients included; terms of it put together; memory."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from llm_jax.kernels import chunked_attention as chunked
from tests.kernels.attention_cases import SCALE, Case, assert_close, expected, results

CASES = {
    "causal": Case(),
    "packed, window, soft cap": Case(segments="packed", window=9, soft_cap=2.0, V=5),
    "window of one": Case(window=1, H=2),
    "window as long as a block": Case(T=48, S=48, window=16),
    "one block": Case(T=11, S=11, segments="packed"),
    "encoder": Case(causal=False, segments="packed", G=4),
    "sees all": Case(causal=False, T=32, S=32, G=1, soft_cap=3.0),
    "cross, keys padded": Case(causal=False, S=21, segments="keys"),
    "cross, packed, queries that see nothing": Case(causal=False, S=50, segments="both", soft_cap=2.0),
    "causal, some keys hidden": Case(segments="keys"),
}


def attend(case, block=(16, 16)):
    ids = dict(zip(("segment_ids_BT", "key_segment_ids_BS"), case.segment_ids(), strict=True))
    return functools.partial(chunked.chunked_attention, causal=case.causal, block=block, **ids, **case.options())


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name):
    case = CASES[name]
    got = results(attend(case, (16, 8) if "window" in name else (16, 16)), *case.inputs())
    assert_close(got, case.expected(), 2e-6)


def test_bfloat16_stays_bfloat16():
    case = Case(segments="packed", soft_cap=2.0)
    inputs = case.inputs(dtype=jnp.bfloat16)
    got = results(attend(case), *inputs)
    assert {x.dtype for x in got} == {jnp.dtype("bfloat16")}
    assert_close(got, expected(*inputs, case.allowed(), SCALE, case.soft_cap), 2e-2)


def test_blocks_that_see_nothing_are_not_visited():
    """Counted in the program: the list that its loops run over."""
    def trips(**options):
        x = jax.ShapeDtypeStruct((1, 64, 1, 4), np.float32)
        run = functools.partial(chunked.chunked_attention, scale=1.0, block=(16, 16), **options)
        length, = loops(run, x, x, x)
        return length

    assert (trips(causal=False), trips(), trips(window=17), trips(window=1)) == (16, 10, 7, 4)


def test_rematerialisation_that_saves_attention_computes_it_once():
    def passes(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        block = jax.checkpoint(lambda q, k, v: jnp.sum(jnp.sin(chunked.chunked_attention(
            2 * q, 2 * k, 2 * v, scale=1.0, block=(16, 16)))), policy=policy)
        x = jax.ShapeDtypeStruct((1, 64, 1, 4), np.float32)
        return len(loops(jax.grad(block, (0, 1, 2)), x, x, x))

    assert (passes(), passes("attention")) == (3, 2)


def loops(function, *shapes):
    """The trips of each scan of a function's program."""
    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jaxprs_in_params(equation.params):
                yield from equations(inner)

    found = equations(jax.make_jaxpr(function)(*shapes).jaxpr)
    return [equation.params["length"] for equation in found if equation.primitive.name == "scan"]


@pytest.fixture(scope="module")
def by_terms():
    """The attention of 24 tokens of a row, in any order, to the same tokens in three terms; and its gradients."""
    @jax.jit
    def run(q, k, v, dout, place, segments):
        def merged(q, k, v):
            total = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], chunked.ABSENT)
            for part in (slice(0, 9), slice(9, 10), slice(10, 24)):
                total = chunked.merge(*total, *chunked.partial_attention(
                    q, k[:, part], v[:, part], q_position_T=place, k_position_S=place[part], q_segment_BT=segments,
                    k_segment_BS=segments[:, part], scale=SCALE, window=7, soft_cap=3.0, block=(8, 4)))
            return total[0]

        out, transpose = jax.vjp(merged, q, k, v)
        return out, *transpose(dout)

    return run


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(24)), st.lists(st.integers(0, 23), min_size=2, max_size=4))
def test_terms_put_together_in_any_order(by_terms, order, ends):
    """A device may hold any stretch of a row: what it computes depends on the places that it is told."""
    case = Case(T=24, S=24, window=7, soft_cap=3.0)
    place = np.array(order, np.int32)
    segments = np.stack([np.searchsorted(np.sort(e), place, side="right") for e in (ends[:1], ends[1:])])
    allowed = (place <= place[:, None]) & (place[:, None] - place < 7) & (segments[:, :, None] == segments[:, None])
    q, k, v, dout = case.inputs()
    got = by_terms(q, k, v, dout, place, segments.astype(np.int32))
    assert_close(got, expected(q, k, v, dout, allowed, SCALE, 3.0), 5e-6)


def test_a_term_without_visible_keys_weighs_nothing():
    q, k, v, _ = Case(T=4, S=4).inputs()
    at = jnp.arange(4)
    late = functools.partial(chunked.partial_attention, scale=SCALE, q_position_T=at)
    out, log_sum = late(q, np.nan * k, np.nan * v, k_position_S=at + 4)  # finite: the block is not even read
    assert np.all(np.isfinite(out)) and np.all(log_sum < -1e29)
    real = late(q, k, v, k_position_S=at)
    for first, second in itertools.permutations([real, (out, log_sum)]):
        np.testing.assert_allclose(chunked.merge(*first, *second)[0], real[0], atol=1e-6)


def test_memory_grows_with_the_length_and_not_with_its_square():
    """Forward and backward, compiled only; 32,768 tokens would need 8 GiB a head for their scores."""
    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), np.float32)
        def loss(q, k, v):
            return jnp.sum(chunked.chunked_attention(q, k, v, scale=0.25))

        memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    short, long = temporary(8192), temporary(32768)
    assert long / short < 4.5 and long < 2**26


def test_a_long_row_runs():
    """8,192 tokens, forward and backward, against the same row in blocks of another size; some queries in float64."""
    case = Case(T=8192, S=8192, H=1, G=1, K=8, V=8)
    q, k, v, dout = (x[:1] for x in case.inputs())
    got = results(functools.partial(chunked.chunked_attention, scale=SCALE), q, k, v, dout)
    for t in (0, 700, 8191):
        scores = np.asarray(k, np.float64)[0, :t + 1, 0] @ np.asarray(q, np.float64)[0, t, 0] * SCALE
        p = np.exp(scores - scores.max())
        np.testing.assert_allclose(got[0][0, t, 0], p @ np.asarray(v, np.float64)[0, :t + 1, 0] / p.sum(), atol=1e-5)
    assert all(np.all(np.isfinite(x)) for x in got)
