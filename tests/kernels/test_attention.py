"""Attention over whole rows and over pages, each against float64 NumPy; wherever the pages lie and whatever else is in
them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.attention import DenseContext, attention
from llm_jax.kernels.paged import PagedContext, WorkList, make_pool
from tests.kernels import reference

G, K, PAGE, PAGES, CHUNK = 2, 8, 4, 40, 5
SCALE = 0.5  # not K^-0.5: what is asked for must be what is used


def drawn(seed, *shapes):
    """Scores reach several units, so that a soft cap bends them and a wrong mask shows."""
    rng = np.random.default_rng(seed)
    return [(1.5 * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "value_dim"))
def run(q, k, v, context, cache=None, **options):
    return attention(q, k, v, context, cache, **options)


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


def work_list(rows, capacity=24):
    """rows: (row, pages in order, the first of them that is read)."""
    items = [(row, page, i * PAGE) for row, pages, first in rows for i, page in enumerate(pages) if i >= first]
    padded = np.array(items + [(0, 0, 0)] * (capacity - len(items)), np.int32)
    return WorkList(*padded.T, np.int32(len(items)))


CASES = {  # heads, (G, K, V), options
    "plain": (2, (G, K, K), {}),
    "grouped": (6, (G, K, K), {}),
    "narrow values, soft cap": (4, (G, K, 5), {"soft_cap": 2.0}),
    "window": (4, (G, K, K), {"window": 6}),
    "window of one page": (4, (G, K, K), {"window": PAGE}),
    "window of one token": (4, (G, K, K), {"window": 1}),
    "window, soft cap": (4, (G, K, K), {"window": 3, "soft_cap": 2.0}),
    "latent": (6, (1, K, 0), {"value_dim": 5}),
    "latent, window": (6, (1, K, 0), {"value_dim": 5, "window": 7}),
}


@pytest.mark.parametrize("case", CASES)
def test_paged(case):
    """Sequences grow chunk by chunk and token by token, on scattered pages, in steps that mix both. Unwritten slots and
    pages of nobody hold NaN, and so does every slot that has fallen out of its sequence's window."""
    heads, (g, key_width, value_width), options = CASES[case]
    window = options.get("window")
    shapes = [(heads, key_width), (g, key_width), (g, value_width)]
    lengths = [17, 6, 11]  # tokens of each sequence
    data = [drawn(i, *((n, *shape) for shape in shapes)) for i, n in enumerate(lengths)]
    order = np.random.default_rng(7).permutation(PAGES)
    tables = [order[i * 5:i * 5 + -(-n // PAGE)] for i, n in enumerate(lengths)]
    done = [0, 0, 0]
    got = [[], [], []]
    pools = [np.full_like(pool, np.nan) for pool in make_pool(PAGES, PAGE, (g, key_width, value_width), "float32")]
    assert len(pools) == (2 if value_width else 1)
    num_decode, num_prefill = 3, 2
    # (decoding sequences, [(prefilling sequence, tokens)])
    for decode, prefill in [([], [(0, 5), (1, 5)]), ([1], [(0, 4), (2, 5)]), ([0], [(2, 3)]), ([2, 0], []),
                            ([0], [(2, 2)]), ([0], []), ([0], []), ([0], []), ([0], []), ([0], [])]:
        N = num_decode + num_prefill * CHUNK
        q, k, v = (np.zeros((N, *shape), np.float32) for shape in shapes)
        position, slot = np.full(N, -1, np.int32), np.full(N, PAGES * PAGE, np.int32)
        placed, lists = [], []
        for entries in ([(s, 1, i) for i, s in enumerate(decode)],
                        [(s, n, num_decode + i * CHUNK) for i, (s, n) in enumerate(prefill)]):
            rows = []
            for row, (s, count, at) in enumerate(entries):
                span = np.arange(done[s], done[s] + count)
                for target, source in zip((q, k, v), data[s], strict=True):
                    target[at:at + count] = source[span]
                position[at:at + count] = span
                slot[at:at + count] = tables[s][span // PAGE] * PAGE + span % PAGE
                past = np.arange(max(0, done[s] - window + 1) if window else 0)
                for pool in pools:
                    pool[:, tables[s][past // PAGE], past % PAGE] = np.nan
                done[s] += count
                rows.append((row, tables[s][:-(-done[s] // PAGE)], len(past) // PAGE))
                placed.append((s, at, count))
            lists.append(work_list(rows))
        # With a window, the lists of other layers are there too, and must not be read.
        lists = lists if window is None else [work_list([]), work_list([]), *lists]
        out, pools = run(q[None], k[None], v[None] if value_width else None,
                         PagedContext(position, slot, num_decode, CHUNK, *lists), tuple(pools), scale=SCALE, **options)
        pools = [np.array(pool) for pool in pools]
        for s, at, count in placed:
            got[s].append(np.asarray(out[0, at:at + count]))
    assert done == lengths
    for rows, (q, k, v) in zip(got, data, strict=True):
        v = v if value_width else k[..., :options["value_dim"]]
        expected = reference.attend(q, k, v, reference.causal(window), SCALE, options.get("soft_cap"))
        np.testing.assert_allclose(np.concatenate(rows), expected, atol=1e-5)


def test_a_layer_without_its_work_lists_is_refused():
    q, k = drawn(0, (1, 4, K), (1, G, K))
    context = PagedContext(np.zeros(1, np.int32), np.zeros(1, np.int32), 1, CHUNK, work_list([]), work_list([]))
    with pytest.raises(ValueError, match="no work lists for layers with a window"):
        run(q[None], k[None], k[None], context, make_pool(PAGES, PAGE, (G, K, K), "float32"), scale=SCALE, window=3)


def test_work_list_longer_than_one_group():
    """More items than one trip takes, the last trip partly filled."""
    n = 37 * PAGE - 1
    q, k, v = drawn(3, (n, 4, K), (n, G, K), (n, G, K))
    table = np.random.default_rng(3).permutation(PAGES)[:37]
    slots = table[np.arange(n) // PAGE] * PAGE + np.arange(n) % PAGE
    filled = tuple(p.at[:, slots // PAGE, slots % PAGE].set(jnp.swapaxes(jnp.asarray(new), 0, 1))
                   for p, new in zip(make_pool(PAGES, PAGE, (G, K, K), "float32"), (k, v), strict=True))
    empty = WorkList(*np.zeros((3, 1), np.int32), np.int32(0))
    context = PagedContext(np.array([n - 1], np.int32), slots[-1:].astype(np.int32), 1, CHUNK,
                           work_list([(0, table, 0)], 41), empty)
    out, _ = run(q[None, -1:], k[None, -1:], v[None, -1:], context, filled, scale=SCALE)
    np.testing.assert_allclose(out[0, 0], dense(q, k, v)[-1], atol=1e-5)
