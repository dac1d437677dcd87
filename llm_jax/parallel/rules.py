"""One table from logical axis names to mesh axes, and the shardings it gives.

A new parallelism is a new table (and where needed a `shard_map`), not an edit in every layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax.errors import UserError

Rules = Mapping[str, str | tuple[str, ...] | None]

# Fully sharded data parallelism along the model's width, tensor parallelism along heads, mlp and vocabulary, and each
# device along the expert axis with experts of its own.
RULES: Rules = {
    "batch": ("data", "fsdp", "expert"),
    "length": None,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "experts": "expert",
    "expert_router": None,
    "latent": None,
    "positions": None,
    "token_types": None,
    "norm": None,
}


def partition_spec(axes: tuple[str | None, ...], rules: Rules = RULES) -> PartitionSpec:
    """The mesh axes of one array with logical `axes`; an unknown name is an error, not silent replication."""
    for axis in axes:
        if axis is not None and axis not in rules:
            raise UserError(f"the sharding rules have no entry for the logical axis {axis!r}; known: {sorted(rules)}")
    return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


def shardings(mesh: Mesh, logical_axes: Any, rules: Rules = RULES, shapes: Any = None) -> Any:
    """Turns a tree of logical axes into a tree of shardings.

    Args:
      mesh: the device mesh.
      logical_axes: tree whose leaves are tuples of logical axis names (None for an axis without one).
      rules: logical axis → mesh axis, several, or None.
      shapes: tree of the same structure with arrays or `jax.ShapeDtypeStruct`; if given, every axis is checked.

    Returns:
      A tree of `NamedSharding` of the same structure.

    Raises:
      UserError: a logical axis without a rule, or an axis length its mesh axes don't divide; names the leaf.
    """

    def is_axes(x: Any) -> bool:
        return isinstance(x, tuple)

    result = jax.tree.map(lambda axes: NamedSharding(mesh, partition_spec(axes, rules)), logical_axes, is_leaf=is_axes)
    if shapes is not None:
        jax.tree_util.tree_map_with_path(
            lambda path, axes, shape: _check_divides(mesh, path, axes, shape.shape, rules), logical_axes, shapes,
            is_leaf=is_axes)
    return result


def _check_divides(mesh: Mesh, path: tuple, axes: tuple, shape: tuple[int, ...], rules: Rules) -> None:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if len(axes) != len(shape):
        raise UserError(f"{name} has shape {shape} but logical axes {axes}")
    for axis, length in zip(axes, shape, strict=True):
        mesh_axes = rules[axis] if axis is not None else None
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        size = 1
        for mesh_axis in names:
            size *= mesh.shape[mesh_axis]
        if length % size:
            raise UserError(f"{name} {shape}: its axis {axis!r} of length {length} can't be divided among the {size} "
                            f"devices of mesh axis {'×'.join(names)}; choose a mesh size that divides {length}")


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Rows of a batch [B, T] lie over the data, fsdp and expert axes; positions stay together."""
    return NamedSharding(mesh, partition_spec(("batch", "length"), rules))


def batch_shards(mesh: Mesh, rules: Rules = RULES) -> int:
    """Into how many parts the rows of a batch are cut."""
    names = rules["batch"]
    size = 1
    for mesh_axis in (names,) if isinstance(names, str) else names or ():
        size *= mesh.shape[mesh_axis]
    return size


def process_rows(sharding: NamedSharding, num_rows: int) -> tuple[int, int]:
    """Which share of a batch's rows this process has to bring.

    Processes that lie along the tensor axis alone hold the same rows, so they bring the same share.

    Args:
      sharding: of the batch, rows first.
      num_rows: rows of the global batch (B).

    Returns:
      (index, count): this process brings part `index` of `count` equal parts.

    Raises:
      UserError: the devices of a process hold rows that are not neighbours, or a part of another process's rows.
    """
    rows_of: dict[int, set[tuple[int, int]]] = {}
    places: dict[Any, Any] = dict(sharding.devices_indices_map((num_rows, 1)))
    for device, index in places.items():
        start, stop, _ = index[0].indices(num_rows)
        rows_of.setdefault(device.process_index, set()).add((start, stop))
    spans = {process: _span(process, sorted(rows)) for process, rows in rows_of.items()}
    parts = sorted(set(spans.values()))
    equal = [(i * num_rows // len(parts), (i + 1) * num_rows // len(parts)) for i in range(len(parts))]
    if parts != equal:
        raise UserError(f"the mesh gives processes the rows {_ranges(parts)} of {num_rows}, and they can only bring "
                        f"equal parts; {_OTHER_MESH}")
    return parts.index(spans[jax.process_index()]), len(parts)


_OTHER_MESH = "choose data, fsdp, expert and tensor so that each process's devices hold rows next to one another"


def _span(process: int, rows: list[tuple[int, int]]) -> tuple[int, int]:
    """The one range that the row ranges of a process make up."""
    if any(stop != start for (_, stop), (start, _) in itertools.pairwise(rows)):
        raise UserError(f"the mesh gives process {process} the rows {_ranges(rows)}, which don't follow one another; "
                        f"{_OTHER_MESH}")
    return rows[0][0], rows[-1][1]


def _ranges(rows: list[tuple[int, int]]) -> str:
    return ", ".join(f"{start}–{stop - 1}" for start, stop in rows)
