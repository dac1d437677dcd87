"""The start of several processes (hosts) that train one model together."""

from __future__ import annotations

import os

import jax

from llm_jax.errors import UserError

_COORDINATOR = "JAX_COORDINATOR_ADDRESS"
_COUNT = "JAX_NUM_PROCESSES"
_INDEX = "JAX_PROCESS_ID"
_ASK = "LLM_JAX_DISTRIBUTED"


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> bool:
    """Joins this process to its peers if it was asked to; alone it does nothing. Call before any device is touched.

    Asked means: arguments are given; or the environment has `JAX_COORDINATOR_ADDRESS` (host:port of process 0),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; or `LLM_JAX_DISTRIBUTED=1`, by which JAX finds the peers itself (TPU pods,
    SLURM, Open MPI, Kubernetes).

    Returns:
      Whether the process is now one of several.

    Raises:
      UserError: only part of the three environment variables is set, or peers could not be reached.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    coordinator = coordinator or os.environ.get(_COORDINATOR)
    is_auto = os.environ.get(_ASK, "") not in ("", "0")
    if coordinator is None and not is_auto:
        return False
    if coordinator is not None and not is_auto:
        try:
            num_processes = int(os.environ[_COUNT]) if num_processes is None else num_processes
            process_id = int(os.environ[_INDEX]) if process_id is None else process_id
        except (KeyError, ValueError) as error:
            raise UserError(f"{_COORDINATOR}={coordinator} needs {_COUNT} and {_INDEX} as whole numbers beside it "
                            f"({error})") from None
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"process {process_id} of {num_processes} could not join {coordinator}: {error}") from error
    return jax.process_count() > 1


def is_lead() -> bool:
    """Whether this process writes what is written once: logs, manifests, progress."""
    return jax.process_index() == 0
