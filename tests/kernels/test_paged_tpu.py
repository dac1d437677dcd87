"""Paged attention for TPU against float64 NumPy, on a CPU: the caller over JAX's reference of the kernel, and over the
kernel itself, interpreted. That it compiles for TPUs is tests/tpu's to show."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged

from llm_jax.kernels import paged_tpu
from llm_jax.kernels.paged import PagedContext
from tests.kernels import reference

PAGE, PAGES, PAGES_PER_ROW, CHUNK, SCALE = 4, 20, 5, 6, 0.5
DECODE, PREFILL = 4, 2  # rows
LENGTHS = [14, 6, 10]  # tokens of each sequence
# Steps of (row, sequence, tokens), rows from DECODE on being prefilling ones: rows in any order, with empty ones
# before, between and after, a step that only decodes, one that only prefills, one with no tokens at all.
ONE = [[(4, 0, 6), (5, 1, 5)], [(2, 1, 1), (4, 2, 6)], [(5, 2, 3), (4, 0, 6)], [], [(3, 2, 1), (1, 0, 1)], [(0, 0, 1)]]
# The same with up to three tokens a decoding row.
THREE = [[(5, 0, 6)], [(4, 1, 3), (1, 0, 2)], [(0, 1, 3), (3, 0, 3), (4, 2, 6)], [], [(1, 2, 2), (2, 0, 3)],
         [(3, 2, 2)]]
CASES = {  # heads, (G, K, V), tokens of a decoding row, options
    "grouped, narrow values, soft cap": (6, (2, 128, 5), 1, {"soft_cap": 2.0}),
    "three tokens a decoding row, window": (4, (2, 8, 8), 3, {"window": 3}),
    "a key/value head each, which no tile fits": (5, (5, 8, 8), 1, {"window": 6}),
}


def referred(q, pool, lengths, tables, ends, num_rows, *, num_kv_pages_per_block, num_queries_per_block,
             vmem_limit_bytes, **options):
    """The kernel by its reference: held to what the kernel asks for, and leaving NaN where it leaves anything."""
    blocks = {"num_kv_pages_per_block": num_kv_pages_per_block, "num_queries_per_block": num_queries_per_block}
    rows_at = [np.asarray(a) for a in (lengths, tables, ends, num_rows)]
    ragged.dynamic_validate_inputs(q, pool, *rows_at, **blocks, **options)
    rows, ends = int(num_rows[0]), rows_at[2]
    # What its own check leaves out: it starts copies for rows without tokens, and never waits for them.
    assert rows >= 1 and ends[0] == 0 and np.all(np.diff(ends[:rows + 1]) >= 1)
    # Compiled whole: every operation would be compiled for every length.
    out = jax.jit(lambda q, pool: ragged.ref_ragged_paged_attention(q, pool, *rows_at, **options))(q, pool)
    return jnp.full_like(q, jnp.nan).at[:len(out)].set(out)


class Loaded:
    """A buffer whose reshaped view is read: the interpreter reads no such views."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def reshape(self, *shape):
        return Loaded(self.array.reshape(*shape))

    def __getitem__(self, index):
        return self.array[index]


@pytest.fixture
def by_reference(monkeypatch):
    monkeypatch.setattr(paged_tpu, "kernel", referred)
    return lambda *args, **options: paged_tpu.attend(*jax.tree.map(jnp.asarray, args), **options)


@pytest.fixture
def interpreted(monkeypatch):
    """`attend` with the kernel in JAX's interpreter of TPU kernels, but for two things that it cannot do: reading a
    reshaped view, and storing under a mask where a later axis is the shorter one."""
    copy = ragged.kernel.MultiPageAsyncCopyDescriptor
    wait = copy.wait
    monkeypatch.setattr(copy, "wait", lambda self: Loaded(wait(self)[...]))

    def store(ref, value, *, mask):
        ref[...] = jnp.where(mask, value, ref[...])

    monkeypatch.setattr(pltpu, "store", store)
    # Rows of several blocks of keys, blocks of several rows' queries, rows that cross blocks.
    monkeypatch.setattr(paged_tpu, "_BLOCK_TOKENS", 2 * PAGE)
    monkeypatch.setattr(paged_tpu, "_PREFILL_QUERIES", 4)
    run = jax.jit(paged_tpu.attend, static_argnames=("scale", "window", "soft_cap"))
    with pltpu.force_tpu_interpret_mode():
        yield run


