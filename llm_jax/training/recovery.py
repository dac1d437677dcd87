"""What is done about steps that were not applied: the record of them, and the way back to an earlier checkpoint.

The device has decided (see `training.guard`) by the time the host looks: a step that was dropped has changed nothing,
and one that ends the run, or sends it back, has let nothing after it change anything.

Each step of a run takes the next batch of the data, but for ranges of batches that a rollback passed over; they are
kept in the manifest, so the order of the data is the same however often the run is stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from llm_jax import runs, storage
from llm_jax.checkpoints import Checkpoints
from llm_jax.data.loader import TrainLoader
from llm_jax.errors import UserError
from llm_jax.training.guard import APPLIED, NOT_FINITE, OVERFLOW, SPIKE, RecoveryConfig
from llm_jax.training.state import TrainState

EVENTS = "events.jsonl"
_KINDS = {OVERFLOW: "overflow", NOT_FINITE: "not_finite", SPIKE: "spike"}
_SAID = {OVERFLOW: "the gradient overflows", NOT_FINITE: "the loss or its gradient is not finite",
         SPIKE: "the loss or its gradient is far above what it was"}
_NAMED_DOCUMENTS = 16  # how many documents of a bad batch a message names


class Recovery:
    """One run's record of what went wrong, kept by the lead process and followed by all."""

    def __init__(self, config: RecoveryConfig, run_dir: epath.Path, loader: TrainLoader, *, is_lead: bool = True,
                 manifest: Mapping[str, Any] | None = None, say: Callable[[str], None] = lambda line: None):
        """Reads what earlier processes of the run noted.

        Args:
          config: the policy.
          run_dir: the run directory.
          loader: of the training data; this moves it past what a rollback passed over.
          is_lead: whether this process writes.
          manifest: the run's, or None where it begins.
          say: prints a line.
        """
        noted = (manifest or {}).get("recovery", {})
        self._config, self._run_dir, self._loader, self._is_lead = config, run_dir, loader, is_lead
        self._rollbacks: list[dict[str, int]] = list(noted.get("rollbacks", []))
        self._is_returning = bool(noted.get("is_returning", False))
        self._path = run_dir / runs.LOGS / EVENTS
        self.say = say

    @property
    def counts(self) -> dict[str, int]:
        """`rollbacks`, where the policy or the past has any."""
        return {"rollbacks": len(self._rollbacks)} if self._rollbacks or self._config.on_bad == "rollback" else {}

    def totals(self, state: TrainState) -> dict[str, int]:
        """What a run came to: `skipped_steps`, `overflow_steps`, `rollbacks`, those that aren't 0."""
        skipped, overflows = jax.device_get((state.guard.skipped, state.scale.overflows))
        counts = {"skipped_steps": int(skipped), "overflow_steps": int(overflows), "rollbacks": len(self._rollbacks)}
        return {name: count for name, count in counts.items() if count}

    @property
    def passed_over(self) -> list[tuple[int, int]]:
        """The ranges of batches (first, last) that no step takes, in order and apart."""
        ranges: list[tuple[int, int]] = []
        for first, last in sorted((rollback["first_batch"], rollback["last_batch"]) for rollback in self._rollbacks):
            if ranges and first <= ranges[-1][1] + 1:
                first, last = ranges[-1][0], max(last, ranges.pop()[1])
            ranges.append((first, last))
        return ranges

    def batch_of(self, step: int) -> int:
        """The number of the batch that the step after `step` steps takes."""
        batch = step
        for first, last in self.passed_over:
            if first <= batch:
                batch += last - first + 1
        return batch

    def begin(self, step: int) -> None:
        """For a process that goes on after `step`: forgets the events after it, which will come again. Those from
        before a rollback will not, and stay."""
        if not self._is_lead or not self._path.exists():
            return
        events = [json.loads(line) for line in self._path.read_text().splitlines()]
        last_return = max((i for i, event in enumerate(events) if event["action"] == "rolled back"), default=-1)
        self._write([event for i, event in enumerate(events) if i <= last_return or event["step"] <= step])

    def finish_return(self, checkpoints: Checkpoints) -> None:
        """Removes the checkpoints that a rollback left behind, if an earlier process was killed in the middle of it."""
        if self._is_returning:
            self._leave(checkpoints)

    def seek(self, step: int) -> int:
        """Moves the loader to the batch that the step after `step` steps takes; returns its number."""
        batch = self.batch_of(step)
        if batch != self._loader.state:
            self._loader.set_state(batch)
        return batch

    def look(self, checkpoints: Checkpoints, step: int, batch: int, metrics: Mapping[str, Any]) -> bool:
        """Looks at a finished step.

        Args:
          checkpoints: the run's.
          step: its number, from 1.
          batch: the number of its batch.
          metrics: host numbers of `training.step.update`.

        Returns:
          Whether the run has to return to the latest checkpoint, all later ones being removed.

        Raises:
          UserError: the run can't go on.
        """
        outcome = int(metrics["outcome"])
        if metrics["first_bad_step"] < 0:
            if outcome != APPLIED:
                self._note(step, batch, metrics, "skipped")
                scale = f" at loss scale {float(metrics['loss_scale']):g}" if outcome == OVERFLOW else ""
                self.say(f"step {step} (batch {batch}) skipped: {_SAID[outcome]}{scale}; {_numbers(metrics)}")
            return False
        checkpoints.wait()
        if self._config.on_bad != "rollback":
            in_a_row = self._config.max_events if self._config.on_bad == "skip" else 0
            self._stop(checkpoints, step, batch, metrics,
                       f"; the {in_a_row} steps before it were skipped for the like" if in_a_row else "")
        behind = [s for s in checkpoints.steps() if step - 1 - s >= self._config.rollback_steps]
        target = max(behind) if behind else min(checkpoints.steps(), default=0)
        in_a_row = 0
        for rollback in reversed(self._rollbacks):
            if target > rollback["to_step"]:
                break
            in_a_row += 1
        if in_a_row >= self._config.max_events:
            self._stop(checkpoints, step, batch, metrics, f"; the run went back {in_a_row} times and never got to a "
                                                          "later checkpoint")
        first = self.batch_of(target)
        self._note(step, batch, metrics, "rolled back", to_step=target, batches=[first, batch])
        self._rollbacks.append({"step": step, "to_step": target, "first_batch": first, "last_batch": batch})
        self.say(f"step {step} (batch {batch}): {_SAID[outcome]}; {_numbers(metrics)}. The run returns to step {target}"
                 f" and goes on after this batch; batches {first} to {batch} are passed over")
        self._leave(checkpoints)
        return True

    def _leave(self, checkpoints: Checkpoints) -> None:
        """Removes the checkpoints after the one that the last rollback returns to; noted first, so that a process that
        is killed here is finished by the next."""
        self._record(is_returning=True)
        for step in reversed(checkpoints.steps()):
            if step > self._rollbacks[-1]["to_step"]:
                checkpoints.remove(step)
        self._record(is_returning=False)

    def _record(self, *, is_returning: bool) -> None:
        self._is_returning = is_returning
        if self._is_lead:
            runs.update_manifest(self._run_dir, recovery={"rollbacks": self._rollbacks, "is_returning": is_returning})

    def _stop(self, checkpoints: Checkpoints, step: int, batch: int, metrics: Mapping[str, Any], more: str) -> None:
        """Names the step, its documents and what to go back to."""
        outcome = int(metrics["outcome"])
        documents = self._loader.documents(batch)
        last = checkpoints.latest_step()
        good = "there is no checkpoint yet"
        if last is not None:
            good = f"the last good checkpoint is {self._run_dir / runs.CHECKPOINTS / str(last)} (step {last})"
        details = self._run_dir / runs.LOGS / f"{_KINDS[outcome]}_step_{step}.json"
        if self._is_lead:
            facts = {"step": step, "batch": batch, "documents": documents, "sources": self._loader.sources(batch)}
            storage.write_atomically(details, json.dumps(facts, indent=1).encode())
        self._note(step, batch, metrics, "stopped")
        named = " ".join(documents[:_NAMED_DOCUMENTS])
        others = f" and {len(documents) - _NAMED_DOCUMENTS} more" if len(documents) > _NAMED_DOCUMENTS else ""
        raise UserError(f"{_SAID[outcome]} at step {step} (batch {batch}): {_numbers(metrics)}{more}; its documents "
                        f"are {named}{others} (all in {details}); {good}. The step was not applied")

    def _note(self, step: int, batch: int, metrics: Mapping[str, Any], action: str, **more: Any) -> None:
        """Adds an event to `logs/events.jsonl`."""
        if not self._is_lead:
            return
        event = {"kind": _KINDS[int(metrics["outcome"])], "action": action, "step": step, "batch": batch,
                 "loss": _plain(metrics["loss"]), "grad_norm": _plain(metrics["grad_norm"])}
        if "loss_scale" in metrics:
            event["loss_scale"] = float(metrics["loss_scale"])
        event |= more | {"time": round(time.time(), 3), "documents": self._loader.documents(batch),
                         "sources": self._loader.sources(batch)}
        known = self._path.read_text().splitlines() if self._path.exists() else []
        self._write([json.loads(line) for line in known] + [event])

    def _write(self, events: list[dict[str, Any]]) -> None:
        storage.write_atomically(self._path, "".join(json.dumps(event) + "\n" for event in events).encode())


def _numbers(metrics: Mapping[str, Any]) -> str:
    return f"loss {float(metrics['loss']):g}, gradient norm {float(metrics['grad_norm']):g}"


def _plain(value: Any) -> float | str:
    """A number as JSON can hold it: what is not finite as a word."""
    number = float(value)
    return number if number - number == 0 else str(number)
