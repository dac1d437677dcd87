"""Which devices take part in a collective together, and along which axes of a mesh they lie."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_GROUPS = re.compile(r"replica_groups=(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
                     r"|mesh\[[^\]]*\](?:, device_ids=\(.*?\))? \{[^}]*\})")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*)\))? \{([^}]*)\}")
_AXIS = re.compile(r"'?([^',:=]+)'?(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def device_groups(attributes: str, num_devices: int) -> Groups:
    """The groups of a collective, from the text of its attributes.

    Understood are lists ({{0,1},{2,3}}), iota forms ([2,4]<=[4,2]T(1,0)) and axes of a mesh (mesh['a'=2,'b'=4] {'b'}).

    Returns:
      Tuples of device numbers (places in the mesh, row-major); one group of all where the attributes name none.
    """
    found = _GROUPS.search(attributes)
    return _read_groups(found[1] if found else "{}", num_devices)


@functools.lru_cache(maxsize=512)
def _read_groups(text: str, num_devices: int) -> Groups:
    if text.startswith("mesh"):
        return _mesh_groups(text)
    iota = _IOTA.fullmatch(text)
    if iota:
        return _tuples(_iota(iota))
    groups = tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d,]+)\}", text))
    return groups or (tuple(range(num_devices)),)


def _mesh_groups(text: str) -> Groups:
    found = _MESH.fullmatch(text)
    assert found is not None, text
    sizes = {name.strip("'"): int(size) for name, _, size in (part.partition("=") for part in found[1].split(","))}
    ids = np.arange(math.prod(sizes.values()))
    if found[2]:
        # XLA for CPU leaves the first half of an iota away: ([4,2]T(1,0)).
        iota = _IOTA.fullmatch(found[2] if "<=" in found[2] else f"[{ids.size}]<={found[2]}")
        ids = (_iota(iota) if iota else np.array([int(n) for n in re.findall(r"\d+", found[2])])).reshape(-1)
    # An axis of which only a factor takes part ('a':(2)4: after 2, of size 4) is cut into what is before it, it, and
    # the rest.
    shape, grouped = [], {}
    wanted = [(name, int(pre or 1), int(size or 0)) for name, pre, size in _AXIS.findall(found[3])]
    for name, size in sizes.items():
        cuts = {1, size}
        for other, pre, part in wanted:
            cuts |= {pre, pre * (part or size)} if other == name else set()
        edges = sorted(cuts)
        for low, high in itertools.pairwise(edges):
            for order, (other, pre, part) in enumerate(wanted):
                if other == name and pre <= low and high <= pre * (part or size):
                    grouped[len(shape)] = order
            shape.append(high // low)
    inner = sorted(grouped, key=lambda place: (grouped[place], place))
    outer = [place for place in range(len(shape)) if place not in grouped]
    count = math.prod(shape[place] for place in inner)
    return _tuples(ids.reshape(shape).transpose(*outer, *inner).reshape(-1, count))


def _iota(found: re.Match[str]) -> np.ndarray:
    dims, order = _ints(found[2]), found[3]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose(_ints(order)) if order else ids).reshape(_ints(found[1]))


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _tuples(ids: np.ndarray) -> Groups:
    return tuple(tuple(int(i) for i in row) for row in ids)


def permuted_pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    """(source, target) of each transfer of a collective-permute."""
    found = _PAIRS.search(attributes)
    return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1])) if found else ()


def axes_of_groups(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...] | None:
    """The mesh axes along which the devices of each group differ, in the mesh's order.

    Args:
      groups: from `device_groups`.
      mesh: axis → size (`Mesh.shape`), in the order in which devices are numbered.

    Returns:
      Names of axes larger than 1; None if the groups are no product of axes.
    """
    return _axes_of_groups(groups, tuple(mesh.items()))


@functools.lru_cache(maxsize=512)
def _axes_of_groups(groups: Groups, mesh: tuple[tuple[str, int], ...]) -> tuple[str, ...] | None:
    sizes = [size for _, size in mesh]
    if sum(map(len, groups)) != math.prod(sizes):
        return None
    places = [[np.unravel_index(device, sizes) for device in group] for group in groups]
    differing = [axis for axis in range(len(sizes))
                 if any(place[axis] != group[0][axis] for group in places for place in group)]
    whole = all(len(group) == math.prod(sizes[axis] for axis in differing) for group in groups)
    return tuple(mesh[axis][0] for axis in differing) if whole else None


def axes_of_pairs(pairs: tuple[tuple[int, int], ...], mesh: Mapping[str, int]) -> tuple[str, ...] | None:
    """The mesh axes along which a collective-permute moves data; None if the numbers are not of this mesh."""
    sizes = list(mesh.values())
    if any(device >= math.prod(sizes) for pair in pairs for device in pair):
        return None
    moves = [(np.unravel_index(a, sizes), np.unravel_index(b, sizes)) for a, b in pairs]
    return tuple(name for axis, name in enumerate(mesh) if any(a[axis] != b[axis] for a, b in moves))
