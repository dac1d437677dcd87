"""What a run directory says of how its training went."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax import runs
from llm_jax.errors import UserError
from llm_jax.training.metric_log import read_rows

EVENTS = "events.jsonl"


@dataclasses.dataclass(frozen=True)
class Record:
    """A run's rows, with the facts that diagnoses need.

    Attributes:
      name: the run directory's own.
      train, validation: rows of `logs/metrics.jsonl`, in the order of their steps.
      manifest: the run's.
      events: of `logs/events.jsonl`: bad steps, and what was done about them.
    """

    name: str
    train: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    manifest: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]] = ()

    def setting(self, *path: str, default: Any = None) -> Any:
        """An entry of the manifest's `settings`, or `default`."""
        found: Any = self.manifest.get("settings", {})
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return default if found is None else found

    @property
    def last_step(self) -> int:
        """The last step that was reported."""
        return max((int(row["step"]) for row in (*self.train, *self.validation)), default=0)

    @property
    def num_steps(self) -> int:
        return int(self.manifest.get("num_steps", 0))

    @property
    def is_finished(self) -> bool:
        return self.manifest.get("finished_steps", 0) > 0

    @property
    def epochs(self) -> float | None:
        """How often the run has seen its data; None where the manifest doesn't say how much there is."""
        steps = self.manifest.get("steps_per_epoch")
        return self.last_step / steps if steps else None

    @property
    def is_on_cpu(self) -> bool:
        return str(self.manifest.get("devices", "")).lower().endswith("cpu")

    @property
    def num_devices(self) -> int:
        count = str(self.manifest.get("devices", "1")).split(" ")[0]
        return int(count) if count.isdigit() else 1

    @property
    def tokens_per_step(self) -> int:
        return self.setting("data", "batch_size", default=0) * self.setting("data", "row_length", default=0)

    @property
    def unigram_loss(self) -> float | None:
        """Nats per token that token frequencies alone would get, on the validation text; None if it isn't known."""
        per_byte = self.manifest.get("metrics", {}).get("unigram_bits_per_byte")
        last = next((row for row in reversed(self.validation) if row.get("bits_per_byte")), None)
        if not per_byte or last is None or not math.isfinite(last["loss"]):
            return None
        return per_byte * last["loss"] / last["bits_per_byte"]  # the ratio is nats per token over bits per byte

    @property
    def first_loss(self) -> float | None:
        """Of the untrained model."""
        rows = [row for row in (*self.validation[:1], *self.train[:1]) if math.isfinite(row["loss"])]
        return rows[0]["loss"] if rows else None

    def series(self, name: str, rows: Sequence[Mapping[str, Any]] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one figure of the training rows (or of `rows`), where it is there."""
        rows = [row for row in (self.train if rows is None else rows) if isinstance(row.get(name), (int, float))]
        return np.array([row["step"] for row in rows], float), np.array([row[name] for row in rows], float)


def read(run_dir: Any) -> Record:
    """Reads a run directory.

    Raises:
      UserError: it is not one, or nothing was trained in it.
    """
    run = runs.load(run_dir)
    logs = run.directory / runs.LOGS
    try:
        rows = in_order(read_rows(logs))
        path = logs / EVENTS
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"the logs of {run_dir} can't be read: {error}") from error
    train, validation = ([row for row in rows if row.get("kind") == kind and "loss" in row]
                         for kind in ("train", "validation"))
    if not train and not validation and not events:
        raise UserError(f"{run_dir} has no training steps in its log yet")
    return Record(run.directory.name, train, validation, run.manifest, events)


def in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows by step, without those that were reported again by a process that went on from an earlier checkpoint."""
    kept: list[Mapping[str, Any]] = []
    for row in rows:
        later = list(itertools.takewhile(lambda other: other["step"] >= row["step"], reversed(kept)))  # noqa: B023
        if any(other["step"] > row["step"] or other.get("kind") == row.get("kind") for other in later):
            del kept[len(kept) - len(later):]
        kept.append(row)
    return kept


def level(values: np.ndarray, count: int) -> float:
    """The mean of the last `count` values, fewer if there are not so many; NaN without any."""
    return float(np.mean(values[-max(count, 1):])) if values.size else math.nan


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running means over `width` values, the first ones over as many as there are."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, values.size + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def median_ratio(row: Mapping[str, Any]) -> float | None:
    """The median over the parts of the model of how far an update moves a weight relative to its size."""
    ratios = row.get("update_ratio")
    if not isinstance(ratios, Mapping):
        return None
    values = [value for part in ratios.values() for value in (part if isinstance(part, list) else [part])
              if isinstance(value, (int, float)) and math.isfinite(value)]
    return float(np.median(values)) if values else None
