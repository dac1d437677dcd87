"""How the tensors of a Hugging Face checkpoint and our parameters are each other's slices.

A family says, for a `ModelConfig`, the complete list of tensors a checkpoint of it holds: `tensors(config) ->
list[Tensor]`. Each `Tensor` is cut into `Part`s (a fused projection has several, most have one), and each part is a
slice of one leaf of the per-layer parameter tree (`models.unstack`), transposed and reshaped. Both directions are
exact: no byte is made or lost. The parts of all tensors together cover every leaf once.

Names are canonical: the ones today's `transformers` writes. A family whose real checkpoints carry other names for the
same tensors (GPT-2's without the leading "transformer.") has a function `canonical(name) -> name` that gives the
canonical one; `families.canonical` calls it, or returns the name as it is. Who writes a checkpoint back under the
names it came with keeps those names.

What else a checkpoint may hold is the family's `IGNORED` (regular expressions over canonical names: buffers the model
computes itself) and `TIED` (a name → the tensor it is a copy of, where that tensor is in the list and the name is not).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """tensor[start:stop along axis] → transpose(permutation) → reshape(shape) = leaf[index].

    Attributes:
      path: of the leaf in the per-layer tree, e.g. ("layers_0", "attention", "q").
      shape: of the leaf's slice.
      index: leading indices into the leaf (which expert); () is the whole leaf.
      start, stop: range of the tensor's axis `axis`; a `stop` of None is its end.
      axis: of the tensor.
      permutation: as of `numpy.transpose`; None leaves the axes in order.
    """

    path: Path
    shape: tuple[int, ...]
    index: tuple[int, ...] = ()
    start: int = 0
    stop: int | None = None
    axis: int = 0
    permutation: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
      name: canonical, e.g. "model.layers.0.self_attn.q_proj.weight".
      shape: as it is stored.
      parts: what it is made of, in order along their common axis.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        end = 0
        for part in self.parts:
            if part.start != end or part.axis != self.parts[0].axis:
                raise ValueError(f"{self.name}: its parts do not follow on one another")
            cut = _cut(part, self.shape)
            end = part.start + cut[part.axis]
            if math.prod(cut) != math.prod(part.shape):
                raise ValueError(f"{self.name}: {part.path} has shape {part.shape}, its slice is {cut}")
        if not self.parts or end != self.shape[self.parts[0].axis]:
            raise ValueError(f"{self.name}: its parts end at {end} of {self.shape}")


def _cut(part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a part before its transposition, in a tensor of `shape`."""
    stop = shape[part.axis] if part.stop is None else part.stop
    return (*shape[:part.axis], stop - part.start, *shape[part.axis + 1:])


def to_ours(part: Part, array: np.ndarray) -> np.ndarray:
    """A part's slice of our parameters.

    Args:
      part: of the tensor.
      array: the whole tensor as it is stored, any dtype.
    Returns:
      `part.shape`, same dtype; a view of `array` where that is possible.
    """
    cut = array[(slice(None),) * part.axis + (slice(part.start, part.stop),)]
    return cut.transpose(part.permutation).reshape(part.shape) if part.permutation else cut.reshape(part.shape)


def to_theirs(tensor: Tensor, get_part: Callable[[Part], np.ndarray]) -> np.ndarray:
    """A tensor as it is stored; the inverse of `to_ours` over all its parts.

    Args:
      tensor: which.
      get_part: a part → its slice of our parameters, `part.shape`; called once for each, in order.
    Returns:
      `tensor.shape`, contiguous, of the dtype of the parts.
    """
    out: np.ndarray | None = None
    for part in tensor.parts:
        cut = _restored(part, tensor.shape, get_part(part))
        if len(tensor.parts) == 1:
            return np.ascontiguousarray(cut).reshape(tensor.shape)
        if out is None:
            out = np.empty(tensor.shape, cut.dtype)
        out[(slice(None),) * part.axis + (slice(part.start, part.stop),)] = cut
    assert out is not None
    return out


def _restored(part: Part, shape: tuple[int, ...], ours: np.ndarray) -> np.ndarray:
    if part.permutation is None:
        return ours.reshape(_cut(part, shape))
    cut = _cut(part, shape)
    return ours.reshape([cut[axis] for axis in part.permutation]).transpose(np.argsort(part.permutation))


# Builders: the few ways in which checkpoints store a weight.

def same(name: str, path: Path, shape: tuple[int, ...], index: tuple[int, ...] = ()) -> Tensor:
    """Stored as we keep it."""
    return Tensor(name, shape, (Part(path, shape, index),))


def vector(name: str, path: Path, shape: tuple[int, ...]) -> Tensor:
    """Of one axis in the checkpoint (a bias [H · K]), of `shape` with us ([H, K])."""
    return Tensor(name, (math.prod(shape),), (Part(path, shape),))


def matrix(name: str, path: Path, inputs: tuple[int, ...], outputs: tuple[int, ...],
           index: tuple[int, ...] = ()) -> Tensor:
    """A torch `Linear`'s weight, stored [outputs, inputs]; with us [*inputs, *outputs]."""
    stored = (math.prod(outputs), math.prod(inputs))
    return Tensor(name, stored, (Part(path, (*inputs, *outputs), index, permutation=(1, 0)),))


def conv1d(name: str, path: Path, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Tensor:
    """GPT-2's `Conv1D`, stored [inputs, outputs]; with us [*inputs, *outputs]."""
    return Tensor(name, (math.prod(inputs), math.prod(outputs)), (Part(path, (*inputs, *outputs)),))


def fused(name: str, *pieces: Tensor, axis: int = 0) -> Tensor:
    """Tensors of one part each, laid behind one another along `axis` and stored as one."""
    parts, end = [], 0
    for piece in pieces:
        (part,) = piece.parts
        parts.append(dataclasses.replace(part, start=end, stop=end + piece.shape[axis], axis=axis))
        end += piece.shape[axis]
    first = pieces[0].shape
    return Tensor(name, (*first[:axis], end, *first[axis + 1:]), tuple(parts))