def drawn(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [(1.5 * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


def largest_error(attend, heads, widths, width, options, num_steps=None):
    """Sequences grow by chunks and by a few tokens, on scattered pages, in steps that mix both. Unwritten slots and
    pages of nobody hold NaN, the spare one included; slots fallen out of the window hold large numbers."""
    g, key_width, value_width = widths
    window = options.get("window")
    shapes = [(heads, key_width), (g, key_width), (g, value_width)]
    data = [drawn(i, *((n, *shape) for shape in shapes)) for i, n in enumerate(LENGTHS)]
    order = np.random.default_rng(7).permutation(PAGES)
    tables = [order[i * PAGES_PER_ROW:][:-(-n // PAGE)] for i, n in enumerate(LENGTHS)]
    pool = np.full_like(paged_tpu.make_pool_tpu(PAGES, PAGE, widths, "float32")[0], np.nan)
    done, got = [0] * 3, [[], [], []]
    for rows in (ONE if width == 1 else THREE)[:num_steps]:
        N = DECODE * width + PREFILL * CHUNK
        q, k, v = (np.full((1, N, *shape), np.nan, np.float32) for shape in shapes)
        position, slot = np.full(N, -1, np.int32), np.full(N, PAGES * PAGE, np.int32)
        table = np.full((DECODE + PREFILL, PAGES_PER_ROW), PAGES, np.int32)
        length = np.zeros(DECODE + PREFILL, np.int32)
        placed = []
        for row, s, count in rows:
            at = row * width if row < DECODE else DECODE * width + (row - DECODE) * CHUNK
            span = np.arange(done[s], done[s] + count)
            for target, source in zip((q, k, v), data[s], strict=True):
                target[0, at:at + count] = source[span]
            position[at:at + count] = span
            slot[at:at + count] = tables[s][span // PAGE] * PAGE + span % PAGE
            past = np.arange(max(0, done[s] - window + 1) if window else 0)
            pool[tables[s][past // PAGE], past % PAGE] = 1e4
            done[s] += count
            used = tables[s][:-(-done[s] // PAGE)]
            table[row, :len(used)], length[row] = used, done[s]
            placed.append((s, slice(at, at + count)))
        out, (pool,) = attend(q, k, v, PagedContext(position, slot, DECODE, CHUNK, table_RP=table, length_R=length,
                                                    decode_width=width, backend="tpu"), (pool,), scale=SCALE, **options)
        out, pool = np.asarray(out[0]), np.array(pool)
        assert not out[position < 0].any()
        for s, at in placed:
            got[s].append(out[at])
    errors = []
    for rows, count, (q, k, v) in zip(got, done, data, strict=True):
        expected = reference.attend(q, k, v, reference.causal(window), SCALE, options.get("soft_cap"))
        errors.append(np.abs(np.concatenate(rows) - expected[:count]).max())
    return max(errors)


@pytest.mark.parametrize("case", list(CASES)[:2])
def test_the_caller_with_the_reference(case, by_reference):
    """Few steps: lengths are part of the reference's program, which is compiled for each."""
    assert largest_error(by_reference, *CASES[case], num_steps=4) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_the_caller_with_the_kernel(case, interpreted):
    assert largest_error(interpreted, *CASES[case]) < 5e-3


def test_keys_and_values_alternate():
    """Heads and widths that are added hold zeros, and slots that nobody wrote stay."""
    (pool,) = paged_tpu.make_pool_tpu(3, 2, (3, 5, 4), "float32")
    assert pool.shape == (4, 2, 8, 128)
    k, v = drawn(0, (2, 3, 5), (2, 3, 4))
    got = np.array(paged_tpu.write(pool + 7, k, v, np.array([5, 0])))
    for (page, offset), keys, values in zip([(2, 1), (0, 0)], k, v, strict=True):
        np.testing.assert_array_equal(got[page, offset, 0:6:2, :5], keys)
        np.testing.assert_array_equal(got[page, offset, 1:6:2, :4], values)
        assert not got[page, offset, 6:].any() and not got[page, offset, :, 5:].any()
    got[[2, 0], [1, 0]] = 7
    assert np.all(got == 7)


@pytest.mark.parametrize("dtype, heads", [("bfloat16", {1: 1, 2: 2, 3: 4, 5: 8, 8: 8, 9: 16}),
                                          ("float32", {1: 1, 2: 2, 3: 4, 5: 8, 10: 12})])
def test_heads_are_rounded_up_to_tiles(dtype, heads):
    got = {g: paged_tpu.make_pool_tpu(1, 1, (g, 64, 64), dtype)[0].shape[2] // 2 for g in heads}
    assert got == heads


def test_what_is_supported():
    assert paged_tpu.supports((8, 128, 128), 32, "bfloat16") is None
    assert paged_tpu.supports((3, 64, 64), 9, "float32", rows=68, pages_per_row=256) is None
    assert "latent" in paged_tpu.supports((1, 576, 0), 32, "bfloat16")
    assert "at most 128 entries, not 256" in paged_tpu.supports((4, 256, 256), 8, "bfloat16")
    assert "not int8" in paged_tpu.supports((8, 128, 128), 32, "int8")
    assert "larger pages" in paged_tpu.supports((8, 128, 128), 32, "bfloat16", rows=256, pages_per_row=1024)


def test_what_it_cannot_do_is_refused():
    q, = drawn(0, (1, 1, 2, 8))
    pool = paged_tpu.make_pool_tpu(1, 1, (2, 8, 8), "float32")
    context = functools.partial(PagedContext, np.zeros(1, np.int32), np.zeros(1, np.int32), 1, 4, backend="tpu")
    with pytest.raises(ValueError, match="latent"):
        paged_tpu.attend(q, q, None, context(), pool, scale=1.0)
    with pytest.raises(ValueError, match="table_RP and length_R"):
        paged_tpu.attend(q, q, q, context(), pool, scale=1.0)
