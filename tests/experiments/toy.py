"""A library in small, for the tests of the launcher: what `llm_jax` looks like to Gin."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Literal

from llm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    peak_learning_rate: float
    warmup_steps: int = 10
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.peak_learning_rate < 0:
            raise UserError(f"peak_learning_rate={self.peak_learning_rate} is negative")


@dataclasses.dataclass(frozen=True)
class Plain:
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Data:
    data_dir: str
    shuffle: bool = True
    sizes: Sequence[int] = (1, 2)


PLAIN = Plain()


def make_data(data_dir: str) -> Data:
    return Data(data_dir)


def train(run_dir: str, optimizer: Optimizer, data: Data | None = None, num_steps: int = 5,
          after: Callable | None = None, extra: Plain = PLAIN, config_text: str = "") -> None:
    """Prints what it was given.

    Args:
      run_dir: where it would write.
    """
    print(json.dumps({"run_dir": run_dir, "optimizer": dataclasses.asdict(optimizer), "num_steps": num_steps,
                      "data": data and dataclasses.asdict(data), "after": after and after.__name__,
                      "rate": extra.rate, "text": config_text}))


def measure(run_dir: str, text: str | None = None, rows: int = 8, json_lines: bool = False,
            stop: tuple[str, ...] = ()) -> int:
    """Measures.

    Args:
      run_dir: the run to measure.
      text: a file of text.
    """
    print(json.dumps([run_dir, text, rows, json_lines, *stop]))
    return 3


def nothing() -> None:
    """Takes no settings."""
    print("ran")
