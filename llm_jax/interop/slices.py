"""A checkpoint's parameters written and read slice by slice, so that no whole stack of layers is ever in memory.

Orbax writes whole arrays. What it makes of one is a TensorStore array (Zarr chunks in an OCDBT database) under the
leaf's name, and that can be written and read in pieces. So a checkpoint is first saved by Orbax itself with every leaf
one number wide, which gives all of its metadata; then the arrays are made anew at their full shapes, cut into chunks
of one layer (and one expert) or less, and filled.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from llm_jax import checksums
from llm_jax.checkpoints import CHUNK_BYTES, Checkpoints, write_checksums
from llm_jax.errors import UserError

Path = tuple[str, ...]
_TRANSACTION_BYTES = 32 << 20  # held in memory until they are written
_TILE = 512  # entries along an edge
_ITEM = "params"


def chunk_shape(shape: tuple[int, ...], itemsize: int, unit: int, shard: tuple[int, ...] | None = None,
                most_bytes: int = CHUNK_BYTES) -> tuple[int, ...]:
    """How a leaf is cut on disk.

    Args:
      shape: of the leaf.
      itemsize: bytes of an entry.
      unit: leading axes of which a chunk takes one entry (layers, experts).
      shard: what a device of the intended mesh will hold of it; no chunk crosses its borders.
      most_bytes: of a chunk, as nearly as the lengths of the axes allow.
    """
    shard = shard or shape
    chunk = [1] * unit + list(shard[unit:])
    for axis in range(unit, len(shape)):
        if math.prod(chunk) * itemsize <= most_bytes:
            break
        fitting = max(most_bytes // (math.prod(chunk) // chunk[axis] * itemsize), 1)
        if shard[axis] == shape[axis]:  # only this device's: pieces need not divide it
            chunk[axis] = math.ceil(chunk[axis] / math.ceil(chunk[axis] / fitting))
            continue
        divisor = max(d for d in range(1, min(fitting, chunk[axis]) + 1) if chunk[axis] % d == 0)
        if divisor * 8 >= fitting:  # otherwise its length has no useful divisor, and a later axis is cut
            chunk[axis] = divisor
    return tuple(max(length, 1) for length in chunk)


def regions(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """The chunks of an array, as indices into it."""
    yield from itertools.product(*([slice(start, min(start + step, length)) for start in range(0, length, step)]
                                   for length, step in zip(shape, chunk, strict=True)))


def contiguous(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy in C order and `dtype`, or `values` itself if it is that; nothing else is made on the way.

    It is made tile by tile: transposed, the whole thrashes the caches.
    """
    if values.flags.c_contiguous or values.ndim < 2:
        return np.ascontiguousarray(values, dtype)
    copy = np.empty(values.shape, dtype)
    rest = max(_TILE // max(math.prod(values.shape[2:]), 1), 1)
    for tile in regions(values.shape, (_TILE, rest, *(max(length, 1) for length in values.shape[2:]))):
        copy[tile] = values[tile]
    return copy


class SliceWriter:
    """Writes the only checkpoint, of step 0, of a new run directory. A context manager; only a clean end completes it.
    """

    def __init__(self, directory: epath.PathLike, shapes: Mapping[Path, tuple[tuple[int, ...], np.dtype]],
                 chunks: Mapping[Path, tuple[int, ...]], extra: dict[str, Any] | None = None):
        """Saves the metadata and makes the arrays, still empty.

        Args:
          directory: the run's `checkpoints` folder, on a local disk.
          shapes: path in the stacked tree → shape and dtype.
          chunks: path → shape of its chunks.
          extra: facts to keep in the checkpoint, that JSON can hold.
        """
        self._chunks = chunks
        self._dtypes = {path: np.dtype(dtype) for path, (_, dtype) in shapes.items()}
        with Checkpoints(directory) as checkpoints:
            small = nested({path: jnp.zeros((1,) * len(shape), dtype) for path, (shape, dtype) in shapes.items()})
            checkpoints.save(0, {_ITEM: small}, 0, extra, force=True)
        self._item = epath.Path(directory) / "0" / _ITEM
        (self._item.parent / checksums.NAME).unlink()  # of what it was; a clean end writes those of what it is
        names = {".".join(path): (shape, chunks[path]) for path, (shape, _) in shapes.items()}
        for file in (self._item / "_METADATA", *(self._item / "array_metadatas").glob("*")):
            file.write_text(json.dumps(_with_shapes(json.loads(file.read_text()), names)))
        self._stores = _remade(self._item, {path: shape for path, (shape, _) in shapes.items()}, chunks)
        self._pending = 0
        self._begin()

    def write(self, path: Path, index: tuple[int, ...], values: np.ndarray) -> None:
        """Writes `leaf[index]`; `values` may be a view of any strides and of another float dtype.

        Raises:
          UserError: the disk does not take it.
        """
        store = self._stores[path]
        whole = tuple(slice(i, i + 1) for i in index)
        for region in regions(values.shape, self._chunks[path][len(index):]):
            piece = contiguous(values[region], self._dtypes[path])
            piece = piece.reshape((1,) * len(index) + piece.shape)
            into = store.with_transaction(self._transaction)[(*whole, *region)]
            with self._writing():
                into.write(piece).result()
            self._pending += piece.nbytes
            if self._pending >= _TRANSACTION_BYTES:
                self._commit()

    def __enter__(self) -> SliceWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._commit()
            write_checksums(self._item.parent)

    def _begin(self) -> None:
        import tensorstore as ts

        self._transaction = ts.Transaction()

    def _commit(self) -> None:
        with self._writing():
            self._transaction.commit_sync()
        self._pending = 0
        self._begin()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"can't write to {self._item}: {reason[:300]}") from error


