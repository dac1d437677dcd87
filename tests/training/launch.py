"""Training in processes of their own that start quickly: forked from one that has imported everything and done nothing.

They are processes like any other: what kills or stops one reaches no other. What a new interpreter would do besides is
shown by the tests that run `tests.training.train_once` as a command.
"""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import sys
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.training.train_once", "orbax.checkpoint", "tensorboardX",
                                 "orbax.checkpoint.checkpoint_managers", "jax.experimental.multihost_utils"])


class Launched:
    """One run of `train_once`: `process` (a `multiprocessing.Process`), and what it has said so far."""

    def __init__(self, log: pathlib.Path, run_dir: Any, data_dir: str, environment: dict[str, str] | None = None,
                 **options: Any):
        """Starts it.

        Args:
          log: takes what it says; what is there already stays.
          run_dir, data_dir, options: as `train_once` has them.
          environment: changes to that of this process.
        """
        self._log = log
        arguments = [str(run_dir), data_dir, *(f"{name}={value!r}" for name, value in options.items())]
        self.process = _CONTEXT.Process(target=_run, args=(arguments, str(log), environment or {}), daemon=True)
        self.process.start()

    @property
    def said(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def join(self, timeout: float = 120) -> int:
        """Waits for its end; its exit status, or the signal that killed it, negative."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running\n{self.said}"
        return self.process.exitcode


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    import jax

    from tests.training import train_once

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    if "JAX_NUM_CPU_DEVICES" in environment:
        jax.config.update("jax_num_cpu_devices", int(environment["JAX_NUM_CPU_DEVICES"]))  # which JAX has read already
    sys.argv = ["train_once", *arguments]
    train_once.main()
