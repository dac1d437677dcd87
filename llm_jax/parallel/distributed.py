"""The start of several processes (hosts) that train one model together, and what they tell each other meanwhile."""

from __future__ import annotations

import itertools
import os
from typing import Any

import jax

from llm_jax.errors import UserError

_COORDINATOR = "JAX_COORDINATOR_ADDRESS"
_COUNT = "JAX_NUM_PROCESSES"
_INDEX = "JAX_PROCESS_ID"
_ASK = "LLM_JAX_DISTRIBUTED"
_SHUTDOWN_S = 60  # how long a process that is done waits for the others to be
_MEETING_S = 24 * 3600  # for ever, as far as the run is concerned
_AGREEMENTS = itertools.count()


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None,
               heartbeat_timeout_s: float = 100) -> bool:
    """Joins this process to its peers if it was asked to; alone it does nothing. Call before any device is touched.

    Asked means: arguments are given; or the environment has `JAX_COORDINATOR_ADDRESS` (host:port of process 0),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; or `LLM_JAX_DISTRIBUTED=1`, by which JAX finds the peers itself (TPU pods,
    SLURM, Open MPI, Kubernetes).

    Args:
      coordinator, num_processes, process_id: as in the environment.
      heartbeat_timeout_s: seconds after which JAX's runtime takes a silent process for dead and aborts all others.

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
        jax.distributed.initialize(coordinator, num_processes, process_id,
                                   heartbeat_timeout_seconds=max(int(heartbeat_timeout_s), 1),
                                   shutdown_timeout_seconds=_SHUTDOWN_S)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"process {process_id} of {num_processes} could not join {coordinator}: {error}") from error
    return jax.process_count() > 1


def is_lead() -> bool:
    """Whether this process writes what is written once: logs, manifests, progress."""
    return jax.process_index() == 0


def first_problem(problem: str | None) -> str | None:
    """What the first process with a problem says, the same on all of them, or None.

    Every process has to call it, as often and in the same order; it returns when all have. Devices take no part, so it
    may come before anything is compiled, and the processes may be far apart in time; that one of them is lost meanwhile
    is for `training.watch` to notice.
    """
    if jax.process_count() == 1:
        return problem
    name, store = f"llm_jax/agreed/{next(_AGREEMENTS)}", key_values()
    store.set(f"{name}/{jax.process_index()}", problem or "")
    store.meet(name)
    said = store.all(name)
    return next((said[index] for index in sorted(said, key=int) if said[index]), None)


class KeyValues:
    """The key-value store of JAX's coordination service, which works while devices don't. Values are text."""

    def __init__(self, client: Any):
        self._client = client

    def set(self, key: str, value: str) -> None:
        """Puts down a value, in place of the one that was there."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def meet(self, name: str) -> None:
        """Returns when every process has called this with `name`, which can be used once."""
        self._client.wait_at_barrier(name, _MEETING_S * 1000)

    def all(self, folder: str) -> dict[str, str]:
        """The values below `folder`/, by the rest of their keys."""
        found = self._client.key_value_dir_get(folder + "/")
        return {key.rsplit("/", 1)[1]: value for key, value in found}


def key_values() -> KeyValues:
    """The store that the processes of this run share; a RuntimeError before `initialize`, or without peers."""
    from jax._src import distributed  # JAX offers it nowhere else; Orbax takes it from there too

    if distributed.global_state.client is None:
        raise RuntimeError("there is no coordination service")
    return KeyValues(distributed.global_state.client)
