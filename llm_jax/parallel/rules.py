"""One table from logical axis names to mesh axes, and the shardings it gives.

A new parallelism is a new table (and where needed a `shard_map`), not an edit in every layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax.errors import UserError
from llm_jax.parallel.mesh import AXES

Table = dict[str, str | tuple[str, ...] | None]
Rules = Mapping[str, str | tuple[str, ...] | None]

# Of parameters: fully sharded along the model's width, tensor parallelism along heads, mlp and vocabulary, to each
# device along the expert axis experts of its own, and to each along the pipeline a stretch of the layers.
RULES: Table = {
    "layers": "pipeline",
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

# Of activations; a name that is absent is left to the compiler.
ACTIVATIONS: Table = {
    "batch": ("data", "fsdp", "expert"),
    "length": "sequence",
    "activation_embed": None,
    "activation_heads": "tensor",
    "activation_mlp": "tensor",
    "activation_vocab": "tensor",
    "activation_experts": "expert",
    "lookup_vocab": "tensor",  # the table of embeddings, where it is looked up (`models.lookup`)
    "lookup_embed": "fsdp",
    "experts_embed": "fsdp",  # the experts' matrices, where they are gathered (`models.experts`)
}


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Where every array of a training run lies: logical axis → mesh axis, several of them, or None.

    Mesh axes of size 1 divide nothing, so one table serves every mesh. ZeRO-1 (Rajbhandari et al. 2020,
    arXiv:1910.02054) is a table in which the moments name a mesh axis that the parameters don't.

    Attributes:
      parameters: of parameters, in training and as they are handed on.
      moments: of the optimizer's moments, to which gradients are brought; None: as the parameters.
      activations: of activations and of a batch's rows ("batch") and tokens ("length", at most one mesh axis).
    """

    parameters: Table = dataclasses.field(default_factory=lambda: dict(RULES))
    moments: Table | None = None
    activations: Table = dataclasses.field(default_factory=lambda: dict(ACTIVATIONS))

    def __post_init__(self) -> None:
        _check_table("parameters", self.parameters, RULES)
        _check_table("activations", self.activations, ACTIVATIONS)
        if self.moments is not None:
            _check_table("moments", self.moments, RULES)
        for name in ("batch", "length"):
            if name not in self.activations:
                raise UserError(f"ShardingRules.activations says nothing of {name!r}; None does not divide it")
        if len(mesh_axes(self.activations["length"])) > 1:
            raise UserError(f"ShardingRules.activations['length']={self.activations['length']!r}: a row's tokens can "
                            "lie along one mesh axis only")

    @property
    def of_moments(self) -> Table:
        """The table of the optimizer's moments."""
        return self.parameters if self.moments is None else self.moments


def _check_table(field: str, table: Rules, known: Rules) -> None:
    for name, axes in table.items():
        if name not in known:
            raise UserError(f"ShardingRules.{field} has a logical axis {name!r} that no array has; known: "
                            f"{', '.join(known)}")
        for axis in mesh_axes(axes):
            if axis not in AXES:
                raise UserError(f"ShardingRules.{field}[{name!r}]: there is no mesh axis {axis!r}; there are "
                                f"{', '.join(AXES)}")


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of a table's entry."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def devices_along(mesh: Mesh, axes: Iterable[str]) -> int:
    """Among how many devices mesh axes divide an array's axis."""
    return math.prod(mesh.shape[axis] for axis in axes)


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
      UserError: a logical axis without a rule, two axes of an array on one mesh axis, or an axis length its mesh axes
        don't divide; names the leaf.
    """

    def one(path: tuple, axes: tuple) -> NamedSharding:
        spec = partition_spec(axes, rules)
        used = [axis for entry in spec for axis in mesh_axes(entry)]
        if len(set(used)) < len(used):
            raise UserError(f"{_name(path)} with axes {axes}: the sharding rules put two of them on one mesh axis "
                            f"({', '.join(used)})")
        return NamedSharding(mesh, spec)

    result = jax.tree_util.tree_map_with_path(one, logical_axes, is_leaf=_is_axes)
    if shapes is not None:
        jax.tree_util.tree_map_with_path(
            lambda path, axes, shape: _check_divides(mesh, path, axes, shape.shape, rules), logical_axes, shapes,
            is_leaf=_is_axes)
    return result


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_divides(mesh: Mesh, path: tuple, axes: tuple, shape: tuple[int, ...], rules: Rules) -> None:
    if len(axes) != len(shape):
        raise UserError(f"{_name(path)} has shape {shape} but logical axes {axes}")
    for axis, length in zip(axes, shape, strict=True):
        names = mesh_axes(rules[axis] if axis is not None else None)
        size = devices_along(mesh, names)
        if length % size:
            raise UserError(f"{_name(path)} {shape}: its axis {axis!r} of length {length} can't be divided among the "
                            f"{size} devices of mesh axis {'×'.join(names)}; choose a mesh size that divides {length}")


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, activations: Rules = ACTIVATIONS) -> NamedSharding:
    """Rows of a batch [B, T] as it is handed to a step: each device has its own rows, whole.

    Where devices share the tokens of a row, each takes its own inside the step (`models.rows.laid_out`): of a token's
    dozen bytes of numbers nothing is saved by cutting them before, and a process brings its rows whichever devices
    share them.
    """
    return NamedSharding(mesh, PartitionSpec(activations["batch"], None))


def batch_shards(mesh: Mesh, activations: Rules = ACTIVATIONS) -> int:
    """Into how many parts the rows of a batch are cut."""
    return devices_along(mesh, mesh_axes(activations["batch"]))


def check_rows(num_rows: int, row_length: int, mesh: Mesh, accumulation: int = 1,
               activations: Rules = ACTIVATIONS) -> None:
    """Every device needs the same number of rows in every microbatch, and of each as many tokens; else a UserError."""
    shards = batch_shards(mesh, activations)
    if accumulation < 1:
        raise UserError(f"gradient_accumulation={accumulation} must be at least 1")
    unit = shards * accumulation
    if num_rows % unit:
        names = " × ".join(mesh_axes(activations["batch"])) or "one"
        raise UserError(f"a batch of {num_rows} rows can't be divided among {shards} devices ({names}) in "
                        f"{accumulation} microbatches; choose a multiple of {unit}, such as "
                        f"{unit * math.ceil(num_rows / unit)}")
    axes = mesh_axes(activations["length"])
    parts = devices_along(mesh, axes)
    if parts > 1 and row_length % (2 * parts):
        unit = 2 * parts
        raise UserError(f"rows of {row_length} tokens can't be divided among {parts} devices ({axes[0]}), each with "
                        f"two stretches of a row; choose a multiple of {unit}, such as "
                        f"{unit * math.ceil(row_length / unit)}")


def process_rows(sharding: NamedSharding, num_rows: int) -> tuple[int, int]:
    """Which share of a batch's rows this process has to bring.

    Processes that lie along the tensor, sequence or pipeline axis alone hold the same rows, so they bring the same.

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
