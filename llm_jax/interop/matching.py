"""Which tensor of a checkpoint goes where in our parameters, found and checked before a value is read or written."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from llm_jax import models, storage
from llm_jax.errors import UserError
from llm_jax.interop import families
from llm_jax.interop.mapping import Part, Path, Tensor
from llm_jax.interop.safetensors import DTYPES, Folder, listed
from llm_jax.interop.slices import flat
from llm_jax.models import ModelConfig
from llm_jax.models.layout import encoder_part, places

FLOATS = ("F32", "F16", "BF16", "F64")
_BLOCK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the stacked parameters.

    Attributes:
      shape, dtype: what it is stored as.
      axes: logical names of its axes.
      unit: how many leading axes tensors are entries of (layers, experts).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]
    unit: int


@dataclasses.dataclass(frozen=True)
class Match:
    """A checkpoint and a model that fit.

    Attributes:
      tensors: name in the checkpoint → what it is.
      ignored: names of tensors the model has no use for.
      tied: name of a copy → name of the tensor whose copy it is.
      leaves: path in the stacked parameters → what is there.
    """

    tensors: dict[str, Tensor]
    ignored: tuple[str, ...]
    tied: dict[str, str]
    leaves: dict[Path, Leaf]


def place(part: Part, config: ModelConfig) -> tuple[Path, tuple[int, ...]]:
    """Where a part lies in the stacked parameters: the leaf's path, and the leading indices of the part's slice."""
    if config.encoder_layers and part.path[0] == "encoder":
        path, index = place(dataclasses.replace(part, path=part.path[1:]), encoder_part(config))
        return ("encoder", *path), index
    layer = re.fullmatch(r"layers_(\d+)", part.path[0])
    if layer is None:
        return part.path, part.index
    found = places(config)[int(layer[1])]
    return (*found.path, *part.path[1:]), (found.index, *part.index)


def leaves_of(config: ModelConfig, tensors: Sequence[Tensor], dtypes: Mapping[str, np.dtype]) -> dict[Path, Leaf]:
    """The stacked parameters of a model, as wide as the widest tensor that is part of each.

    Args:
      config: the model.
      tensors: of the family; together they must cover every leaf once.
      dtypes: canonical name → dtype in which a tensor is to be kept.
    """
    model = models.build(config)
    shapes, axes = flat(models.abstract_params(model)), flat(models.logical_axes(model))
    covered: dict[Path, dict[tuple[int, ...], int]] = {path: {} for path in shapes}
    kept: dict[Path, Any] = {}
    for tensor in tensors:
        for part in tensor.parts:
            path, index = place(part, config)
            if path not in shapes or shapes[path].shape[len(index):] != part.shape or index in covered[path]:
                raise ValueError(f"{tensor.name}: {path}{list(index)} of shape {part.shape} has no place in the model")
            covered[path][index] = math.prod(part.shape)
            kept[path] = jnp.promote_types(kept.get(path, dtypes[tensor.name]), dtypes[tensor.name])
    for path, shape in shapes.items():
        if sum(covered[path].values()) != shape.size:
            raise ValueError(f"no tensors make up {'/'.join(path)} {shape.shape}")
    return {path: Leaf(tuple(shape.shape), np.dtype(kept[path]), axes[path], len(next(iter(covered[path]))))
            for path, shape in shapes.items()}


def match(folder: Folder, config: ModelConfig, family: Any, dtype: Any = None) -> Match:
    """Finds for every tensor its place, and for every place its tensor.

    Args:
      folder: the checkpoint.
      config: the model.
      family: module of `interop.families`.
      dtype: of the parameters; None keeps what is stored.

    Raises:
      UserError: tensors are missing or too many, of another shape or dtype, or a copy differs from its original; names
        the first few of each.
    """
    wanted = {tensor.name: tensor for tensor in family.tensors(config)}
    ignored, copies, problems = [], {}, []
    stored: dict[str, str] = {}  # canonical name → name in the checkpoint
    surplus, twice = [], []
    for name in folder.tensors:
        plain = families.canonical(family, name)
        if plain in stored:
            twice.append(name)
        elif plain in wanted:
            stored[plain] = name
        elif plain in family.TIED:
            copies[name] = family.TIED[plain]
        elif families.is_ignored(family, config, plain):
            ignored.append(name)
        else:
            surplus.append(name)
    missing = [name for name, tensor in wanted.items() if name not in stored]
    for names, what in ((missing, "missing"), (surplus, "that the model has no place for"), (twice, "there twice")):
        if names:
            problems.append(f"{_count(names)} {what}: {listed(names)}")
    problems += _unfit(folder, [(name, wanted[plain].shape) for plain, name in stored.items()], "shape")
    problems += _unfit(folder, [(name, None) for name in stored.values()], "dtype", dtype)
    problems += _unfit(folder, [(name, wanted[source].shape) for name, source in copies.items()], "shape")
    if problems:
        raise UserError(f"{folder.directory} does not fit its config.json ({config.family}): {'; '.join(problems)}")
    tied = {name: stored[source] for name, source in copies.items()}
    for name, source in tied.items():
        _check_equal(folder, name, source)
    present = list(wanted.values())
    keep = {plain: np.dtype(dtype) if dtype is not None else DTYPES[folder.tensors[name].dtype]
            for plain, name in stored.items()}
    return Match({stored[tensor.name]: tensor for tensor in present}, tuple(ignored), tied,
                 leaves_of(config, present, keep))


def parameter_dtype(name: str | None) -> np.dtype | None:
    """A float dtype by its name ("float32", "bfloat16", "float16"); None for None."""
    if name is None:
        return None
    try:
        dtype = np.dtype(jnp.dtype(name))
    except TypeError:
        dtype = None
    if dtype not in (np.dtype(np.float32), np.dtype(np.float16), DTYPES["BF16"]):
        raise UserError(f"parameters can be float32, bfloat16 or float16, not {name!r}")
    return dtype


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _unfit(folder: Folder, names: Sequence[tuple[str, Any]], what: str, dtype: Any = None) -> list[str]:
    """One sentence on the tensors of a wrong shape or dtype, or none."""
    bad = []
    for name, shape in names:
        info = folder.tensors[name]
        if what == "shape" and info.shape != shape:
            bad.append(f"{name} has shape {list(info.shape)}, expected {list(shape)}")
        elif what == "dtype" and info.dtype not in FLOATS:
            quantized = ": quantized checkpoints are not read" if info.dtype[:2] in ("F8", "U8", "I8") else ""
            bad.append(f"{name} has dtype {info.dtype}, expected one of {', '.join(FLOATS)}{quantized}")
        elif what == "dtype" and info.dtype == "F64" and dtype is None:
            bad.append(f"{name} has dtype F64, which is not kept: choose another, such as float32")
    return bad if len(bad) <= 2 else [f"{bad[0]} (and {len(bad) - 1} more such)"] if bad else []


def _check_equal(folder: Folder, name: str, source: str) -> None:
    """UserError unless both tensors have the same bytes; compared block by block."""
    a, b = folder.tensors[name], folder.tensors[source]
    rows = max(_BLOCK_BYTES * a.shape[0] // max(a.nbytes, 1), 1) if a.shape else 1
    same = a.dtype == b.dtype and all(
        folder.read(name, block).tobytes() == folder.read(source, block).tobytes()
        for block in ([slice(i, i + rows) for i in range(0, a.shape[0], rows)] if a.shape else [None]))
    if not same:
        raise UserError(f"{folder.directory}: {name} should be a copy of {source}, as config.json says that they are "
                        f"tied, and differs from it")


def describe(folder: Folder, matched: Match) -> bytes:
    """`tensors.json` of an imported run: what the checkpoint held, from which an export makes the same again."""
    return storage.to_json({
        "tensors": {name: {"dtype": info.dtype, "shape": list(info.shape)} for name, info in folder.tensors.items()},
        "canonical": {name: tensor.name for name, tensor in matched.tensors.items()},
        "ignored": list(matched.ignored),
        "tied": matched.tied,
    })
