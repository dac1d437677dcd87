"""Devices that are not there: what programs can be compiled for ahead of time, and what those devices have."""

from __future__ import annotations

import math
import os
import pathlib
import re
from typing import Any

from llm_jax.errors import UserError

# GiB that a program may take of the memory of one JAX device: what compilers and allocators say when it is not enough,
# less than what data sheets give by what the runtime keeps for itself.
USABLE_GIB = {
    "TPU v4": 30.75,
    "TPU v5 lite": 15.75,
    "TPU v5": 95.74,
    "TPU v6 lite": 31.25,
    "TPU7x": 94.75,
    "NVIDIA H100": 79.1,
}
# What XLA wants to know of the chip (an `xla.gpu.GpuTargetConfigProto`), from NVIDIA's data sheet of the H100 SXM.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84978434048
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_GPUS_PER_HOST = 8
_LIBTPU = pathlib.Path(__file__).resolve().parents[2] / ".venv-tpu" / "libtpu" / "libtpu.so"
_EXAMPLES = "'v5e:16x16', 'v6e:16x16', 'v5p:8x8x4', 'h100:8' or 'cpu:8'"


def devices(name: str) -> list[Any]:
    """The devices of a topology.

    Args:
      name: "v5e:16x16" and the like: TPUs by generation and the chips along each of their axes; "h100:64": NVIDIA GPUs,
        eight to a host; "cpu:8": this machine's virtual devices.

    Returns:
      Devices that programs can be compiled for; only those of "cpu" can run them.

    Raises:
      UserError: no such topology, or what compiles for it is not installed.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if found is None:
        raise UserError(f"--topology={name!r} is not a topology; write for example {_EXAMPLES}")
    kind, sizes = found[1].lower(), [int(n) for n in found[2].split("x")]
    if kind == "cpu":
        return _cpus(math.prod(sizes))
    if kind == "h100":
        return _gpus(math.prod(sizes))
    return _tpus(kind, found[2])


def usable_bytes(device: Any) -> int | None:
    """Bytes that a program may take of a device; None where it isn't known."""
    names = [name for name in USABLE_GIB if re.match(rf"{re.escape(name)}\b", device.device_kind)]
    return int(USABLE_GIB[max(names, key=len)] * 2**30) if names else None


def _cpus(count: int) -> list[Any]:
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # JAX has started already; what it has may be enough
    there = jax.devices("cpu")
    if len(there) < count:
        raise UserError(f"--topology=cpu:{count} needs {count} virtual devices and this process has {len(there)}; "
                        f"start it with JAX_NUM_CPU_DEVICES={count}")
    return there[:count]


def _tpus(kind: str, sizes: str) -> list[Any]:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU machine to ask about itself
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if _LIBTPU.exists():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(_LIBTPU))
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{sizes}").devices
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        if "not installed" in first:
            raise UserError("compiling for TPUs needs libtpu, in a folder of its own (x86-64 Linux): "
                            "python -m pip install --no-deps --target .venv-tpu -r requirements-tpu.txt") from None
        raise UserError(f"--topology={kind}:{sizes}: {first}; write for example {_EXAMPLES}") from None


def _gpus(count: int) -> list[Any]:
    from jax.experimental import topologies

    hosts, rest = divmod(count, _GPUS_PER_HOST)
    if rest and hosts:
        raise UserError(f"--topology=h100:{count}: more than {_GPUS_PER_HOST} GPUs come in hosts of {_GPUS_PER_HOST}")
    shape = f"1x{hosts}x{_GPUS_PER_HOST}" if hosts else f"1x1x{count}"
    try:
        return topologies.get_topology_desc(platform="cuda", target_config=H100, topology=shape).devices
    except (RuntimeError, NotImplementedError) as error:
        import jax

        first, version = str(error).splitlines()[0], jax.__version__
        raise UserError(f"this JAX cannot compile for CUDA ({first}); it needs python -m pip install --no-deps "
                        f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}") from None
