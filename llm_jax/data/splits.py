"""Which documents stay, and on which side each one lands: decided by content hashes, one source at a time."""

from __future__ import annotations

import numpy as np

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)
# An id is a fraction of 2^64: below 0.8 it is for training, below 0.9 for validation, else for test.
_BOUNDS = (0, int(0.8 * 2**64), int(0.9 * 2**64), 2**64)


def unique(records: np.ndarray) -> np.ndarray:
    """Indices, ascending, of the first record with each content hash."""
    order = np.lexsort((np.arange(len(records)), records["check"], records["id"]))
    ids, checks = records["id"][order], records["check"][order]
    first = np.ones(len(records), bool)
    first[1:] = (ids[1:] != ids[:-1]) | (checks[1:] != checks[:-1])
    return np.sort(order[first])


def assign(ids: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """The side of every document.

    The id alone decides, so a document stays on its side when the corpus grows, with one exception: a source of three
    or more documents that would leave a side empty gives that side the document whose id lies nearest to it, taken from
    a side that keeps another. A corpus whose sources are all smaller than that is treated as one source.

    Args:
      ids: uint64 [N], distinct documents' ids.
      sources: integer [N], the source of each.

    Returns:
      uint8 [N], 0 for train, 1 for validation, 2 for test.
    """
    sides = np.searchsorted(np.array(_BOUNDS[1:3], np.uint64), ids, side="right").astype(np.uint8)
    order = np.argsort(sources, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(sources[order])) + 1):
        if len(members) >= 3:
            _fill_empty_sides(ids, sides, members)
    if len(ids) >= 3:
        _fill_empty_sides(ids, sides, np.arange(len(ids)))
    return sides


def _fill_empty_sides(ids: np.ndarray, sides: np.ndarray, members: np.ndarray) -> None:
    for side in (VALIDATION, TEST, TRAIN):
        counts = np.bincount(sides[members], minlength=3)
        if counts[side] == 0:
            movable = members[counts[sides[members]] > 1]
            low, high = _BOUNDS[side], _BOUNDS[side + 1]
            # Python's integers, because the distances need all 64 bits and a sign.
            distances = [(max(low - int(ids[i]), int(ids[i]) - high + 1), int(ids[i]), i) for i in movable]
            sides[min(distances)[2]] = side
