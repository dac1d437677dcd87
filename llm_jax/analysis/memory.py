"""What a train step holds on each device, from the program the compiler made, or from its refusal to make one."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"memory space (\w+).*?Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)", re.DOTALL)
_NEEDED = re.compile(r"required[^(]*\(([\d.]+)([KMGT]?)\) exceeds available (\w+) \(([\d.]+)([KMGT]?)\)")
_ALLOCATE = re.compile(r"(?:allocate|allocating) ([\d.]+) ?(?:([KMGT])i?B|bytes?)")


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of one device.

    Attributes:
      parameters: of the model.
      optimizer: moments and whatever else is carried from step to step.
      activations: the most that a step holds beside those: activations, gradients, the batch, scratch space. 0 where
        the compiler gave up before it knew.
      peak: all of it at once.
    """

    parameters: int
    optimizer: int
    activations: int
    peak: int

    def __str__(self) -> str:
        return (f"parameters {gib(self.parameters)}, optimizer {gib(self.optimizer)}, "
                f"activations and gradients {gib(self.activations)}")


def gib(num_bytes: float) -> str:
    """Bytes as a person reads them."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.{1 if num_bytes < 100 * size else 0}f} {unit}"
    return f"{num_bytes:.0f} B"


def bytes_per_device(tree: Any) -> int:
    """Bytes of abstract or real arrays with shardings that one device holds (all hold the same)."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def of_state(state: Any) -> StepMemory:
    """Memory of a `TrainState` alone, abstract or real; `peak` is its size."""
    parameters, whole = bytes_per_device(state.params), bytes_per_device(state)
    return StepMemory(parameters, whole - parameters, 0, whole)


def of_step(compiled: jax.stages.Compiled, state: Any) -> StepMemory | None:
    """Memory of a compiled step that takes `state`; None where the compiler does not tell.

    Inputs that are given away (the state is) share their memory with the outputs and count once.
    """
    stats = compiled.memory_analysis()
    if stats is None or stats.argument_size_in_bytes == 0:
        return None
    # What compilers for TPU call the peak is all there is to know of scratch space; others leave it out of the peak.
    peak = max(getattr(stats, "peak_memory_in_bytes", 0),
               stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
               + stats.temp_size_in_bytes)
    held = of_state(state)
    return dataclasses.replace(held, peak=peak, activations=max(peak - held.peak, 0))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A compiler's or an allocator's "out of memory".

    Attributes:
      asked: bytes it asked for; None if it does not say.
      limit: bytes there are; None if it does not say.
      space: the memory it means: "hbm" is a device's own, others are parts of its cores ("vmem", "smem").
    """

    asked: int | None
    limit: int | None
    space: str = "hbm"


def refusal(error: Exception) -> Refusal | None:
    """Reads an exception; None if it is not about memory."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    used = _USED.search(text)
    if used:
        return Refusal(_bytes(used[2], used[3]), _bytes(used[4], used[5]), used[1])
    needed = _NEEDED.search(text)
    if needed:
        return Refusal(_bytes(needed[1], needed[2]), _bytes(needed[4], needed[5]), needed[3].lower())
    asked = _ALLOCATE.search(text)
    return Refusal(_bytes(asked[1], asked[2] or "") if asked else None, None)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
