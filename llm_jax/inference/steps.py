"""One device step on its way: prepared, running, done. Plain values and arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from llm_jax.inference.batch import Draws, StepBatch, StepShape
from llm_jax.inference.penalties import Extras
from llm_jax.inference.request import PromptLogprob, TopLogprobs
from llm_jax.inference.sampling import SamplingBatch
from llm_jax.inference.scheduler import Plan


@dataclasses.dataclass(frozen=True)
class Score:
    """Prompt tokens whose log-probabilities are asked for: those after the flat tokens from `start` on."""

    sequence_id: int
    start: int
    targets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PreparedStep:
    """A step ready to run, as arrays; afterwards its sequences may change, the step is what it was.

    Attributes:
      shape, batch: the compiled shape and what its forward pass reads.
      draws: which sequence draws where.
      sampling: how rows are drawn; None if all take the likeliest token and `extras` is None.
      extras: what changes logits before; None if nothing does.
      entering: (slot, tokens, prompt tokens) of sequences whose counts begin now.
      with_top: whether the likeliest tokens of each row are wanted.
      scores: prompt tokens to score.
      hidden: flat tokens whose hidden states are wanted, by sequence id.
      draft_batch: what the draft model's pass reads, if there is one.
      swap_out, swap_in: (device pages, host pages) to copy before the step.
    """

    shape: StepShape
    batch: StepBatch
    draws: tuple[Draws, ...]
    sampling: SamplingBatch | None = None
    extras: Extras | None = None
    entering: tuple[tuple[int, tuple[int, ...], int], ...] = ()
    with_top: bool = False
    scores: tuple[Score, ...] = ()
    hidden: tuple[tuple[int, slice], ...] = ()
    draft_batch: StepBatch | None = None
    swap_out: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    swap_in: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a step drew for a sequence: a token for each row it had, and what was asked for beside them."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[TopLogprobs, ...] = ()


@dataclasses.dataclass(frozen=True)
class StepResults:
    """A finished step, by sequence id: draws, scored prompt tokens, hidden states [count, D]."""

    drawn: dict[int, Drawn]
    scores: dict[int, tuple[PromptLogprob, ...]]
    hidden: dict[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RunningStep:
    """A step that the device was given; its arrays may not be there yet."""

    step: PreparedStep
    tokens: tuple[jax.Array, jax.Array]
    top: tuple[jax.Array, jax.Array] | None
    scores: tuple[tuple[jax.Array, jax.Array, jax.Array], ...]
    hidden: jax.Array | None

    def is_done(self) -> bool:
        """Whether the device has finished it."""
        array: Any = self.tokens[0]
        return bool(array.is_ready())


@dataclasses.dataclass(frozen=True)
class Flight:
    """A step on the device, and its plan."""

    plan: Plan
    running: RunningStep
