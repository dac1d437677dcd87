"""Rows hold every token once, use as few rows as best-fit-decreasing does, and depend on their four inputs alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.packing import Packing, best_fit_decreasing


def _one_by_one(lengths: list[int], room: int) -> list[int]:
    """Best-fit-decreasing as the textbook has it; the sorted totals of its rows."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(room - length)
    return sorted(room - r for r in rooms)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 40).flatmap(lambda t: st.tuples(st.just(t), st.lists(st.integers(1, t), max_size=80))))
def test_bulk_packing_equals_one_by_one(case):
    room, lengths = case
    ordered = np.array(sorted(lengths, reverse=True), np.int64)
    layout = best_fit_decreasing(ordered, room)
    assert sorted(layout.places.tolist()) == list(range(len(lengths)))
    totals = [int(ordered[layout.places[a:b]].sum()) for a, b in zip(layout.starts, layout.starts[1:], strict=False)]
    assert sorted(totals) == _one_by_one(lengths, room)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(2, 40), st.integers(0, 3), st.integers(0, 3))
def test_every_token_is_in_one_row_of_every_epoch(lengths, row_length, seed, number):
    packing = Packing(np.array(lengths), row_length, "data", seed)
    epoch = packing.epoch(number)
    seen = np.concatenate([np.zeros(length, int) for length in lengths])
    starts = np.cumsum([0, *lengths])
    for position in range(packing.rows_per_epoch):
        row = epoch.row(position)
        assert 0 < sum(length for _, _, length in row) <= row_length
        for document, start, length in row:
            assert start % row_length == 0 and start + length <= lengths[document]
            seen[starts[document] + start:starts[document] + start + length] += 1
    assert (seen == 1).all()


def _rows(packing, number):
    epoch = packing.epoch(number)
    return [epoch.row(position) for position in range(packing.rows_per_epoch)]


def test_pure_function_of_data_seed_epoch_and_row_length():
    lengths = np.random.default_rng(0).integers(2, 90, 200)
    rows = _rows(Packing(lengths, 32, "data", 1), 5)
    assert rows == _rows(Packing(lengths.copy(), 32, "data", 1), 5)
    for other in (_rows(Packing(lengths, 32, "other", 1), 5), _rows(Packing(lengths, 32, "data", 2), 5),
                  _rows(Packing(lengths, 32, "data", 1), 6)):
        assert len(other) == len(rows) and other != rows
        neighbours = {frozenset(d for d, _, _ in row) for row in rows if len(row) > 1}
        assert neighbours != {frozenset(d for d, _, _ in row) for row in other if len(row) > 1}


def test_the_draw_is_the_same_for_ever():
    """Resuming an old run needs the rows of old: they follow from Philox and BLAKE2b, not from NumPy's version."""
    assert _rows(Packing(np.array([5, 9, 2, 7, 3]), 4, "data", 0), 0) == [
        [(2, 0, 2)], [(0, 0, 4)], [(1, 0, 4)], [(1, 4, 4)], [(3, 4, 3), (1, 8, 1)], [(3, 0, 4)], [(4, 0, 3), (0, 4, 1)]]


def test_many_documents_are_packed_in_bulk():
    lengths = np.random.default_rng(0).integers(2, 3000, 200_000)
    packing = Packing(lengths, 1024, "data", 0)
    assert packing.rows_per_epoch * 1024 < lengths.sum() * 1.001
    assert packing.epoch(0).order.shape == (packing.rows_per_epoch,)
