"""A plan as arrays, by hand; and that a step's work is its live pages, whatever the context could be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llm_jax.inference.batch import Asked, Draws, Geometry, StepShape, build, choose_shape, extras, sampling_batch
from llm_jax.inference.request import SamplingParams
from llm_jax.inference.sampling import row_key
from llm_jax.inference.scheduler import PENDING, Chunk, Plan, Sequence

GEOMETRY = Geometry(num_pages=20, page_size=4, chunk=3, pages_per_row=6, num_slots=9)


def items(work):
    """(row, page, position of its first slot) of each item in use."""
    return list(zip(work.row_W[:work.count], work.page_W[:work.count], work.start_W[:work.count], strict=True))


def test_arrays_by_hand():
    decoding = Sequence(7, [10, 11, 12, 13, 14], 4, 9, computed=4, pages=[5, 2], slot=3)
    prompt = Sequence(8, [20, 21, 22, 23], 4, 9, computed=1, pages=[9], slot=1)
    half = Sequence(9, [30, 31, 32, 33, 34], 5, 9, computed=0, pages=[3], slot=0)
    plan = Plan((Chunk(decoding, 4, 1),), (Chunk(prompt, 1, 3), Chunk(half, 0, 2)))
    b, draws = build(plan, StepShape(prefill_rows=2, decode_rows=2), GEOMETRY)
    assert b.token_N.tolist() == [14, 0, 21, 22, 23, 30, 31, 0]
    assert b.context.position_N.tolist() == [4, -1, 1, 2, 3, 0, 1, -1]
    spare = 20 * 4
    assert b.context.slot_N.tolist() == [2 * 4, spare, 9 * 4 + 1, 9 * 4 + 2, 9 * 4 + 3, 3 * 4, 3 * 4 + 1, spare]
    assert b.out_R.tolist() == [0, 1, 4, 6]

    assert items(b.context.decode) == [(0, 5, 0), (0, 2, 4)]
    assert items(b.context.prefill) == [(0, 9, 0), (1, 3, 0)]
    assert b.context.decode_local is None and b.context.prefill_local is None
    # The half-done prompt draws nothing, so its row is greedy, and the spare slot takes what it would have drawn.
    assert draws == (Draws(7, 0, 1), Draws(8, 2, 1))
    assert b.slot_R.tolist() == [3, 9, 1, 9]
    asked = {i: Asked(SamplingParams(temperature=0.5, top_k=i, top_p=0.9, seed=2**32 + i, sample=1), 0, 5)
             for i in (7, 8, 9)}
    sampling = sampling_batch(draws, asked, 4)
    assert sampling.temperature_R.tolist() == [0.5, 0, 0.5, 0]
    assert sampling.top_k_R.tolist() == [7, 0, 8, 0]
    assert tuple(sampling.key_R2[0]) == row_key(2**32 + 7, 1, 5)


def test_a_token_that_only_the_device_knows_is_taken_from_its_slot():
    waiting = Sequence(7, [10, 11, PENDING], 2, 9, computed=2, pages=[5], slot=4)
    b, _ = build(Plan((Chunk(waiting, 2, 1),), ()), StepShape(0, 2), GEOMETRY)
    assert b.token_N.tolist() == [-5, 0] and b.slot_R.tolist() == [4, 9]


def test_proposed_tokens_follow_the_last_one():
    s = Sequence(7, [10, 11, 12], 2, 9, computed=2, pages=[5, 6], slot=4, proposal=[20, 21, 22])
    plan = Plan((Chunk(s, 2, 1, proposed=3),), ())
    b, draws = build(plan, StepShape(0, 2, width=4), GEOMETRY)
    assert b.token_N.tolist() == [12, 20, 21, 22, 0, 0, 0, 0]
    assert b.context.position_N.tolist() == [2, 3, 4, 5, -1, -1, -1, -1]
    assert b.context.slot_N.tolist()[:4] == [22, 23, 24, 25]
    assert b.out_R.tolist() == list(range(8)) and draws == (Draws(7, 0, 4),)
    assert set(b.slot_R.tolist()) == {9}  # which of the four is the last token, the host finds out
    keys = sampling_batch(draws, {7: Asked(SamplingParams(temperature=1.0, seed=3), 4, 3)}, 8).key_R2
    assert [tuple(k) for k in keys[:4]] == [row_key(3, 0, position) for position in (3, 4, 5, 6)]
    shapes = [StepShape(0, 1), StepShape(0, 1, 4), StepShape(0, 2, 4), StepShape(1, 1)]
    assert choose_shape(plan, shapes) == StepShape(0, 1, 4)


def test_what_changes_logits_by_hand():
    g = dataclasses.replace(GEOMETRY, vocab_size=40)
    draws = (Draws(1, 0, 1), Draws(2, 1, 2))
    plain, biased = SamplingParams(), SamplingParams(logit_bias={7: 2.5}, presence_penalty=0.5)
    assert extras(draws, {1: Asked(plain, 0, 5), 2: Asked(plain, 1, 5)}, 4, g) is None
    _, made = extras(draws, {1: Asked(plain, 0, 5), 2: Asked(biased, 6, 5, forbidden=(2,))}, 4, g)
    assert made.slot_R.tolist() == [9, 6, 6, 9] and made.presence_R.tolist() == [0, 0.5, 0.5, 0]
    assert made.repetition_R.tolist() == [1] * 4
    for row in (1, 2):
        assert made.bias_id_RB[row, :3].tolist() == [7, 2, 40] and made.bias_RB[row, :3].tolist() == [2.5, -np.inf, 0]
    assert (made.mask_RW == 0xFFFFFFFF).all() and made.mask_RW.shape == (4, 2)
    _, made = extras(draws, {1: Asked(plain, 0, 5, mask=np.array([5, 0], np.uint32))}, 4, g)
    assert made.mask_RW[0].tolist() == [5, 0] and made.slot_R.tolist() == [9] * 4


@pytest.mark.parametrize("longest", [64, 4096])
def test_work_is_the_live_pages_not_the_configured_context(longest):
    """Three sequences of 9, 17 and 40 tokens read 3 + 5 + 10 pages, however long a context may get."""
    geometry = Geometry(num_pages=4096, page_size=4, chunk=8, pages_per_row=longest // 4)
    rows = [Sequence(i, [1] * n, n, 9, computed=n - 1, pages=list(range(-(-n // 4))))
            for i, n in enumerate((9, 17, 40))]
    plan = Plan(tuple(Chunk(s, s.computed, 1) for s in rows), ())
    work = build(plan, StepShape(0, 8), geometry)[0].context.decode
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
    context = build(plan, StepShape(prefill_rows=1, decode_rows=2), geometry)[0].context
    assert items(context.decode_local) == [(0, 7, 8), (0, 6, 12), (0, 5, 16), (1, 3, 0)]
    assert items(context.prefill_local) == [(0, 7, 8), (0, 6, 12)]
    assert context.decode.count == 5 + 1 and context.prefill.count == 4
    alone = build(plan, StepShape(1, 2), dataclasses.replace(geometry, has_global=False))[0].context
    assert alone.decode is None and alone.prefill is None and items(alone.decode_local) == items(context.decode_local)


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 9])
def test_a_windowed_layers_work_does_not_grow_with_the_context(window):
    """Wherever a chunk begins: exactly the pages that hold a position that it sees, and its list always holds them."""
    geometry = Geometry(num_pages=4096, page_size=4, chunk=6, pages_per_row=100, window=window)
    for start in range(60):
        s = Sequence(1, [1] * (start + 6), start + 6, 9, computed=start, pages=list(range(100)))
        for plan, count, name in ((Plan((Chunk(s, start, 1),), ()), 1, "decode_local"),
                                  (Plan((), (Chunk(s, start, 6),)), 6, "prefill_local")):
            work = getattr(build(plan, StepShape(len(plan.prefill), len(plan.decode)), geometry)[0].context, name)
            seen = {p // 4 for q in range(start, start + count) for p in range(max(0, q - window + 1), q + 1)}
            assert sorted(seen) == work.page_W[:work.count].tolist()
            assert len(work.page_W) <= (window + count - 2) // 4 + 2
