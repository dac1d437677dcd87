"""Attention over whole rows, against float64 NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.attention import DenseContext, attention
from tests.kernels import reference

G, K = 2, 8
SCALE = 0.5  # not K^-0.5: what is asked for must be what is used


def drawn(seed, *shapes):
    """Scores reach several units, so that a soft cap bends them and a wrong mask shows."""
    rng = np.random.default_rng(seed)
    return [(1.5 * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "value_dim"))
def run(q, k, v, context, **options):
    return attention(q, k, v, context, **options)


def dense(q, k, v, context=None, **options):
    context = context or DenseContext()
    return run(q[None], k[None], None if v is None else v[None], context, scale=SCALE, **options)[0][0]


class TestDense:
    @pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
    @pytest.mark.parametrize("soft_cap", [None, 2.0])
    def test_windows_and_soft_caps(self, window, soft_cap):
        q, k, v = drawn(0, (9, 4, K), (9, G, K), (9, G, K))
        expected = reference.attend(q, k, v, reference.causal(window), SCALE, soft_cap)
        np.testing.assert_allclose(dense(q, k, v, window=window, soft_cap=soft_cap), expected, atol=2e-6)

    @pytest.mark.parametrize("window", [None, 3])
    def test_packed_documents(self, window):
        q, k, v = drawn(1, (11, 4, K), (11, G, K), (11, G, 5))  # values narrower than keys
        segments = np.array([1] * 5 + [2] * 4 + [0] * 2)
        got = dense(q, k, v, DenseContext(jnp.asarray(segments)[None]), window=window)
        in_window = reference.causal(window)
        expected = reference.attend(q, k, v, lambda t, s: in_window(t, s) and segments[t] == segments[s], SCALE)
        np.testing.assert_allclose(got, expected, atol=2e-6)

    def test_an_encoder_sees_both_ways_and_no_padding(self):
        q, k, v = drawn(2, (7, 4, K), (7, G, K), (7, G, K))
        segments = np.array([1, 1, 1, 1, 1, 0, 0])
        got = dense(q, k, v, DenseContext(jnp.asarray(segments)[None], causal=False))
        expected = reference.attend(q, k, v, lambda t, s: segments[t] == segments[s], SCALE)
        np.testing.assert_allclose(got, expected, atol=2e-6)
        everything = reference.attend(q, k, v, lambda t, s: True, SCALE)
        np.testing.assert_allclose(dense(q, k, v, DenseContext(causal=False)), everything, atol=2e-6)

    def test_cross_attention(self):
        """More keys than queries; documents packed on both sides, or one document whose keys end in padding."""
        q, k, v = drawn(3, (4, 4, K), (9, G, K), (9, G, 3))
        queries, keys = np.array([1, 1, 2, 2]), np.array([1, 1, 1, 2, 2, 2, 2, 0, 0])
        got = dense(q, k, v, DenseContext(jnp.asarray(queries)[None], jnp.asarray(keys)[None], causal=False))
        expected = reference.attend(q, k, v, lambda t, s: queries[t] == keys[s], SCALE)
        np.testing.assert_allclose(got, expected, atol=2e-6)
        got = dense(q, k, v, DenseContext(None, jnp.asarray(keys)[None], causal=False))
        np.testing.assert_allclose(got, reference.attend(q, k, v, lambda t, s: keys[s] != 0, SCALE), atol=2e-6)

    def test_a_bias_is_added_to_the_scores(self):
        q, k, v, bias = drawn(4, (6, 4, K), (6, G, K), (6, G, K), (4, 6, 6))
        for context, sees in ((DenseContext(), reference.causal()), (DenseContext(causal=False), lambda t, s: True)):
            np.testing.assert_allclose(dense(q, k, v, context, bias_HTS=bias),
                                       reference.attend(q, k, v, sees, SCALE, bias=bias), atol=2e-6)

    def test_values_within_keys(self):
        q, k = drawn(5, (6, 4, K), (6, 1, K))
        expected = reference.attend(q, k, k[..., :3], reference.causal(), SCALE)
        np.testing.assert_allclose(dense(q, k, None, value_dim=3), expected, atol=2e-6)

    def test_what_has_no_meaning_is_refused(self):
        q, k, v = drawn(6, (4, 4, K), (9, G, K), (9, G, K))
        with pytest.raises(ValueError, match="4 queries and 9 keys"):
            dense(q, k, v)
        with pytest.raises(ValueError, match="needs causal"):
            dense(q, q, q, DenseContext(causal=False), window=3)
