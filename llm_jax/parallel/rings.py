"""Sums that devices share, along the rings of their network.

A compiler for TPUs scatters a sum along one ring of chips. A mesh axis that lies along two or three dimensions of the
torus is no ring: there it sums the whole on every device and cuts afterwards, twice the bytes. What it does not do by
itself can be written: scatter along one dimension, then what is left along the next.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rings:
    """A mesh axis whose devices, numbered row by row, fill a grid of which each line is a ring of the network.

    Attributes:
      axis: the mesh axis.
      sizes: of the grid; they multiply to the axis's.
    """

    axis: str
    sizes: tuple[int, ...]

    def groups(self, stage: int) -> list[list[int]]:
        """The lines along one dimension of the grid, as places along the axis: `axis_index_groups` of a collective."""
        grid = np.arange(math.prod(self.sizes)).reshape(self.sizes)
        return np.moveaxis(grid, stage, -1).reshape(-1, self.sizes[stage]).tolist()

    def psum_scatter(self, x: Array, dimension: int) -> Array:
        """`jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)`, one dimension of the grid after the
        other: device i of n has the i-th n-th of the sum."""
        x = jnp.moveaxis(x, dimension, 0)
        rest = x.shape[1:]
        x = x.reshape(x.shape[0], *(size for size in rest if size > 1))
        parts = jnp.split(x, _cuts(x.shape[-1], max(self.sizes)), axis=-1) if x.ndim > 1 else [x]
        x = jnp.concatenate([self._scattered(part) for part in parts], axis=-1)
        return jnp.moveaxis(x.reshape(-1, *rest), 0, dimension)

    def all_gather(self, x: Array, dimension: int) -> Array:
        """`jax.lax.all_gather(x, axis, axis=dimension, tiled=True)`, whose gradient is `psum_scatter`'s."""
        return _all_gather(self, dimension, x)

    def _scattered(self, x: Array) -> Array:
        for stage in range(len(self.sizes)):
            x = jax.lax.psum_scatter(x, self.axis, scatter_dimension=0, tiled=True,
                                     axis_index_groups=self.groups(stage))
        return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_gather(rings: Rings, dimension: int, x: Array) -> Array:
    return jax.lax.all_gather(x, rings.axis, axis=dimension, tiled=True)


_all_gather.defvjp(lambda rings, dimension, x: (_all_gather(rings, dimension, x), None),
                   lambda rings, dimension, _, g: (rings.psum_scatter(g, dimension),))


# What the compiler for TPUs (libtpu 0.0.42.1) does not turn into an all-reduce again, told by compiling sums of many
# shapes for rings of 4, 8 and 16: it scatters along the first axis of an array, and not along the last or past axes of
# length 1; and only if the last axis, counted in blocks of 128, has no odd factor that is large for the ring, as a
# vocabulary of 128,256 has with 501. At least 160 blocks with an odd factor under 8 it scatters along each. Pieces are
# copies, so they are kept small.
_LANES, _ALWAYS, _MOST, _ODD_TIMES_RING = 128, 160, 256, 1024


def _cuts(width: int, ring: int) -> list[int]:
    """Where an array's last axis is cut so that each piece is scattered along a ring; the last, a small one, may not
    be."""
    cuts, at = [], 0
    while True:
        blocks = -(-(width - at) // _LANES)
        odd = blocks // (blocks & -blocks)
        if blocks < _ALWAYS or odd * ring <= _ODD_TIMES_RING:
            return cuts
        below = blocks.bit_length() - 3  # three leading bits are kept
        at += min(max(blocks >> below << below, _ALWAYS), _MOST) * _LANES
        cuts.append(at)


def rings_along(mesh: Mesh, axis: str) -> Rings | None:
    """How a mesh axis lies along the torus of its TPUs; None where it lies along one dimension, as no grid of whole
    lines, or its devices have no places in a torus."""
    if mesh.shape[axis] == 1 or not all(hasattr(device, "coords") for device in mesh.devices.flat):
        return None
    coords = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, -1)
    sizes = _grid(np.moveaxis(coords, mesh.axis_names.index(axis), -2).reshape(-1, mesh.shape[axis], coords.shape[-1]))
    return Rings(axis, sizes) if sizes and len(sizes) > 1 else None


def _grid(coords_XNC: np.ndarray) -> tuple[int, ...] | None:
    """Sizes of the grid that N devices fill row by row, the same for every X; None if they fill none."""
    sizes: list[int] = []
    rest = coords_XNC[0]
    while len(rest) > 1:
        along = (rest != rest[0]).argmax(axis=1)[1]  # the coordinate in which the second differs from the first
        elsewhere = np.delete(rest, along, axis=1)
        is_off = (elsewhere != elsewhere[0]).any(axis=1)
        size = int(is_off.argmax()) if is_off.any() else len(rest)
        if size < 2 or len(rest) % size:
            return None
        sizes.insert(0, size)
        rest = rest[::size]
    return tuple(sizes) if all(_is_line(coords_XNC, sizes, stage) for stage in range(len(sizes))) else None


def _is_line(coords_XNC: np.ndarray, sizes: Sequence[int], stage: int) -> bool:
    """Whether devices that differ in one place of the grid alone differ in one coordinate alone, the same for all."""
    x, _, c = coords_XNC.shape
    lines = np.moveaxis(coords_XNC.reshape(x, *sizes, c), 1 + stage, 0)
    return int(((lines != lines[0]).reshape(-1, c).any(axis=0)).sum()) == 1
