"""What has to be the same for a run directory to be continued, whether it can be, and from which checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import uuid
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from llm_jax import runs, storage
from llm_jax.checkpoints import Checkpoints, UnreadableCheckpoint
from llm_jax.errors import UserError
from llm_jax.models import ModelConfig
from llm_jax.parallel import distributed
from llm_jax.training.lock import RunLock
from llm_jax.training.optimizer import OptimizerConfig

_PROBE = ".writable-"


def decisive_settings(*, model: Any, data: Any, data_hash: str, optimizer: Any, num_steps: int, seed: int,
                      z_loss: float, expert_capacity: float | None = None,
                      rope_context: int | None = None) -> dict[str, Any]:
    """The settings on which the trained parameters depend, as plain JSON.

    Mesh, dtype, remat, gradient accumulation, logging and checkpoint intervals change speed or rounding and are not
    among them: a run may be continued on other hardware. `num_steps` is, unless the decay of the learning rate was
    given its own length; then a run may be continued beyond its end.

    Args:
      model: `ModelConfig`.
      data: `DataConfig`.
      data_hash: of the prepared data.
      optimizer: `OptimizerConfig`.
      num_steps, seed, z_loss: as given to `train`.
      expert_capacity, rope_context: of `Execution`, the settings there that change what is computed.
    """
    optimizer_settings = dataclasses.asdict(optimizer) | {"decay_steps": optimizer.decay_steps or num_steps}
    settings = {
        "model": model.to_dict(),
        "data": {"hash": data_hash, "row_length": data.row_length, "batch_size": data.batch_size, "seed": data.seed},
        "optimizer": optimizer_settings,
        "seed": seed,
        "z_loss": z_loss,
        "expert_capacity": expert_capacity,
        "rope_context": rope_context,
    }
    return json.loads(json.dumps(settings))


def check_same(run_dir: epath.PathLike, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """UserError that names every setting of `wanted` that the run in `run_dir` was not started with."""
    before, now = _defaults() | _flat(saved), _flat(wanted)
    differing = [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in sorted(before | now)
                 if before.get(name) != now.get(name)]
    if differing:
        raise UserError(f"{run_dir} holds a run with other settings: {'; '.join(differing)}. Choose another run "
                        "directory, or remove this one")


def read_manifest(run_dir: epath.PathLike) -> dict[str, Any] | None:
    """The manifest of the run in `run_dir`, or None where there is no run yet."""
    directory = storage.located(run_dir)
    try:
        if not (directory / runs.MODEL).exists():  # it is written last: without it the others may be incomplete
            return None
        return json.loads((directory / runs.MANIFEST).read_text())
    except NotADirectoryError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / runs.MANIFEST} can't be read: {error}") from error


def check_writable(run_dir: epath.PathLike) -> None:
    """UserError unless `run_dir` exists, or can be made, and can be written to; asked before anything takes time."""
    directory = storage.located(run_dir)
    probe = directory / f"{_PROBE}{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"can't write to the run directory {directory}: {error.strerror or error}; set RUN_DIR to one "
                        "that can be written") from error


def take(run_dir: epath.PathLike, stack: contextlib.ExitStack) -> RunLock | None:
    """Locks the run directory, on the lead process for all of them, and tidies up after a killed trainer.

    Args:
      run_dir: the run directory.
      stack: lets go of the lock when it is closed.

    Returns:
      The lock, on the lead process.

    Raises:
      UserError: another trainer has it; on every process.
    """
    lock = problem = None
    if distributed.is_lead():
        try:
            lock = stack.enter_context(RunLock(run_dir))
            remove_leftovers(run_dir)
        except UserError as error:
            problem = str(error)
    if (problem := distributed.first_problem(problem)) is not None:
        raise UserError(problem)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # The first collective, while all are here: on CPU it fails if one comes 30 s after the others, from compiling.
        multihost_utils.sync_global_devices("start")
    return lock


def remove_leftovers(run_dir: epath.PathLike) -> None:
    """Removes what a killed trainer was writing, but for checkpoints, which `Checkpoints` does; call it alone there."""
    directory = storage.located(run_dir)
    for folder in (directory, directory / runs.LOGS):
        for path in folder.iterdir() if folder.is_dir() else ():
            if storage.is_temporary(path.name) or path.name.startswith(_PROBE):
                path.unlink(missing_ok=True)


def restore_newest(checkpoints: Checkpoints,
                   abstract_state: dict[str, Any]) -> tuple[dict[str, Any], int, dict] | None:
    """The newest checkpoint that is whole. Damaged ones after it are set aside, each with a warning.

    A checkpoint is damaged if its files are not what their checksums say, or, where it has none, if it can't be read.
    One whose checksums are right and which still can't be read is not: then it is this machine that can't.

    Args:
      checkpoints: of the run; with several processes each calls this.
      abstract_state: see `Checkpoints.restore`.

    Returns:
      What `Checkpoints.restore` does; None where there is no checkpoint.

    Raises:
      UserError: as `Checkpoints.restore`, or the only one left is damaged.
    """
    while (step := checkpoints.latest_step()) is not None:
        problem = distributed.first_problem(checkpoints.damage(step))
        if problem is None:
            try:
                return checkpoints.restore(abstract_state, step)
            except UnreadableCheckpoint as error:
                if checkpoints.has_checksums(step) or jax.process_count() > 1:
                    raise
                problem = error.reason
        folder = checkpoints.directory / str(step)
        before = [other for other in checkpoints.steps() if other != step]
        if not before:
            raise UserError(f"checkpoint {folder} is damaged ({problem}), and there is no other to go on from; remove "
                            "it to begin anew")
        aside = checkpoints.set_aside(step) if distributed.is_lead() else None
        distributed.first_problem(None)  # nobody looks again before it is renamed
        checkpoints.reload()
        if aside is not None:
            print(f"warning: checkpoint {folder} is damaged ({problem}); it is now {aside.name}, and the run goes on "
                  f"from step {before[-1]}", file=sys.stderr, flush=True)
    return None


def save_last(checkpoints: Checkpoints, last: tuple[Any, int, int] | None, totals: dict[str, Any]) -> str:
    """Saves the last state from beside a loop that hangs, if no later step has taken its memory and it was computed;
    completes what was being written in any case. Says what there is then.

    Of several processes none can save alone: the others would have to save with it.

    Args:
      checkpoints: of the run.
      last: the `TrainState` after a step, the step, and the batches consumed by then; None before the first.
      totals: what is saved beside it.
    """
    if last is not None and jax.process_count() == 1:
        state, step, data_state = last
        is_whole = all(not leaf.is_deleted() and leaf.is_ready() for leaf in jax.tree.leaves(state))
        if is_whole and int(state.first_bad_step) < 0:
            checkpoints.save(step, state.to_checkpoint(), data_state, totals | {"state": state.facts()}, force=True)
    checkpoints.wait()
    last = checkpoints.latest_step()
    return "there is no checkpoint yet" if last is None else f"the last checkpoint is that of step {last}"


def _defaults() -> dict[str, Any]:
    """What a run that was started before a setting existed had for it."""
    made = {section: {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
            for section, config in (("model", ModelConfig), ("optimizer", OptimizerConfig))}
    return _flat(json.loads(json.dumps(made)))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result
