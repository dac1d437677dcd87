"""A plan as arrays, by hand; and that a step's work is its live pages, whatever the context could be."""

from __future__ import annotations

import numpy as np
import pytest

from llm_jax.inference.batch import Geometry, StepShape, build
from llm_jax.inference.request import SamplingParams
from llm_jax.inference.sampling import row_key
from llm_jax.inference.scheduler import Chunk, Plan, Sequence

GEOMETRY = Geometry(num_pages=20, page_size=4, chunk=3, pages_per_row=6)


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

    def items(work):
        return list(zip(work.row_W[:work.count], work.page_W[:work.count], work.start_W[:work.count], strict=True))

    assert items(b.context.decode) == [(0, 5, 0), (0, 2, 4)]
    assert items(b.context.prefill) == [(0, 9, 0), (1, 3, 0)]
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
