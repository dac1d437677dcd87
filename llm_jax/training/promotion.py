"""From a run that goes on, or went wrong, to a run directory that is fit to be served."""

from __future__ import annotations

import time
import uuid
from typing import Any

from etils import epath

from llm_jax import runs, storage
from llm_jax.checkpoints import Checkpoints
from llm_jax.errors import UserError
from llm_jax.training import origin

_KEPT = ("settings", "seed", "data_dir", "data_hash", "parameters")


def promote(run_dir: epath.PathLike, to: epath.PathLike, step: str | int = "good") -> dict[str, Any]:
    """Writes a run directory with one checkpoint's parameters, and nothing that only training needs.

    Args:
      run_dir: of a run that was trained with a gate.
      to: where; a directory that was promoted before is replaced, once the new one is whole.
      step: "good" for the newest checkpoint that passed the gate, "best", or a number; one that failed is refused.

    Returns:
      The new manifest's "promoted": `from`, `step`, `evaluation`, `time`.

    Raises:
      UserError: nothing passed, the checkpoint is gone, or `to` holds something else.
    """
    run = runs.load(run_dir, step=step)
    source, target = run.directory, storage.located(to)
    if source == target:
        raise UserError(f"{run_dir} can't be promoted to itself: --to is another directory")
    gate = run.manifest.get("gate")
    if gate is None:
        raise UserError(f"{run_dir} was trained without a gate: set GateConfig.at_most or GateConfig.max_rise")
    chosen = run.resolve_step()
    passed = gate.get("passed_steps", [])
    if chosen not in passed:
        raise UserError(f"step {chosen} of {run_dir} did not pass the gate, which passed {passed or 'none'}")
    evaluation = next(e for e in run.manifest["evaluations"] if e["step"] == chosen)
    check_replaceable(target)
    facts = {"from": str(source), "step": chosen, "evaluation": {k: v for k, v in evaluation.items() if k != "step"},
             "gate": {name: gate[name] for name in ("at_most", "max_rise")}, "time": round(time.time(), 3)}
    manifest = {name: run.manifest[name] for name in _KEPT if name in run.manifest}
    config_gin = source / runs.CONFIG
    fresh = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        runs.create(fresh, run.config, source, config_gin.read_text() if config_gin.exists() else "",
                    manifest | {"metrics": {"end": facts["evaluation"]}, "promoted": facts})
        origin.keep(source, fresh)
        with Checkpoints(fresh / runs.CHECKPOINTS, keep=1) as checkpoints:
            checkpoints.save(chosen, {"params": run.params}, 0, force=True)
        if target.exists():
            old = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}"
            target.rename(old)
            fresh.rename(target)
            old.rmtree()
        else:
            fresh.rename(target)
    except OSError as error:
        raise UserError(f"can't write to {target.parent}: {error.strerror or error}") from error
    finally:
        if fresh.exists():
            fresh.rmtree()
    return facts


def check_replaceable(target: epath.Path) -> None:
    """UserError unless nothing is there, or what was promoted before."""
    if not target.exists():
        return
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
        return
    if not target.is_dir() or not (target / runs.MODEL).exists() or "promoted" not in runs.load(target).manifest:
        raise UserError(f"{target} holds something that was not promoted: choose another directory")
