"""Attention over pages equals attention over rows, wherever the pages lie and whatever else is in them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.attention import DenseContext, attention
from llm_jax.kernels.paged import PagedContext, WorkList, make_pool
from tests.models import reference

G, K, PAGE, PAGES, CHUNK = 2, 8, 4, 40, 5


def dense(q, k, v):
    return attention(q[None], k[None], v[None], DenseContext())[0][0]


def test_dense_equals_float64():
    q, k, v = (np.random.default_rng(i).normal(size=(9, h, K)) for i, h in enumerate((4, G, G)))
    expected = np.stack([reference.attend(q[t], k[:t + 1], v[:t + 1]) for t in range(9)])
    np.testing.assert_allclose(dense(*(jnp.asarray(a, jnp.float32) for a in (q, k, v))), expected, atol=1e-6)


def work_list(rows, capacity=24):
    """rows: (row, pages in order)."""
    items = [(row, page, i * PAGE) for row, pages in rows for i, page in enumerate(pages)]
    padded = np.array(items + [(0, 0, 0)] * (capacity - len(items)), np.int32)
    return WorkList(*padded.T, np.int32(len(items)))


@pytest.mark.parametrize("heads", [2, 6])
def test_paged_equals_dense(heads):
    """Sequences grow chunk by chunk and token by token, on scattered pages, in steps that mix both; unwritten slots
    and pages of nobody hold NaN."""
    rng = np.random.default_rng(heads)
    lengths = [17, 6, 11]  # tokens of each sequence
    data = [tuple(rng.normal(size=(n, h, K)).astype(np.float32) for h in (heads, G, G)) for n in lengths]
    order = rng.permutation(PAGES)
    tables = [order[i * 5:i * 5 + -(-n // PAGE)] for i, n in enumerate(lengths)]
    done = [0, 0, 0]
    got = [[], [], []]
    pools = tuple(jnp.full_like(pool, jnp.nan) for pool in make_pool(PAGES, PAGE, G, K, "float32"))
    num_decode, num_prefill = 3, 2
    step = jax.jit(attention)
    # (decoding sequences, [(prefilling sequence, tokens)])
    for decode, prefill in [([], [(0, 5), (1, 5)]), ([1], [(0, 4), (2, 5)]), ([0], [(2, 3)]), ([2, 0], []),
                            ([0], [(2, 2)]), ([0], []), ([0], []), ([0], []), ([0], []), ([0], [])]:
        N = num_decode + num_prefill * CHUNK
        q, k, v = (np.zeros((N, h, K), np.float32) for h in (heads, G, G))
        position, slot = np.full(N, -1, np.int32), np.full(N, PAGES * PAGE, np.int32)
        placed = []
        entries = [(s, 1, i) for i, s in enumerate(decode)]
        entries += [(s, n, num_decode + i * CHUNK) for i, (s, n) in enumerate(prefill)]
        for s, count, at in entries:
            span = np.arange(done[s], done[s] + count)
            for target, source in zip((q, k, v), data[s], strict=True):
                target[at:at + count] = source[span]
            position[at:at + count] = span
            slot[at:at + count] = tables[s][span // PAGE] * PAGE + span % PAGE
            done[s] += count
            placed.append((s, at, count))

        def live(s):
            return tables[s][:-(-done[s] // PAGE)]

        context = PagedContext(position, slot, work_list([(i, live(s)) for i, s in enumerate(decode)]),
                               work_list([(i, live(s)) for i, (s, _) in enumerate(prefill)]), num_decode, CHUNK)
        out, pools = step(q[None], k[None], v[None], context, pools)
        for s, at, count in placed:
            got[s].append(np.asarray(out[0, at:at + count]))
    assert done == lengths
    for s, rows in enumerate(got):
        np.testing.assert_allclose(np.concatenate(rows), dense(*map(jnp.asarray, data[s])), atol=1e-5)


def test_work_list_longer_than_one_group():
    """More items than one trip takes, the last trip partly filled."""
    rng = np.random.default_rng(3)
    n = 37 * PAGE - 1
    q, k, v = (rng.normal(size=(n, h, K)).astype(np.float32) for h in (4, G, G))
    table = rng.permutation(PAGES)[:37]
    pools = make_pool(PAGES, PAGE, G, K, "float32")
    slots = table[np.arange(n) // PAGE] * PAGE + np.arange(n) % PAGE
    filled = tuple(p.at[:, s // PAGE, s % PAGE].set(jnp.swapaxes(jnp.asarray(new), 0, 1))
                   for p, new in zip(pools, (k, v), strict=True) for s in [slots])
    empty = WorkList(*np.zeros((3, 1), np.int32), np.int32(0))
    context = PagedContext(np.array([n - 1], np.int32), slots[-1:].astype(np.int32), work_list([(0, table)], 41), empty,
                           1, CHUNK)
    out, _ = jax.jit(attention)(q[None, -1:], k[None, -1:], v[None, -1:], context, filled)
    np.testing.assert_allclose(out[0, 0], dense(*map(jnp.asarray, (q, k, v)))[-1], atol=1e-5)
