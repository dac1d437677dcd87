"""Lays documents out in rows of fixed length: a pure function of (data hash, seed, epoch, row length).

A document of n tokens is cut at multiples of the row length T. Its ⌊n / T⌋ full pieces are rows of their own; its tail
of n mod T tokens shares a row with other tails. Tails are packed best-fit-decreasing (Johnson et al. 1974,
doi:10.1137/0203025), whose outcome depends on their lengths alone, so the layout is computed once; an epoch then deals
the documents with equally long tails out to the places of that length, and orders the rows.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """How tails of given lengths share rows, whichever documents they belong to.

    Attributes:
      num_rows: rows that hold tails.
      places: int64 [tails]; place k is for the k-th tail in order of decreasing length, and row b takes the places
        `places[starts[b]:starts[b + 1]]`.
      starts: int64 [num_rows + 1].
    """

    num_rows: int
    places: np.ndarray
    starts: np.ndarray


def best_fit_decreasing(lengths: np.ndarray, row_length: int) -> Layout:
    """Packs items into as few rows as best-fit-decreasing does, in bulk: the work grows with the distinct lengths.

    Best fit puts an item into the fullest row that still takes it, and then the next one of the same length into that
    same row again for as long as it fits. So all rows with the smallest sufficient room r are filled, ⌊r / length⌋
    items each, in one step, before any roomier row is touched.

    Args:
      lengths: integer [items], in decreasing order, each from 1 to `row_length`.
      row_length: room of a row.
    """
    rows = np.empty(len(lengths), np.int64)
    open_rows: dict[int, list[np.ndarray]] = {}  # by room left
    rooms: list[int] = []  # the keys of open_rows, ascending
    num_rows = done = 0

    def put(room: int, numbers: np.ndarray) -> None:
        if room and len(numbers):
            if room not in open_rows:
                open_rows[room] = []
                bisect.insort(rooms, room)
            open_rows[room].append(numbers)

    values, counts = np.unique(np.asarray(lengths), return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            i = bisect.bisect_left(rooms, length)
            if i < len(rooms):
                room = rooms.pop(i)
                candidates = np.concatenate(open_rows.pop(room))
            else:
                room = row_length
                needed = -(-count // (row_length // length))
                candidates = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            each = room // length
            full = min(len(candidates), count // each)
            rows[done:done + full * each] = np.repeat(candidates[:full], each)
            done += full * each
            count -= full * each
            put(room - each * length, candidates[:full])
            if full < len(candidates) and count:
                rows[done:done + count] = candidates[full]
                done += count
                put(room - count * length, candidates[full:full + 1])
                count, full = 0, full + 1
            put(room, candidates[full:])
    places = np.argsort(rows, kind="stable")
    starts = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=num_rows), out=starts[1:])
    return Layout(num_rows, places, starts)


class Packing:
    """The rows of a split, epoch by epoch.

    Attributes:
      rows_per_epoch: the same in every epoch.
      row_length: tokens of a row.
    """

    def __init__(self, lengths: np.ndarray, row_length: int, data_hash: str, seed: int) -> None:
        """Prepares what all epochs share.

        Args:
          lengths: integer [documents], tokens of each document, at least 1.
          row_length: tokens of a row.
          data_hash: identifies the data; part of what epochs are drawn from.
          seed: the other part.
        """
        self.row_length = row_length
        self._lengths = np.asarray(lengths, np.int64)
        self._key = f"{data_hash} {seed} {row_length}"
        full = self._lengths // row_length
        self._full_ends = np.cumsum(full)
        self._num_full = int(full.sum())
        tails = self._lengths % row_length
        self._tailed = np.flatnonzero(tails)
        self._tail_lengths = tails[self._tailed]
        self._sorted_lengths = np.sort(self._tail_lengths)[::-1]
        self._layout = best_fit_decreasing(self._sorted_lengths, row_length)
        self.rows_per_epoch = self._num_full + self._layout.num_rows

    def epoch(self, number: int) -> Epoch:
        """The rows of an epoch, the first of which is 0."""
        row_keys = self._draw(number, "rows", self.rows_per_epoch)
        shuffled = np.argsort(self._draw(number, "tails", len(self._tailed)), kind="stable")
        dealt = shuffled[np.argsort(-self._tail_lengths[shuffled], kind="stable")]
        assert np.array_equal(self._tail_lengths[dealt], self._sorted_lengths), "every tail has a place of its length"
        return Epoch(self, np.argsort(row_keys, kind="stable"), self._tailed[dealt])

    def _draw(self, epoch: int, what: str, count: int) -> np.ndarray:
        """Random uint64 [count]. Raw Philox output is defined by its algorithm, so it outlives versions of NumPy."""
        digest = hashlib.blake2b(f"{self._key} {epoch} {what}".encode(), digest_size=16).digest()
        return np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(count)


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One epoch's rows.

    Attributes:
      packing: what it was made of.
      order: int64 [rows_per_epoch], which row comes at each position; full pieces are numbered first.
      dealt: int64 [tails], the document at each place of the layout.
    """

    packing: Packing
    order: np.ndarray
    dealt: np.ndarray

    def row(self, position: int) -> list[tuple[int, int, int]]:
        """The pieces `(document, first token, number of tokens)` of the row at `position`, in order."""
        packing, row = self.packing, int(self.order[position])
        length = packing.row_length
        if row < packing._num_full:
            document = int(np.searchsorted(packing._full_ends, row, side="right"))
            before = int(packing._full_ends[document - 1]) if document else 0
            return [(document, (row - before) * length, length)]
        layout = packing._layout
        row -= packing._num_full
        pieces = []
        for document in self.dealt[layout.places[layout.starts[row]:layout.starts[row + 1]]].tolist():
            total = int(packing._lengths[document])
            pieces.append((document, total - total % length, total % length))
        return pieces