class SliceReader:
    """Reads the parameters of a checkpoint slice by slice."""

    def __init__(self, directory: epath.PathLike, step: int | None = None):
        """Opens the latest checkpoint, or that of a step, of a run's `checkpoints` folder.

        Raises:
          UserError: there is none.
        """
        with Checkpoints(directory, read_only=True) as checkpoints:
            self.step, shapes = checkpoints.params_shapes(step)
        self.shapes = flat(shapes)
        import tensorstore

        self._item = epath.Path(directory) / str(self.step) / _ITEM
        self._stores: dict[Path, Any] = {}
        self._context = tensorstore.Context()

    def read_into(self, path: Path, index: tuple[int, ...], out: np.ndarray) -> None:
        """Copies `leaf[index]` into `out`, chunk by chunk; it may be a view of any strides and of another float dtype.

        Raises:
          UserError: it is damaged.
        """
        with self._reading():
            store = self._store(path)
            chunk = store.chunk_layout.read_chunk.shape[len(index):]
            for region in regions(out.shape, chunk):
                out[region] = store[(*index, *region)].read().result()

    def _store(self, path: Path) -> Any:
        if path not in self._stores:
            self._stores[path] = _opened(self._item, path, self._context).result()
        return self._stores[path]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"checkpoint {self._item.parent} can't be read, it is damaged or incomplete "
                            f"({reason[:300]})") from error


def _spec(item: epath.Path, path: Path) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{item}/", "path": f"{'.'.join(path)}/"}}


def _opened(item: epath.Path, path: Path, context: Any = None) -> Any:
    import tensorstore as ts

    return ts.open(_spec(item, path) | {"fill_missing_data_reads": False}, open=True, read=True, context=context)


def _remade(item: epath.Path, shapes: Mapping[Path, tuple[int, ...]],
            chunks: Mapping[Path, tuple[int, ...]]) -> dict[Path, Any]:
    """The arrays anew, as Orbax made them but for their shapes and chunks."""
    import tensorstore as ts

    before = {path: _opened(item, path) for path in shapes}
    context = ts.Context()  # one database, not one an array
    made = {}
    for path, shape in shapes.items():
        metadata = before[path].result().spec().to_json()["metadata"]
        metadata |= {"shape": list(shape), "chunks": list(chunks[path])}
        # Chunks of zeros are stored too: one that is not there is damage.
        made[path] = ts.open(_spec(item, path) | {"metadata": metadata, "store_data_equal_to_fill_value": True},
                             create=True, delete_existing=True, context=context)
    return {path: store.result() for path, store in made.items()}


def _with_shapes(value: Any, names: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], name: str = "") -> Any:
    """Orbax's metadata with the shapes of the leaves that it describes put right."""
    if isinstance(value, list):
        return [_with_shapes(entry, names, name) for entry in value]
    if not isinstance(value, dict):
        return value
    if "key_metadata" in value:
        name = ".".join(str(key["key"]) for key in value["key_metadata"])
    name = value.get("param_name", name)
    which = {"write_shape": 0, "chunk_shape": 1}
    return {key: list(names[name][which[key]]) if key in which and name in names
            else _with_shapes(entry, names, name) for key, entry in value.items()}


def flat(tree: Any) -> dict[Path, Any]:
    """Path → leaf of a tree of dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda value: not isinstance(value, dict))
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def nested(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return tree
