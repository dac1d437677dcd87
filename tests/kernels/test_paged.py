"""Attention over pages against float64 NumPy: wherever the pages lie and whatever else is in them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import paged_xla
from llm_jax.kernels.attention import DenseContext, attention
from llm_jax.kernels.paged import (
    PagedContext,
    WorkList,
    cache_bytes_per_token,
    head_axis,
    make_pool,
    page_axis,
    put_pages,
    take_pages,
)
from llm_jax.kernels.quantized_cache import from_bits, is_quantized, quantize, worst_like
from tests.kernels import reference

G, K, PAGE, PAGES, CHUNK = 2, 8, 4, 40, 5
SCALE = 0.5  # not K^-0.5: what is asked for must be what is used


def drawn(seed, *shapes):
    """Scores reach several units, so that a soft cap bends them and a wrong mask shows."""
    rng = np.random.default_rng(seed)
    return [(1.5 * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "value_dim"))
def run(q, k, v, context, cache, **options):
    return attention(q, k, v, context, cache, **options)


GROUPS, ROWS = "pages in groups", "a row at a time"


@pytest.fixture(params=[GROUPS, ROWS])
def runner(request, monkeypatch):
    """`run`, or the same with every row on the path of long chunks, in blocks of two pages."""
    if request.param == GROUPS:
        return run
    monkeypatch.setattr(paged_xla, "_LONG", 1)
    monkeypatch.setattr(paged_xla, "_BLOCK_TOKENS", 2 * PAGE)
    return jax.jit(lambda *arguments, **options: attention(*arguments, **options),
                   static_argnames=("scale", "window", "soft_cap", "value_dim"))


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
LENGTHS = [17, 6, 11]  # tokens of each sequence
# Steps of rows (sequence, tokens): decoding rows, then prefilling ones. First a token at a time, ...
ONE = [([], [(0, 5), (1, 5)]), ([(1, 1)], [(0, 4), (2, 5)]), ([(0, 1)], [(2, 3)]), ([(2, 1), (0, 1)], []),
       ([(0, 1)], [(2, 2)])] + [([(0, 1)], [])] * 5
# ... then as many as three, where proposed tokens are checked.
THREE = [([], [(0, 5), (1, 3)]), ([(1, 2)], [(0, 2), (2, 5)]), ([(0, 3), (2, 1), (1, 1)], []),
         ([(2, 3)], [(0, 4)]), ([(0, 1), (2, 2)], []), ([(0, 2)], [])]


@pytest.mark.parametrize(("width", "runner"), [(1, GROUPS), (3, GROUPS), (1, ROWS)], indirect=["runner"])
@pytest.mark.parametrize("case", CASES)
def test_paged(case, width, runner):
    """Sequences grow chunk by chunk and by a few tokens, on scattered pages, in steps that mix both. Unwritten slots
    and pages of nobody hold NaN, and so does every slot that has fallen out of its sequence's window."""
    heads, (g, key_width, value_width), options = CASES[case]
    window = options.get("window")
    shapes = [(heads, key_width), (g, key_width), (g, value_width)]
    data = [drawn(i, *((n, *shape) for shape in shapes)) for i, n in enumerate(LENGTHS)]
    order = np.random.default_rng(7).permutation(PAGES)
    tables = [order[i * 5:i * 5 + -(-n // PAGE)] for i, n in enumerate(LENGTHS)]
    done = [0, 0, 0]
    got = [[], [], []]
    pools = [np.full_like(pool, np.nan) for pool in make_pool(PAGES, PAGE, (g, key_width, value_width), "float32")]
    assert len(pools) == (2 if value_width else 1)
    num_decode, num_prefill = 3, 2
    for decode, prefill in ONE if width == 1 else THREE:
        N = num_decode * width + num_prefill * CHUNK
        q, k, v = (np.zeros((N, *shape), np.float32) for shape in shapes)
        position, slot = np.full(N, -1, np.int32), np.full(N, PAGES * PAGE, np.int32)
        placed, lists = [], []
        for entries in ([(s, n, i * width) for i, (s, n) in enumerate(decode)],
                        [(s, n, num_decode * width + i * CHUNK) for i, (s, n) in enumerate(prefill)]):
            rows = []
            for row, (s, count, at) in enumerate(entries):
                span = np.arange(done[s], done[s] + count)
                for target, source in zip((q, k, v), data[s], strict=True):
                    target[at:at + count] = source[span]
                position[at:at + count] = span
                slot[at:at + count] = tables[s][span // PAGE] * PAGE + span % PAGE
                past = np.arange(max(0, done[s] - window + 1) if window else 0)
                for pool in pools:
                    pool[tables[s][past // PAGE], :, past % PAGE] = np.nan
                done[s] += count
                rows.append((row, tables[s][:-(-done[s] // PAGE)], len(past) // PAGE))
                placed.append((s, at, count))
            lists.append(work_list(rows))
        # With a window, the lists of other layers are there too, and must not be read.
        lists = lists if window is None else [work_list([]), work_list([]), *lists]
        context = PagedContext(position, slot, num_decode, CHUNK, *lists, decode_width=width)
        out, pools = runner(q[None], k[None], v[None] if value_width else None, context, tuple(pools), scale=SCALE,
                            **options)
        pools = [np.array(pool) for pool in pools]
        for s, at, count in placed:
            got[s].append(np.asarray(out[0, at:at + count]))
    assert done == LENGTHS
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
    filled = tuple(p.at[slots // PAGE, :, slots % PAGE].set(new)
                   for p, new in zip(make_pool(PAGES, PAGE, (G, K, K), "float32"), (k, v), strict=True))
    empty = WorkList(*np.zeros((3, 1), np.int32), np.int32(0))
    context = PagedContext(np.array([n - 1], np.int32), slots[-1:].astype(np.int32), 1, CHUNK,
                           work_list([(0, table, 0)], 41), empty)
    out, _ = run(q[None, -1:], k[None, -1:], v[None, -1:], context, filled, scale=SCALE)
    dense, _ = attention(q[None], k[None], v[None], DenseContext(), scale=SCALE)
    np.testing.assert_allclose(out[0, 0], dense[0, -1], atol=1e-5)


def stepped(data, tables, steps, pools, *, num_decode, num_prefill, width=1, **options):
    """Serves `steps` of rows (sequence, tokens), each row an entry or None; what each token got, by
    sequence and position."""
    done = [0] * len(data)
    got = [{} for _ in data]
    for decode, prefill in steps:
        N = num_decode * width + num_prefill * CHUNK
        q, k, v = (np.zeros((N, *a.shape[1:]), np.float32) for a in data[0])
        position, slot = np.full(N, -1, np.int32), np.full(N, PAGES * PAGE, np.int32)
        table = np.full((num_decode + num_prefill, 8), PAGES, np.int32)
        placed = []
        for row, entry in enumerate([*decode, *[None] * (num_decode - len(decode)), *prefill]):
            if entry is None:
                continue
            s, count = entry
            at = row * width if row < num_decode else num_decode * width + (row - num_decode) * CHUNK
            span = np.arange(done[s], done[s] + count)
            for target, source in zip((q, k, v), data[s], strict=True):
                target[at:at + count] = source[span]
            position[at:at + count], slot[at:at + count] = span, tables[s][span // PAGE] * PAGE + span % PAGE
            done[s] += count
            table[row, :-(-done[s] // PAGE)] = tables[s][:-(-done[s] // PAGE)]
            placed.append((s, at, span))
        context = PagedContext(position, slot, num_decode, CHUNK, table_RP=table, decode_width=width,
                               deterministic=True)
        out, pools = run(q[None], k[None], v[None] if v.shape[-1] else None, context, pools, scale=SCALE, **options)
        for s, at, span in placed:
            got[s] |= {int(t): np.asarray(out[0, at + i]) for i, t in enumerate(span)}
    return got


@pytest.mark.parametrize(("heads", "widths", "dtype", "options"), [
    (6, (G, K, K), "float32", {}), (4, (G, 32, 32), "float32", {"window": 6, "soft_cap": 2.0}),
    (6, (1, K, 0), "int8", {"value_dim": 5})], ids=["grouped", "window", "latent, int8"])
def test_a_deterministic_step_gives_the_same_bits_in_any_company(heads, widths, dtype, options):
    """Each token alone, in a full batch, as a decoding row and at several places of a chunk."""
    g, key_width, value_width = widths
    data = [drawn(i, (n, heads, key_width), (n, g, key_width), (n, g, value_width)) for i, n in enumerate([17, 14, 11])]
    order = np.random.default_rng(7).permutation(PAGES)
    tables = [order[i * 5:i * 5 + 5] for i in range(3)]
    shape = {"num_decode": 3, "num_prefill": 2, **options}

    def fresh():
        return tuple(worst_like(pool) for pool in make_pool(PAGES, PAGE, widths, dtype))

    alone = stepped(data, tables, [([(0, 1)], [])] * 17, fresh(), **shape)[0]
    company = stepped(data, tables, [
        ([], [(1, 5), (0, 3)]), ([(1, 1)], [(0, 5), (2, 5)]), ([None, (0, 1), (1, 1)], [None, (2, 4)]),
        ([(2, 1), None, (0, 1)], [(1, 5)]), ([(2, 1), (1, 1)], [None, (0, 5)]), ([(1, 1), None, (0, 1)], []),
        ([(0, 1)], [])], fresh(), **shape)[0]
    assert sorted(alone) == sorted(company) == list(range(17))
    for t in range(17):
        np.testing.assert_array_equal(alone[t], company[t])
    q, k, v = data[0]
    v = v if value_width else k[..., :options["value_dim"]]
    expected = reference.attend(q, k, v, reference.causal(options.get("window")), SCALE, options.get("soft_cap"))
    np.testing.assert_allclose(np.stack([company[t] for t in range(17)]), expected,
                               atol=1e-5 if dtype == "float32" else 0.1)


def test_a_deterministic_step_without_tables_is_refused():
    q, k = drawn(0, (1, 4, K), (1, G, K))
    context = PagedContext(np.zeros(1, np.int32), np.zeros(1, np.int32), 1, CHUNK, deterministic=True)
    with pytest.raises(ValueError, match="needs tables"):
        run(q[None], k[None], k[None], context, make_pool(PAGES, PAGE, (G, K, K), "float32"), scale=SCALE)


class TestNarrowCaches:
    """Root mean square error of the output, relative, where scores have a standard deviation of 4.5."""

    BOUND = {"bfloat16": 0.005, "int8": 0.015, "float8_e4m3fn": 0.08}

    @pytest.mark.parametrize("dtype", BOUND)
    @pytest.mark.parametrize("widths", [(G, 16, 12), (1, 16, 0)], ids=["plain", "latent"])
    def test_attention_over_narrow_entries(self, dtype, widths, runner):
        """Exact for what the pools hold, and as near to unquantized attention as stated; unwritten slots hold NaN."""
        g, key_width, value_width = widths
        n, options = 19, ({} if value_width else {"value_dim": 7})
        q, k, v = drawn(1, (n, 4, key_width), (n, g, key_width), (n, g, value_width))
        table = np.random.default_rng(3).permutation(PAGES)[:5]
        pools = tuple(worst_like(pool) for pool in make_pool(PAGES, PAGE, widths, dtype))
        out = []
        for at in range(0, n, CHUNK):
            span = np.arange(at, min(n, at + CHUNK))
            position, slot = np.full(CHUNK, -1, np.int32), np.full(CHUNK, PAGES * PAGE, np.int32)
            position[:len(span)], slot[:len(span)] = span, table[span // PAGE] * PAGE + span % PAGE
            step = [np.zeros((CHUNK, *a.shape[1:]), np.float32) for a in (q, k, v)]
            for target, source in zip(step, (q, k, v), strict=True):
                target[:len(span)] = source[span]
            lists = work_list([]), work_list([(0, table[:-(-(span[-1] + 1) // PAGE)], 0)])
            got, pools = runner(step[0][None], step[1][None], step[2][None] if value_width else None,
                                PagedContext(position, slot, 0, CHUNK, *lists), pools, scale=SCALE, **options)
            out.append(np.asarray(got[0, :len(span)]))
        at = table[np.arange(n) // PAGE], slice(None), np.arange(n) % PAGE
        half = len(pools) // (2 if is_quantized(dtype) else 1)
        held = [np.asarray(from_bits(pool[at]), np.float64) for pool in pools[:half]]
        if is_quantized(dtype):
            held = [entry * np.asarray(scale[at], np.float64)[..., None]
                    for entry, scale in zip(held, pools[half:], strict=True)]
        values = (held[1], v) if value_width else (held[0][..., :7], k[..., :7])
        exact = reference.attend(q, held[0], values[0], reference.causal(), SCALE)
        np.testing.assert_allclose(np.concatenate(out), exact, atol=2e-5)
        wanted = reference.attend(q, k, values[1], reference.causal(), SCALE)
        error = np.sqrt(np.mean((exact - wanted)**2) / np.mean(wanted**2))
        assert self.BOUND[dtype] / 20 < error < self.BOUND[dtype]

    def test_what_quantizing_loses(self):
        """int8: half a scale. float8: 1/16 of the entry, or half the least number next to zero. Zeros stay zeros."""
        x = np.concatenate([drawn(0, (50, 2, 24))[0], np.zeros((1, 2, 24), np.float32)])
        x[3] *= 1e-20
        for dtype, largest, relative, absolute in (("int8", 127, 0, 0.5), ("float8_e4m3fn", 448, 1 / 16, 2**-10)):
            entries, scale = quantize(jnp.asarray(x), dtype)
            assert entries.dtype == dtype and scale.shape == (51, 2)
            np.testing.assert_allclose(scale, np.abs(x).max(-1) / largest, rtol=1e-6)
            got = np.asarray(entries, np.float64) * np.asarray(scale, np.float64)[..., None]
            bound = relative * np.abs(x) + absolute * np.asarray(scale)[..., None]
            assert (np.abs(got - x) <= bound * 1.0001).all()

    def test_bytes_a_token(self):
        for widths in ((3, 8, 6), (1, 9, 0)):
            for dtype in ("float32", "bfloat16", "int8", "float8_e4m3fn"):
                pools = make_pool(1, 1, widths, dtype)
                assert cache_bytes_per_token(widths, dtype) == sum(pool.nbytes for pool in pools) // 2
        assert cache_bytes_per_token((3, 8, 6), "int8") == 3 * (8 + 6 + 2 * 4)
        assert cache_bytes_per_token((1, 9, 0), "bfloat16") == 18


@pytest.mark.parametrize(("backend", "dtype"), [("xla", "float32"), ("xla", "int8"), ("triton", "float32")])
def test_pages_are_copied_out_and_in(backend, dtype):
    rng = np.random.default_rng(0)
    cache = tuple(jnp.asarray(rng.integers(-100, 100, pool.shape), pool.dtype)
                  for pool in make_pool(5, 3, (2, 4, 2), dtype, backend))
    assert all(pool.shape[page_axis(backend)] == 6 and pool.shape[head_axis(backend)] == 2 for pool in cache)
    kept = take_pages(cache, jnp.array([4, 1]), backend)
    assert all(part.shape[0] == 2 for part in kept)
    moved = put_pages(tuple(worst_like(pool) for pool in cache), jnp.array([0, 3]), kept, backend)
    for before, after in zip(cache, moved, strict=True):
        before, after = (np.moveaxis(np.asarray(a), page_axis(backend), 0) for a in (before, after))
        np.testing.assert_array_equal(after[[0, 3]], before[[4, 1]])
        np.testing.assert_array_equal(after[[1, 2, 4, 5]], np.asarray(worst_like(jnp.asarray(after)))[[1, 2, 4, 5]])


def test_the_triton_kernel_has_no_scales():
    with pytest.raises(ValueError, match="no int8 cache"):
        make_pool(5, 3, (2, 4, 2), "int8", "triton")
