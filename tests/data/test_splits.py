"""Duplicates go, and content hashes alone decide the sides, except where a side would be empty."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import splits
from llm_jax.data.spool import RECORD, content_hash

IDS = st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=60)


def _ids(values):
    return np.array(values, np.uint64)


def test_unique_keeps_the_first_of_each():
    records = np.zeros(6, RECORD)
    records["id"] = [5, 5, 9, 5, 9, 2**64 - 1]
    records["check"] = [1, 2, 1, 1, 1, 1]
    assert splits.unique(records).tolist() == [0, 1, 2, 5]
    assert splits.unique(records[:0]).tolist() == []


def test_thresholds():
    edge = [0, int(0.8 * 2**64) - 1, int(0.8 * 2**64), int(0.9 * 2**64) - 1, int(0.9 * 2**64), 2**64 - 1]
    assert splits.assign(_ids(edge), np.zeros(6, int)).tolist() == [0, 0, 1, 1, 2, 2]


def test_shares_are_80_10_10():
    ids = _ids([content_hash(str(i).encode())[0] for i in range(20000)])
    counts = np.bincount(splits.assign(ids, np.zeros(20000, int)))
    assert np.abs(counts / 20000 - [0.8, 0.1, 0.1]).max() < 0.01


def test_an_empty_side_gets_the_nearest_document():
    tenth = 2**64 // 10
    ids = _ids([tenth, 5 * tenth, 7 * tenth, 79 * tenth // 10])
    assert splits.assign(ids, np.zeros(4, int)).tolist() == [0, 0, 2, 1]
    ids = _ids([95 * tenth // 10, 96 * tenth // 10, 85 * tenth // 10])
    assert splits.assign(ids, np.zeros(3, int)).tolist() == [0, 2, 1]


def test_small_sources_together_fill_every_side():
    ids = _ids([1, 2, 3, 4])
    assert sorted(splits.assign(ids, np.array([0, 0, 1, 1])).tolist()) == [0, 0, 1, 2]


@settings(deadline=None)
@given(IDS, st.data())
def test_no_source_of_three_lacks_a_side_and_order_is_irrelevant(values, data):
    ids = _ids(values)
    sources = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(ids), max_size=len(ids))), int)
    sides = splits.assign(ids, sources)
    for source in range(4):
        if (sources == source).sum() >= 3:
            assert set(sides[sources == source]) == {0, 1, 2}
    if len(ids) >= 3:
        assert set(sides) == {0, 1, 2}
    order = np.array(data.draw(st.permutations(range(len(ids)))), int)
    assert splits.assign(ids[order], sources[order]).tolist() == sides[order].tolist()


@settings(deadline=None)
@given(IDS)
def test_growing_a_corpus_moves_nothing_where_every_side_had_a_document(values):
    ids, few = _ids(values), _ids(values[:30])
    sides = splits.assign(few, np.zeros(len(few), int))
    if set(np.searchsorted(_ids(splits._BOUNDS[1:3]), few, side="right")) == {0, 1, 2}:
        assert splits.assign(ids, np.zeros(len(ids), int))[:30].tolist() == sides.tolist()
