"""The device mesh: axes `data`, `fsdp`, `expert`, `pipeline`, `sequence` and `tensor`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from llm_jax.errors import UserError

AXES = ("data", "fsdp", "expert", "pipeline", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each mesh axis; at most one may be -1, "all that are left".

    Attributes:
      data: copies of the model; each sees other rows.
      fsdp: devices that share parameters, gradients and moments among them, and also see other rows.
      tensor: devices that share each matrix product.
      expert: devices that share the experts of a mixture among them, and also see other rows.
      sequence: devices that share the tokens of each row.
      pipeline: devices that share the layers, each a stretch of them.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    sequence: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes, strict=True):
            if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
                raise UserError(f"MeshConfig.{axis} must be a positive whole number or -1, not {size!r}")
        if sizes.count(-1) > 1:
            raise UserError(f"MeshConfig has more than one -1: {self}")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """The sizes of the mesh axes (`AXES`) on `num_devices` devices, -1 filled in; UserError if they don't fit."""
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    wanted = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if fixed > num_devices or num_devices % fixed:
        raise UserError(f"a mesh of {wanted} does not fit {num_devices} devices: {fixed} does not divide them; "
                        f"choose sizes that multiply to {num_devices}")
    return tuple(num_devices // fixed if size == -1 else size for size in sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh with the axes `AXES`, whose shardings the compiler propagates.

    A mesh smaller than the machine takes the first devices; across processes it has to take all of them, since every
    process takes part in every step.

    Args:
      config: sizes of the axes.
      devices: the devices to use; None is all of them.

    Returns:
      A mesh of Auto axes, tensor-parallel neighbours closest together.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    size = math.prod(shape)
    if size < len(devices) and jax.process_count() > 1:
        raise UserError(f"a mesh of {size} devices would leave {len(devices) - size} of {len(devices)} idle, which "
                        f"{jax.process_count()} processes can't do; set MeshConfig.data=-1 to use all")
    try:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:size])
    except NotImplementedError:
        wanted = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True) if size > 1)
        raise UserError(f"a mesh of {wanted} can't be laid along the network of {size} {devices[0].device_kind}: each "
                        "mesh axis has to be the product of whole axes of the network; choose other sizes, or another "
                        "topology") from None
