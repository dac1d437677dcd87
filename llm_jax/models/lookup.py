"""Rows of a table of embeddings, looked up where the table and the tokens lie on different axes of the mesh.

Left to itself, the compiler finds no good way from a table whose width is divided (`fsdp`) to activations whose rows
are, once a second axis divides rows or vocabulary: it gives every device the whole batch's activations. What is meant
is this. Devices that share the width show each other their token ids, each looks up its own columns for the tokens of
all, and an all-to-all brings every token's columns to the device that has the token. Devices that share the vocabulary
add up, for each finds only the tokens in its own part.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llm_jax.models.activations import mesh_axes
from llm_jax.parallel.rules import devices_along

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class _Lie:
    """Mesh axes that divide the table [V, D] and the tokens [B, T]; `shape` is the table's, `dtype` too."""

    vocab: tuple[str, ...]
    width: tuple[str, ...]
    rows: tuple[str, ...]
    length: tuple[str, ...]
    shape: tuple[int, int]
    dtype: Any

    @property
    def table(self) -> PartitionSpec:
        return PartitionSpec(self.vocab or None, self.width or None)

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(self.rows or None, self.length or None)


def look_up(table_VD: Array, index_BT: Array, rows: str | None = None) -> Array:
    """table[index], [B, T, D] in float32; an index past the end takes the last row.

    On a mesh, with rules in force that say how the table is divided, the exchange that this file is about: of ids, and
    of B · T · D numbers among the devices that share the table.

    Args:
      table_VD: the table; its width lies as the rules say of "lookup_embed".
      index_BT: int32.
      rows: the logical axis of the table's rows, "lookup_vocab"; None if they are not divided.
    """
    lie = _lie(table_VD, index_BT, rows)
    if lie is None:
        return jnp.take(table_VD, index_BT, axis=0, mode="clip").astype(jnp.float32)
    return _look_up(lie, table_VD, jnp.clip(index_BT, 0, table_VD.shape[0] - 1))


def _lie(table_VD: Any, index_BT: Array, table_rows: str | None) -> _Lie | None:
    """None where nothing is divided, or it can't be divided so."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not isinstance(table_VD, jax.Array) or index_BT.ndim != 2:
        return None
    vocab, width, rows, length = (
        tuple(axis for axis in (mesh_axes(name) if name else ()) if mesh.shape[axis] > 1)
        for name in (table_rows, "lookup_embed", "batch", "length"))
    if not (vocab or width):
        return None
    sizes = zip((*table_VD.shape, *index_BT.shape), (vocab, width, rows, length), strict=True)
    tokens = {*rows, *length}
    if any(size % devices_along(mesh, axes) for size, axes in sizes) or not set(width) <= tokens or set(vocab) & tokens:
        return None
    return _Lie(vocab, width, rows, length, table_VD.shape, table_VD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(lie: _Lie, table_VD: Array, index_BT: Array) -> Array:
    return _forward(lie, table_VD, index_BT)[0]


def _forward(lie: _Lie, table_VD: Array, index_BT: Array) -> tuple[Array, Array]:
    def local(table_VD: Array, index_BT: Array) -> Array:
        index_XBT, is_here_XBT = _everyones(lie, table_VD, index_BT)
        own_XBTD = jnp.where(is_here_XBT[..., None], table_VD[index_XBT], 0).astype(jnp.float32)
        if lie.vocab:
            own_XBTD = jax.lax.psum(own_XBTD, lie.vocab)
        if not lie.width:
            return own_XBTD[0]
        return jax.lax.all_to_all(own_XBTD, lie.width, split_axis=0, concat_axis=3, tiled=True)[0]

    out_BTD = jax.shard_map(local, in_specs=(lie.table, lie.tokens), out_specs=PartitionSpec(*lie.tokens, None),
                            check_vma=False)(table_VD, index_BT)
    return out_BTD, index_BT


def _backward(lie: _Lie, index_BT: Array, dout_BTD: Array) -> tuple[Array, None]:
    summed = tuple(axis for axis in (*lie.rows, *lie.length) if axis not in lie.width)
    mesh = jax.sharding.get_abstract_mesh()

    def local(index_BT: Array, dout_BTD: Array) -> Array:
        V, D = (size // devices_along(mesh, axes) for size, axes in zip(lie.shape, (lie.vocab, lie.width), strict=True))
        dtable_VD = jnp.zeros((V, D), jnp.float32)
        index_XBT, is_here_XBT = _everyones(lie, dtable_VD, index_BT)
        dout_XBTD = dout_BTD[None]
        if lie.width:
            dout_XBTD = jax.lax.all_to_all(dout_XBTD, lie.width, split_axis=3, concat_axis=0, tiled=True)
        place = jnp.where(is_here_XBT, index_XBT, dtable_VD.shape[0])
        return dtable_VD.at[place].add(dout_XBTD, mode="drop")[(None,) * len(summed)]

    dtable_SVD = jax.shard_map(local, in_specs=(lie.tokens, PartitionSpec(*lie.tokens, None)),
                               out_specs=PartitionSpec(*summed, *lie.table), check_vma=False)(index_BT, dout_BTD)
    # Added up out here, so that the compiler may scatter the sum where the gradient is wanted.
    dtable_VD = jax.lax.reduce(dtable_SVD, np.float32(0), jax.lax.add, tuple(range(len(summed))))
    return dtable_VD.astype(lie.dtype), None


_look_up.defvjp(_forward, _backward)


def _everyones(lie: _Lie, table_VD: Array, index_BT: Array) -> tuple[Array, Array]:
    """The places in this device's part of the table of the tokens of all that share the width, [X, B, T], and which of
    them lie in it."""
    index_XBT = jax.lax.all_gather(index_BT, lie.width) if lie.width else index_BT[None]
    if not lie.vocab:
        return index_XBT, jnp.ones(index_XBT.shape, bool)
    own = table_VD.shape[0]
    index_XBT = index_XBT - jax.lax.axis_index(lie.vocab) * own
    is_here_XBT = (index_XBT >= 0) & (index_XBT < own)
    return jnp.where(is_here_XBT, index_XBT, 0), is_here_XBT
