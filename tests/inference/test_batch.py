"""A plan as arrays, by hand; and that a step's work is its live pages, whatever the context could be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llm_jax.inference.batch import Geometry, StepShape, build
from llm_jax.inference.request import SamplingParams
from llm_jax.inference.sampling import row_key
from llm_jax.inference.scheduler import Chunk, Plan, Sequence

GEOMETRY = Geometry(num_pages=20, page_size=4, chunk=3, pages_per_row=6)


def items(work):
    """(row, page, position of its first slot) of each item in use."""
    return list(zip(work.row_W[:work.count], work.page_W[:work.count], work.start_W[:work.count], strict=True))


def test_arrays_by_hand():
    decoding = Sequence(7, [10, 11, 12, 13, 14], 4, 9, computed=4, pages=[5, 2])
    prompt = Sequence(8, [20, 21, 22, 23], 4, 9, computed=1, pages=[9])
    half = Sequence(9, [30, 31, 32, 33, 34], 5, 9, computed=0, pages=[3])
    plan = Plan((Chunk(decoding, 4, 1),), (Chunk(prompt, 1, 3), Chunk(half, 0, 2)))
    params = {i: SamplingParams(temperature=0.5, top_k=i, top_p=0.9, seed=2**32 + i, sample=1) for i in (7, 8, 9)}
    b = build(plan, StepShape(prefill_rows=2, decode_rows=2), GEOMETRY, params)
    assert b.token_N.tolist() == [14, 0, 21, 22, 23, 30, 31, 0]
    assert b.context.position_N.tolist() == [4, -1, 1, 2, 3, 0, 1, -1]
    spare = 20 * 4
    assert b.context.slot_N.tolist() == [2 * 4, spare, 9 * 4 + 1, 9 * 4 + 2, 9 * 4 + 3, 3 * 4, 3 * 4 + 1, spare]
    assert b.out_R.tolist() == [0, 0, 4, 6]

    assert items(b.context.decode) == [(0, 5, 0), (0, 2, 4)]
    assert items(b.context.prefill) == [(0, 9, 0), (1, 3, 0)]
    assert b.context.decode_local is None and b.context.prefill_local is None
    # The half-done prompt draws nothing, so its row is greedy.
    assert b.sampling.temperature_R.tolist() == [0.5, 0, 0.5, 0]
    assert b.sampling.top_k_R.tolist() == [7, 0, 8, 0]
    assert tuple(b.sampling.key_R2[0]) == row_key(2**32 + 7, 1, 5)


@pytest.mark.parametrize("longest", [64, 4096])
def test_work_is_the_live_pages_not_the_configured_context(longest):
    """Three sequences of 9, 17 and 40 tokens read 3 + 5 + 10 pages, however long a context may get."""
    geometry = Geometry(num_pages=4096, page_size=4, chunk=8, pages_per_row=longest // 4)
    rows = [Sequence(i, [1] * n, n, 9, computed=n - 1, pages=list(range(-(-n // 4))))
            for i, n in enumerate((9, 17, 40))]
    plan = Plan(tuple(Chunk(s, s.computed, 1) for s in rows), ())
    work = build(plan, StepShape(0, 8), geometry, {}).context.decode
    assert work.count == 3 + 5 + 10
    assert np.bincount(work.row_W[:work.count]).tolist() == [3, 5, 10]


def test_layers_with_a_window_skip_the_pages_before_it():
    """Pages of 4 and a window of 6: position 16 sees 11 … 16, and a chunk of 13 … 15 sees 8 … 15."""
    pages = [9, 8, 7, 6, 5]
    decoding = Sequence(1, [1] * 17, 4, 9, computed=16, pages=pages)
    young = Sequence(2, [1] * 3, 3, 9, computed=2, pages=[3])
    prompt = Sequence(3, [1] * 20, 20, 9, computed=13, pages=pages)
    plan = Plan((Chunk(decoding, 16, 1), Chunk(young, 2, 1)), (Chunk(prompt, 13, 3),))
    geometry = dataclasses.replace(GEOMETRY, window=6)
    context = build(plan, StepShape(prefill_rows=1, decode_rows=2), geometry, {}).context
    assert items(context.decode_local) == [(0, 7, 8), (0, 6, 12), (0, 5, 16), (1, 3, 0)]
    assert items(context.prefill_local) == [(0, 7, 8), (0, 6, 12)]
    assert context.decode.count == 5 + 1 and context.prefill.count == 4
    alone = build(plan, StepShape(1, 2), dataclasses.replace(geometry, has_global=False), {}).context
    assert alone.decode is None and alone.prefill is None and items(alone.decode_local) == items(context.decode_local)


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 9])
def test_a_windowed_layers_work_does_not_grow_with_the_context(window):
    """Wherever a chunk begins: exactly the pages that hold a position that it sees, and its list always holds them."""
    geometry = Geometry(num_pages=4096, page_size=4, chunk=6, pages_per_row=100, window=window)
    for start in range(60):
        s = Sequence(1, [1] * (start + 6), start + 6, 9, computed=start, pages=list(range(100)))
        for plan, count, name in ((Plan((Chunk(s, start, 1),), ()), 1, "decode_local"),
                                  (Plan((), (Chunk(s, start, 6),)), 6, "prefill_local")):
            work = getattr(build(plan, StepShape(len(plan.prefill), len(plan.decode)), geometry, {}).context, name)
            seen = {p // 4 for q in range(start, start + count) for p in range(max(0, q - window + 1), q + 1)}
            assert sorted(seen) == work.page_W[:work.count].tolist()
            assert len(work.page_W) <= (window + count - 2) // 4 + 2
