"""What has to be the same for a run directory to be continued, and whether it can be."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from llm_jax import runs, storage
from llm_jax.errors import UserError
from llm_jax.models import ModelConfig
from llm_jax.training.optimizer import OptimizerConfig


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
    probe = directory / f".writable-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"can't write to the run directory {directory}: {error.strerror or error}; set RUN_DIR to one "
                        "that can be written") from error


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
