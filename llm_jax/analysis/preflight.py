"""Before step 0: does the run fit, and if not, what would help?

The step is compiled anyway; here it is compiled before anything is made, and its memory is held against what each
device has. What can't fit is refused with advice, before a minute is spent or a file written.
"""

from __future__ import annotations

import os
import pathlib
import time
from typing import TYPE_CHECKING

import jax

from llm_jax.analysis.memory import GIB, StepMemory, gib, of_state, of_step, refusal
from llm_jax.errors import UserError

if TYPE_CHECKING:
    from llm_jax.training.assembly import Assembly

LIMIT = "LLM_JAX_MEMORY_GIB"  # GiB of each device, instead of what it says; 0 checks nothing
_CHUNK = 1024


def check(assembly: Assembly) -> str:
    """Compiles the step of a run and refuses it if it can't fit.

    Args:
      assembly: the run, on devices of this machine.

    Returns:
      A line that says what is predicted.

    Raises:
      UserError: on some process, the step needs more than a device has; with advice.
    """
    state = assembly.abstract_state()
    limit = device_limit(assembly.mesh)
    needed, asked = None, None
    began = time.perf_counter()
    try:
        needed = of_step(assembly.compile_step(), state)
    except jax.errors.JaxRuntimeError as error:
        found = refusal(error)
        if found is None or found.space != "hbm":
            raise
        needed, asked = of_state(state), found.asked
        limit = found.limit or limit
    seconds = time.perf_counter() - began
    is_too_much = needed is not None and limit is not None and (asked or needed.peak) > limit
    if _somewhere(is_too_much or asked is not None):
        assert needed is not None
        raise UserError(does_not_fit(assembly, needed, asked, limit))
    if needed is None:
        return f"compiled in {seconds:.1f} s; the compiler does not say how much memory the step needs"
    room = f" of {gib(limit)}" if limit is not None else ""
    return f"memory: {gib(needed.peak)}{room} per device: {needed} (compiled in {seconds:.1f} s)"


def _somewhere(is_refused: bool) -> bool:
    """Whether any process refuses: all have to, or the others would wait for it."""
    if jax.process_count() == 1:
        return is_refused
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.int32(is_refused)).any())


def does_not_fit(assembly: Assembly, needed: StepMemory, asked: int | None, limit: int | None) -> str:
    """The refusal and the advice, in one message."""
    room = f", and there are {gib(limit)}" if limit is not None else ""
    if asked is not None or needed.activations == 0:
        parts = f"parameters {gib(needed.parameters)}, optimizer {gib(needed.optimizer)}, the rest for a step"
    else:
        parts = str(needed)
    amount = gib(asked or needed.peak) if asked or needed.activations else "more than there is"
    return (f"a step does not fit: it needs {amount} on each of {assembly.mesh.size} devices ({parts}){room}. "
            f"What would help: {'; '.join(advice(assembly, needed, limit))}")


def advice(assembly: Assembly, needed: StepMemory, limit: int | None) -> list[str]:
    """What makes a step smaller, the most effective first; only what the run does not do already."""
    execution, mesh = assembly.execution, assembly.mesh
    tips = []
    # A step holds the state and, for a while, gradients of the parameters' size.
    if limit is not None and needed.parameters * 2 + needed.optimizer > 0.9 * limit:
        whole = needed.parameters * 2 + needed.optimizer
        tips.append(f"parameters, moments and gradients alone are {gib(whole)}: share them among more devices "
                    f"(MeshConfig.fsdp={mesh.shape['fsdp']}, tensor={mesh.shape['tensor']}), or take a smaller model")
    if execution.remat != "full":
        tips.append(f"Execution.remat='full' (it is {execution.remat!r}) keeps each block's input alone")
    rows = assembly.data.batch_size // (_row_shards(assembly) * assembly.accumulation)
    if rows > 1:
        tips.append(f"train.gradient_accumulation={assembly.accumulation * rows} (it is {assembly.accumulation}) works "
                    f"off a row at a time instead of {rows}")
    if execution.loss_chunk is None and rows * assembly.data.row_length > _CHUNK:
        tips.append(f"Execution.loss_chunk={_CHUNK} never holds the logits of all tokens")
    if execution.attention == "dense":
        tips.append("Execution.attention='auto' does not hold all scores (it is 'dense')")
    if execution.dtype == "float32":
        tips.append("Execution.dtype='bfloat16' halves the activations")
    if rows <= 1:
        tips.append(f"share each row among devices (MeshConfig.sequence={mesh.shape['sequence']} or "
                    f"tensor={mesh.shape['tensor']}), or shorten DataConfig.row_length={assembly.data.row_length}")
    tips.append(f"a smaller DataConfig.batch_size (it is {assembly.data.batch_size})" if rows > 1 else
                "devices with more memory")
    return tips


def _row_shards(assembly: Assembly) -> int:
    from llm_jax.parallel import rules

    return rules.batch_shards(assembly.mesh, assembly.rules.activations)


def device_limit(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes that a step may take on one device of this process; None where nothing tells.

    A device says what its allocator may take. Virtual devices of a CPU share what the host has left.
    """
    given = os.environ.get(LIMIT)
    if given:
        try:
            return int(float(given) * GIB) or None
        except ValueError:
            raise UserError(f"{LIMIT}={given!r} is not a number of GiB") from None
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if not local:
        return None
    if local[0].platform == "cpu":
        available = host_memory()
        return None if available is None else available // len(local)
    limits = [stats["bytes_limit"] for device in local if "bytes_limit" in (stats := device.memory_stats() or {})]
    return min(limits, default=None)


def host_memory() -> int | None:
    """Bytes that this process may still take: what the machine has left, or its container, if that is less."""
    try:
        import psutil

        available = psutil.virtual_memory().available
    except ImportError:
        return None
    left = [limit - used for limit, used in (_cgroup("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
                                             _cgroup("/sys/fs/cgroup/memory/memory.limit_in_bytes",
                                                     "/sys/fs/cgroup/memory/memory.usage_in_bytes")) if limit]
    return max(min([available, *left]), 0)


def _cgroup(limit: str, used: str) -> tuple[int, int]:
    """A container's limit, or 0, and what it uses of it without files that may be dropped."""
    try:
        most, current = (int(pathlib.Path(path).read_text()) for path in (limit, used))
        stat = pathlib.Path(used).with_name("memory.stat").read_text()
        cached = [int(line.split()[1]) for line in stat.splitlines() if line.split()[0].endswith("inactive_file")]
        return most, current - max(cached, default=0)
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return 0, 0
