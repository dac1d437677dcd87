"""Parameters that are filled slice by slice where they lie, on one device or on the shards of a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax.interop.mapping import Path
from llm_jax.interop.matching import Leaf
from llm_jax.interop.slices import contiguous, flat, nested
from llm_jax.parallel import rules as rules_lib

# A leaf up to this size is put together on the host and sent at once, which needs no program for it.
ON_HOST_BYTES = 8 << 20


class Placer:
    """Stacked parameters on their devices.

    The host holds small leaves until they are whole, and of a large one what was put last: the caller's array and,
    where that is transposed or of another dtype, one copy. What is put, a tensor perhaps, is not cut further.
    """

    def __init__(self, leaves: Mapping[Path, Leaf], mesh: Mesh | None = None):
        """
        Args:
          leaves: what there is.
          mesh: its rules decide who holds what; None puts all on the first device.

        Raises:
          UserError: the mesh does not divide an axis.
        """
        self._leaves, self._mesh = leaves, mesh
        self._device = jax.local_devices()[0]
        self._shardings: dict[Path, Any] = {path: jax.sharding.SingleDeviceSharding(self._device) for path in leaves}
        if mesh is not None:
            shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
            found = rules_lib.shardings(mesh, nested({path: leaf.axes for path, leaf in leaves.items()}),
                                        shapes=nested(shapes))
            self._shardings = flat(found)
        self._arrays: dict[Path, Any] = {}
        self._left = {path: math.prod(leaf.shape) for path, leaf in leaves.items()}

    def put(self, path: Path, index: tuple[int, ...], values: np.ndarray) -> None:
        """Sets `leaf[index]`; `values` may be a view of any strides and of another dtype."""
        leaf = self._leaves[path]
        self._left[path] -= values.size
        if not index:
            self._arrays[path] = self._from_host(values, self._shardings[path], leaf.dtype)
        elif math.prod(leaf.shape) * leaf.dtype.itemsize <= ON_HOST_BYTES:
            whole = self._arrays.setdefault(path, np.empty(leaf.shape, leaf.dtype))
            whole[index] = values
            if not self._left[path]:
                self._arrays[path] = self._from_host(whole, self._shardings[path], leaf.dtype)
        else:
            self._update(path, index, values)

    def finish(self) -> dict[str, Any]:
        """The tree of `jax.Array`s; ValueError if a part of it was never put."""
        if lacking := [path for path, left in self._left.items() if left]:
            raise ValueError(f"not filled: {lacking[:5]}")
        return nested({path: self._arrays[path] for path in self._leaves})

    @staticmethod
    def _from_host(values: np.ndarray, sharding: Any, dtype: np.dtype) -> jax.Array:
        pieces: dict[tuple[Any, ...], np.ndarray] = {}

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            """The share of a device; those that have the same get the same array."""
            key = tuple((part.start, part.stop) for part in index)
            if key not in pieces:
                pieces[key] = contiguous(values[index], dtype)
            return pieces[key]

        return jax.make_array_from_callback(values.shape, sharding, piece)

    def _update(self, path: Path, index: tuple[int, ...], values: np.ndarray) -> None:
        leaf, sharding = self._leaves[path], self._shardings[path]
        mesh = self._mesh or Mesh(np.array([self._device]), ("device",))
        spec = PartitionSpec() if self._mesh is None else sharding.spec
        over = NamedSharding(mesh, spec)
        if path not in self._arrays:
            self._arrays[path] = jax.jit(functools.partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=over)()
        inner = PartitionSpec(*([None] * len(index)), *spec[len(index):])
        piece = self._from_host(values[(None,) * len(index)], NamedSharding(mesh, inner), leaf.dtype)
        array = _set(self._arrays[path], piece, np.asarray(index, np.int32), mesh, spec, inner)
        if not self._left[path] and self._mesh is None:
            array = array.addressable_shards[0].data
        self._arrays[path] = array
        # Otherwise the host would run ahead of the devices, and hold every slice that is still to be written.
        jax.block_until_ready(array)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _set(whole: jax.Array, piece: jax.Array, index: jax.Array, mesh: Mesh, spec: PartitionSpec,
         inner: PartitionSpec) -> jax.Array:
    """`whole` with `piece` at leading indices `index`, in place; each device writes what is its own, if anything."""
    leading = [spec[axis] if axis < len(spec) else None for axis in range(index.shape[0])]

    def write(whole: jax.Array, piece: jax.Array, index: jax.Array) -> jax.Array:
        starts, mine = [], jnp.bool_(True)
        for axis, names in enumerate(leading):
            length = whole.shape[axis]
            start = index[axis] - (0 if names is None else jax.lax.axis_index(names) * length)
            mine &= (start >= 0) & (start < length)
            starts.append(jnp.clip(start, 0, length - 1))
        starts += [jnp.int32(0)] * (whole.ndim - len(starts))
        kept = jax.lax.dynamic_slice(whole, starts, piece.shape)
        return jax.lax.dynamic_update_slice(whole, jnp.where(mine, piece, kept), starts)

    return jax.shard_map(write, mesh=mesh, in_specs=(spec, inner, PartitionSpec()), out_specs=spec,
                         check_vma=False)(whole, piece, index)
