"""The Triton kernel, interpreted, against float64 NumPy: sequences that grow on scattered pages, whatever lies in the
slots that nobody may read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import paged_triton
from llm_jax.kernels.paged import PagedContext, make_pool
from tests.kernels import reference

PAGE, PAGES, TABLE, CHUNK, ROWS = 4, 40, 12, 10, 2  # pages of a table; rows of either kind
PROMPTS, LENGTHS = [37, 9, 24], [45, 17, 29]  # tokens of the prompts, and of the sequences in the end
SCALE = 0.125


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """16 queries and 16 keys a program, so that short sequences take several of both; no splits unless asked for."""
    monkeypatch.setattr(paged_triton, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(paged_triton, "BLOCK_QUERIES", 16)


def drawn(seed, *shapes):
    """Scores reach several units, so that a soft cap bends them and a wrong mask shows."""
    rng = np.random.default_rng(seed)
    return [(1.5 * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


def step_of(decode_width, **options):
    def step(q, k, v, position, slot, table, length, pools):
        context = PagedContext(position, slot, ROWS, CHUNK, table_RP=table, length_R=length, decode_width=decode_width,
                               backend="triton")
        return paged_triton.attend(q[None], k[None], v[None], context, pools, scale=SCALE, interpret=True, **options)

    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what takes time here


class Rows:
    """Sequences and their pages. `serve` writes and attends to the next tokens of some of them in one step."""

    def __init__(self, data, widths, decode_width=1, dtype="float32", window=None, **options):
        self.data, self.width, self.window = data, decode_width, window
        self.step = step_of(decode_width, window=window, **options)
        order = np.random.default_rng(7).permutation(PAGES)
        self.tables = [order[i * TABLE:(i + 1) * TABLE] for i in range(len(data))]
        self.done = [0] * len(data)
        self.out = [[] for _ in data]
        self.pools = tuple(jnp.full_like(pool, jnp.nan) for pool in make_pool(PAGES, PAGE, widths, dtype, "triton"))
        self.dtype = dtype

    def serve(self, decode, prefill):
        """decode, prefill: at most ROWS (sequence, tokens) or None for an empty row, each."""
        N = ROWS * (self.width + CHUNK)
        q, k, v = (np.zeros((N, *a.shape[1:]), np.float32) for a in self.data[0])
        position, slot = np.full(N, -1, np.int32), np.full(N, PAGES * PAGE, np.int32)
        table, length = np.full((2 * ROWS, TABLE), PAGES, np.int32), np.zeros(2 * ROWS, np.int32)
        placed = []
        for row, entry in enumerate([*decode, *[None] * (ROWS - len(decode)), *prefill]):
            if entry is None:
                continue
            s, count = entry
            at = row * self.width if row < ROWS else ROWS * self.width + (row - ROWS) * CHUNK
            span = np.arange(self.done[s], self.done[s] + count)
            for target, source in zip((q, k, v), self.data[s], strict=True):
                target[at:at + count] = source[span]
            position[at:at + count] = span
            slot[at:at + count] = self.tables[s][span // PAGE] * PAGE + span % PAGE
            past = np.arange(max(0, self.done[s] - self.window + 1) if self.window else 0)
            if len(past):  # slots that have fallen out of the window
                at_past = self.tables[s][past // PAGE], past % PAGE
                self.pools = tuple(np.array(pool) for pool in self.pools)
                for pool in self.pools:
                    pool[:, *at_past] = np.nan
            self.done[s] += count
            used = -(-self.done[s] // PAGE)
            table[row, :used], length[row] = self.tables[s][:used], self.done[s]
            placed.append((s, at, count))
        q, k, v = (jnp.asarray(a, self.dtype) for a in (q, k, v))
        out, self.pools = self.step(q, k, v, position, slot, table, length, self.pools)
        out = np.asarray(out[0], np.float32)
        np.testing.assert_array_equal(out[position < 0], 0)  # padding, and rows of nobody
        for s, at, count in placed:
            self.out[s].append(out[at:at + count])

    def serve_all(self):
        """Prompts in chunks while others decode, until every sequence has its length."""
        while self.done != LENGTHS:
            waiting = [s for s in range(len(LENGTHS)) if self.done[s] < PROMPTS[s]]
            running = [s for s in range(len(LENGTHS)) if s not in waiting and self.done[s] < LENGTHS[s]]
            self.serve([(s, min(self.width, LENGTHS[s] - self.done[s])) for s in running[:ROWS]],
                       [(s, min(CHUNK, PROMPTS[s] - self.done[s])) for s in waiting[:ROWS]])
        return [np.concatenate(out) for out in self.out]


CASES = {  # query heads, (G, K, V), splits, options
    "a head each, 64 wide": (2, (2, 64, 64), 1, {}),
    "grouped, 80 wide, split": (6, (2, 80, 80), 3, {}),
    "128 wide, narrow values, soft cap": (4, (1, 128, 40), 1, {"soft_cap": 2.0}),
    "three tokens a row, split": (4, (2, 64, 64), 3, {"decode_width": 3}),
    "window": (4, (2, 16, 16), 1, {"window": 19}),
    "window, soft cap, three tokens a row, split": (6, (2, 16, 16), 2,
                                                    {"window": 6, "soft_cap": 2.0, "decode_width": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_paged(case, monkeypatch):
    """Unwritten slots, pages of nobody and slots out of a window hold NaN."""
    heads, (g, key_width, value_width), splits, options = CASES[case]
    monkeypatch.setattr(paged_triton, "_num_splits", lambda *args: splits)
    data = [drawn(i, (n, heads, key_width), (n, g, key_width), (n, g, value_width)) for i, n in enumerate(LENGTHS)]
    got = Rows(data, (g, key_width, value_width), **options).serve_all()
    for out, (q, k, v) in zip(got, data, strict=True):
        sees = reference.causal(options.get("window"))
        np.testing.assert_allclose(out, reference.attend(q, k, v, sees, SCALE, options.get("soft_cap")), atol=1e-5)


def test_bfloat16():
    """Products of bfloat16 are summed in float32: all that is lost is the rounding of weights and outputs."""
    shapes = [(45, 4, 64), (45, 2, 64), (45, 2, 64)]
    data = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in drawn(0, *shapes)]
    rows = Rows([data], (2, 64, 64), dtype="bfloat16")
    for count in (10, 10, 10, 10):
        rows.serve([], [(0, count)])
    for _ in range(5):
        rows.serve([(0, 1)], [])
    got, expected = np.concatenate(rows.out[0]), reference.attend(*data, reference.causal(), SCALE)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 5e-3


def test_other_rows_change_no_bit(monkeypatch):
    monkeypatch.setattr(paged_triton, "_num_splits", lambda *args: 2)
    data = [drawn(i, *[(n, 2, 16)] * 3) for i, n in enumerate(LENGTHS)]
    alone, together = (Rows(data, (2, 16, 16)) for _ in range(2))
    together.step = alone.step
    for count in (10, 7, 10, 10):
        alone.serve([], [(0, count)])
        together.serve([], [(0, count)])
    together.serve([], [(1, 9), (2, 10)])
    alone.serve([(0, 1)], [])
    together.serve([(0, 1), (1, 1)], [(2, 10)])
    np.testing.assert_array_equal(alone.out[0][-1], together.out[0][-1])


class TestSplits:
    """What decides how many programs share a row's keys."""

    @pytest.mark.parametrize("tokens", [4096, 8192, 32768])
    def test_one_row_fills_the_gpu(self, tokens):
        assert 8 * paged_triton._num_splits(8, 16, tokens) >= 132

    def test_a_full_batch_is_not_split(self):
        assert paged_triton._num_splits(64 * 8, 16, 4096) == 1

    def test_a_row_of_many_is_not_left_to_one_program(self):
        assert 32768 / paged_triton._num_splits(64 * 8, 16, 32768) <= 8192

    def test_short_contexts_are_not_cut_to_crumbs(self):
        assert paged_triton._num_splits(8, 16, 512) <= 4
        assert paged_triton._num_splits(1, 16, 64) == 1
        assert paged_triton._num_splits(1, 16, 1 << 20) <= 128


@pytest.mark.parametrize(("widths", "heads", "dtype", "reason"), [
    ((8, 128, 128), 32, "bfloat16", None),
    ((1, 576, 0), 16, "bfloat16", "latent"),
    ((8, 128, 128), 12, "bfloat16", "12 query heads do not share 8"),
    ((8, 512, 512), 32, "bfloat16", "512 entries is wider than 256"),
    ((8, 128, 128), 32, "int8", "not int8"),
])
def test_what_it_serves(widths, heads, dtype, reason):
    got = paged_triton.supports(widths, heads, dtype)
    assert got is None if reason is None else reason in got


def test_what_it_needs_is_asked_for():
    q, k = drawn(0, (1, 1, 2, 16), (1, 1, 2, 16))
    pools = make_pool(PAGES, PAGE, (2, 16, 16), "float32", "triton")
    context = PagedContext(np.zeros(1, np.int32), np.zeros(1, np.int32), 1, CHUNK)
    with pytest.raises(ValueError, match="no page tables"):
        paged_triton.attend(q, k, k, context, pools, scale=SCALE)
    with pytest.raises(ValueError, match="values of their own"):
        paged_triton.attend(q, k, None, context, pools[:1], scale=SCALE, value_dim=8)
