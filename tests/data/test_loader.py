"""Batches: complete, the same for any number of processes, resumable by one integer, unchanged by prefetching."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest

from llm_jax.data.documents import DocumentStore, read_documents
from llm_jax.data.loader import DataConfig, TrainLoader
from llm_jax.data.manifest import load_manifest
from llm_jax.errors import UserError

NAMES = ("tokens", "segment_ids", "positions")


def _loader(prepared, row_length=32, batch_size=8, split="train", process=(0, 1), **options):
    return TrainLoader(DataConfig(str(prepared), row_length, batch_size, **options), split, *process)


def _take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def _equal(a, b):
    return all(np.array_equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in NAMES)


def _segments(batch):
    for tokens, segments, positions in zip(*(batch[name] for name in NAMES), strict=True):
        for segment in range(1, segments.max() + 1):
            yield tokens[segments == segment], positions[segments == segment]


def test_shapes_segments_and_positions(prepared):
    for batch in _take(_loader(prepared), 5):
        for name in NAMES:
            assert batch[name].shape == (8, 32) and batch[name].dtype == np.int32
        for segments in batch["segment_ids"]:
            filled = segments[segments > 0]
            assert (segments[:len(filled)] > 0).all() and (np.diff(filled) >= 0).all()
            assert set(filled) == set(range(1, len(set(filled)) + 1))
        assert (batch["tokens"][batch["segment_ids"] == 0] == 0).all()
        for _, positions in _segments(batch):
            assert positions.tolist() == list(range(len(positions)))


@pytest.mark.parametrize("row_length", [16, 100])
def test_every_training_token_appears_once_an_epoch(prepared, row_length):
    documents = [tokens.tolist() for _, tokens in read_documents(prepared, "train")]
    wanted = sorted(tuple(tokens[i:i + row_length]) for tokens in documents for i in range(0, len(tokens), row_length))
    loader = _loader(prepared, row_length, batch_size=1)
    rows = loader.rows_per_epoch
    batches = _take(loader, 2 * rows)
    for epoch in (batches[:rows], batches[rows:]):
        assert sorted(tuple(tokens.tolist()) for batch in epoch for tokens, _ in _segments(batch)) == wanted
    assert not _equal(batches[:rows], batches[rows:])


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_any_number_of_processes_sees_the_same_global_batches(prepared, processes):
    whole = _take(_loader(prepared), 40)
    parts = [_take(_loader(prepared, process=(i, processes)), 40) for i in range(processes)]
    joined = [{name: np.concatenate([part[n][name] for part in parts]) for name in NAMES} for n in range(40)]
    assert _equal(whole, joined)


def test_resuming_continues_exactly(prepared):
    straight = _take(_loader(prepared), 30)
    loader = _loader(prepared)
    for _ in range(11):
        next(loader)
    state = loader.state
    assert state == 11
    loader.close()
    resumed = _loader(prepared)
    resumed.set_state(state)
    assert resumed.state == 11
    assert _equal(_take(resumed, 19), straight[11:])
    back = _loader(prepared)
    for _ in range(7):
        next(back)
    back.set_state(3)
    assert _equal(_take(back, 5), straight[3:8])
    with pytest.raises(UserError, match="-1"):
        _loader(prepared).set_state(-1)


def test_a_far_state_is_reached_at_once(prepared):
    loader = _loader(prepared)
    loader.set_state(10**9)
    assert _take(loader, 1)[0]["tokens"].shape == (8, 32)


@pytest.mark.parametrize("prefetch", [0, 1, 64])
def test_prefetching_changes_nothing(prepared, prefetch):
    loader = _loader(prepared, prefetch=prefetch)
    count = 2 * loader.batches_per_epoch
    assert _equal(_take(loader, count), _take(_loader(prepared), count))


def test_seed_and_split(prepared):
    assert not _equal(_take(_loader(prepared), 3), _take(_loader(prepared, seed=1), 3))
    validation = _loader(prepared, split="validation")
    ids = {i for i, _ in read_documents(prepared, "validation")}
    assert set(validation.documents(0)) <= ids
    validation.close()


def test_names_the_documents_and_sources_of_a_batch(prepared):
    by_tokens = {tuple(tokens.tolist()): i for i, tokens in read_documents(prepared, "train")}
    loader = _loader(prepared, row_length=4096, batch_size=4)
    batch = next(loader)
    ids = [by_tokens[tuple(tokens.tolist())] for tokens, _ in _segments(batch)]
    assert loader.documents(0) == ids and len(ids[0]) == 16
    sources = loader.sources(0)
    assert len(sources) == len(ids) and set(sources) <= {".", "english", "中文"}
    index = loader._store.index
    names = list(load_manifest(prepared)["sources"])
    expected = {f"{record['id']:016x}": names[record["source"]] for record in index}
    assert sources == [expected[i] for i in ids]
    assert loader.data_hash == load_manifest(prepared)["data_hash"]
    loader.close()


def test_a_batch_larger_than_an_epoch(prepared):
    loader = _loader(prepared, row_length=4096, batch_size=512)
    assert loader.rows_per_epoch < 512 and loader.batches_per_epoch == 1
    assert _take(loader, 1)[0]["tokens"].shape == (512, 4096)


def test_documents_may_be_read_from_many_threads(prepared):
    store = DocumentStore(prepared, load_manifest(prepared), "train")
    expected = [tokens.tolist() for _, tokens in read_documents(prepared, "train")]
    wanted = np.random.default_rng(0).integers(0, len(expected), (400, 5))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for places, found in zip(wanted, pool.map(store.read, wanted), strict=True):
            assert [tokens.tolist() for tokens in found] == [expected[place] for place in places]
    store.close()


def test_closing_stops_reading_ahead_safely(prepared):
    for _ in range(20):
        loader = _loader(prepared, prefetch=64)
        next(loader)
        loader.close()


@pytest.mark.parametrize(("options", "message"), [
    ({"row_length": 1}, "row_length"), ({"batch_size": 0}, "batch_size"), ({"seed": -1}, "seed"),
    ({"prefetch": 1.5}, "prefetch"), ({"split": "trian"}, "trian"),
    ({"process": (0, 3)}, "does not divide into 3 processes"), ({"process": (2, 2)}, "process_index=2"),
])
def test_wrong_settings_are_one_message(prepared, options, message):
    with pytest.raises(UserError, match=message):
        _loader(prepared, **options)


def test_no_data_is_one_message(tmp_path):
    with pytest.raises(UserError, match="holds no prepared data.*prepare"):
        _loader(tmp_path / "nothing")
