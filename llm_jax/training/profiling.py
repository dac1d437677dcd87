"""A trace of a few steps, for xprof (`xprof logs/profile`, or TensorBoard with its profile plugin)."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from llm_jax.errors import UserError

STEP_NAME = "train"  # of the annotation by which xprof tells steps apart


def check_steps(steps: Any) -> None:
    """UserError unless `steps` is None or two whole numbers, the first step to trace and the last."""
    if steps is None:
        return
    is_pair = isinstance(steps, (tuple, list)) and len(steps) == 2
    if not is_pair or not all(isinstance(s, int) and not isinstance(s, bool) for s in steps) or not (
            1 <= steps[0] <= steps[1]):
        raise UserError(f"ReportConfig.profile_steps (PROFILE_STEPS) must be the first and the last step to trace, "
                        f"counted from 1, such as (10, 15), not {steps!r}")


class Profiler:
    """Traces steps `first` to `last` of a run; the first few of a process are better left out, they compile.

    A step's span has the name STEP_NAME and its number. The trace lies in `logs/profile/plugins/profile/TIME/`.
    """

    def __init__(self, steps: tuple[int, int] | None, logs: epath.PathLike, say: Callable[[str], None],
                 is_lead: bool = True):
        """Says what is to be traced; only the lead process traces, itself."""
        check_steps(steps)
        self._steps = steps if is_lead else None
        self._target = epath.Path(logs) / "profile"
        self._say = say
        self._folder: str | None = None

    @contextlib.contextmanager
    def step(self, step: int, before: Any) -> Any:
        """Around the call that sends `step`.

        Args:
          step: its number, from 1.
          before: arrays of the step before, which are awaited before a trace begins.
        """
        if self._steps is None:
            yield
            return
        if self._folder is None and self._steps[0] <= step <= self._steps[1]:
            jax.block_until_ready(before)
            self._folder = tempfile.mkdtemp(prefix="profile-")
            jax.profiler.start_trace(self._folder)
        with jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=step):
            yield

    def is_last(self, step: int) -> bool:
        """Whether the trace ends with `step`."""
        return self._folder is not None and self._steps is not None and step >= self._steps[1]

    def close(self, outputs: Any = None) -> None:
        """Writes what was traced, if anything, once `outputs` are there; a run that stops early keeps its trace too."""
        if self._folder is None:
            return
        jax.block_until_ready(outputs)
        folder, self._folder, self._steps = pathlib.Path(self._folder), None, None
        try:
            jax.profiler.stop_trace()
            _copy(folder, self._target)  # a profiler writes to local files only, and a run may be in a bucket
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._say(f"wrote a profile to {self._target}: xprof {self._target}")


def _copy(source: pathlib.Path, target: epath.Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            to = target / str(path.relative_to(source))
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
