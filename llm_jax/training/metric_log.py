"""The two places that metrics are written to: `logs/metrics.jsonl`, and TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from llm_jax import storage

METRICS = "metrics.jsonl"


class JsonLines:
    """A growing file of JSON lines that is only ever replaced whole, so that it works in a bucket and is never torn.

    Attributes:
      last_row: the last line that an earlier process of the run wrote of its training, kept or not; None without one.
    """

    def __init__(self, path: epath.Path, first_step: int):
        self._path = path
        self._lines: list[str] = []
        self._write_after = 0.0
        self.last_row: dict[str, Any] | None = None
        if path.exists():
            rows = [(line, _read(line)) for line in path.read_text().splitlines()]
            self.last_row = next((row for _, row in reversed(rows) if row.get("kind") == "train"), None)
            # What was reported after the checkpoint that this process starts from will be reported again.
            self._lines = [line for line, row in rows if row.get("step", math.inf) <= first_step]

    def add(self, row: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(_plain(row)))
        if time.monotonic() > self._write_after:
            self.flush()

    def flush(self) -> None:
        began = time.monotonic()
        storage.write_atomically(self._path, "".join(line + "\n" for line in self._lines).encode())
        # The longer a run's file, the more seldom it is written: never more than a twentieth of the time.
        self._write_after = time.monotonic() + max(5.0, 20 * (time.monotonic() - began))


def read_rows(logs: Any) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, numbers that JSON has no name for included; none if there is no file.

    Args:
      logs: the run's `logs` folder, a pathlib-like path.
    """
    path = logs / METRICS
    if not path.exists():
        return []
    rows = [_read(line) for line in path.read_text().splitlines()]
    return [{name: _number(value) for name, value in row.items()} for row in rows if row]


class TensorBoard:
    """Event files in the run's `logs`; numbers in nested dicts and lists get a tag each."""

    def __init__(self, logs: epath.Path, first_step: int):
        """Opens the files.

        Raises:
          ImportError: tensorboardX is not installed.
        """
        # It imports torch where torch is installed, which takes seconds: only a run that trains pays for it.
        import tensorboardX

        purge_step = first_step + 1 if first_step else None
        self._writer = tensorboardX.SummaryWriter(str(logs), purge_step=purge_step, flush_secs=10)

    def add(self, tag: str, value: Any, step: int) -> None:
        """A number as `tag`, those of a dict as `tag/name`, those of a list as `tag/00`, `tag/01`, …; no None."""
        if isinstance(value, Mapping):
            for name, inner in value.items():
                self.add(f"{tag}/{name}", inner, step)
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                self.add(f"{tag}/{i:02d}", inner, step)
        elif isinstance(value, (int, float)):
            self._writer.add_scalar(tag, value, step)

    def add_values(self, tag: str, values: np.ndarray, step: int) -> None:
        """A histogram of a few values."""
        self._writer.add_histogram(tag, values, step)

    def add_histogram(self, tag: str, counted: Mapping[str, Any], step: int) -> None:
        """A histogram of values that were counted where they lie: see `pictures.histogram`."""
        counts = np.asarray(counted["counts"], np.float64)
        limits = np.linspace(float(counted["low"]), float(counted["high"]), counts.size + 1)[1:]
        self._writer.add_histogram_raw(tag, float(counted["low"]), float(counted["high"]), float(counts.sum()),
                                       float(counted["sum"]), float(counted["squares"]), limits.tolist(),
                                       counts.tolist(), step)

    def add_picture(self, tag: str, pixels_HWC: np.ndarray, step: int) -> None:
        """A picture, uint8, red, green, blue."""
        self._writer.add_image(tag, pixels_HWC, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _read(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:  # a line of another program, or of a disk that lost it
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), (int, float)) else {}


def _plain(value: Any) -> Any:
    """As JSON can say it: numbers it has no name for become text."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
