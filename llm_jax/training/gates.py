"""What evaluations decide: which checkpoint is best, when a run may stop early, and what is fit to be promoted.

All of it is a pure function of the evaluations so far, which the manifest keeps, and of the settings. So a run that
was stopped and goes on decides as one that never was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.errors import UserError

Evaluation = Mapping[str, Any]  # "step", and figures by name: "loss", "perplexity", "bits_per_byte"


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """What is made of evaluations; by default they are only reported.

    Attributes:
      metric: the figure that says which evaluation is best; less is better.
      keep_best: whether the checkpoint of the best evaluation is kept, beside the latest ones.
      patience: evaluations in a row that may pass without a better one before the run ends; None lets it run.
      min_delta: by how much a figure has to be below the best one to count as better.
      at_most: figure → the most it may be in an evaluation that passes the gate, such as {'bits_per_byte': 1.2}.
      max_rise: how far `metric` may be above its best value so far; None for as far as it likes.
    """

    metric: str = "loss"
    keep_best: bool = False
    patience: int | None = None
    min_delta: float = 0.0
    at_most: dict[str, float] = dataclasses.field(default_factory=dict)
    max_rise: float | None = None

    def __post_init__(self) -> None:
        patience = self.patience
        if patience is not None and (isinstance(patience, bool) or not isinstance(patience, int) or patience < 1):
            raise UserError(f"GateConfig.patience must be a whole number of at least 1, or None, not {patience!r}")
        for name in ("min_delta", "max_rise"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
                raise UserError(f"GateConfig.{name} must be a number of at least 0, not {value!r}")
        for name, limit in self.at_most.items():
            if isinstance(limit, bool) or not isinstance(limit, (int, float)):
                raise UserError(f"GateConfig.at_most[{name!r}] must be a number, not {limit!r}")

    @property
    def is_gate(self) -> bool:
        """Whether an evaluation can fail."""
        return bool(self.at_most) or self.max_rise is not None

    @property
    def is_idle(self) -> bool:
        """Whether evaluations decide nothing."""
        return not (self.keep_best or self.is_gate or self.patience is not None)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the evaluations so far say.

    Attributes:
      best: the best evaluation; None without any.
      stop: why the run may end, or None.
      failed: of the last evaluation, name of the condition → [figure, limit]; empty if it passed.
      passed: steps of the evaluations that passed.
    """

    best: Evaluation | None = None
    stop: str | None = None
    failed: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    passed: tuple[int, ...] = ()

    @property
    def good_step(self) -> int | None:
        """The last step that passed; None if none did."""
        return self.passed[-1] if self.passed else None


def judge(evaluations: Sequence[Evaluation], config: GateConfig) -> Verdict:
    """Judges evaluations, which are in the order of their steps.

    The one before the first step is of no training: it may be beaten, but is neither kept nor promoted.

    Raises:
      UserError: an evaluation has no figure of a name that the settings have.
    """
    best: Evaluation | None = None
    since_best = 0
    passed: list[int] = []
    failed: dict[str, list[float]] = {}
    for evaluation in evaluations:
        value = _figure(evaluation, config.metric, "metric")
        if best is None or value < best[config.metric] - config.min_delta or math.isnan(best[config.metric]):
            best, since_best = evaluation, 0
        else:
            since_best += 1
        failed = {name: [figure, limit] for name, limit in config.at_most.items()
                  if not (figure := _figure(evaluation, name, "at_most")) <= limit}
        if config.max_rise is not None and not value <= best[config.metric] + config.max_rise:
            failed[f"{config.metric} above its best"] = [value - best[config.metric], config.max_rise]
        if not failed and evaluation["step"] > 0:
            passed.append(evaluation["step"])
    stop = None
    if config.patience is not None and since_best >= config.patience and best is not None:
        stop = (f"no better {config.metric} in {since_best} evaluations; the best was {best[config.metric]:.4f} at "
                f"step {best['step']}")
    return Verdict(best if best is not None and best["step"] > 0 else None, stop, failed, tuple(passed))


def _figure(evaluation: Evaluation, name: str, setting: str) -> float:
    value = evaluation.get(name)
    if not isinstance(value, (int, float)):
        known = ", ".join(sorted(k for k, v in evaluation.items() if isinstance(v, (int, float)) and k != "step"))
        raise UserError(f"GateConfig.{setting} names {name!r}, which an evaluation does not have; there are {known}")
    return float(value)


class Gates:
    """One run's evaluations, and what follows from them.

    Attributes:
      evaluations: those so far.
      verdict: on them.
    """

    def __init__(self, config: GateConfig, manifest: Mapping[str, Any] | None = None):
        """Starts with the evaluations that the run's manifest has; None where the run begins."""
        self.config = config
        self.evaluations: list[Evaluation] = list((manifest or {}).get("evaluations", []))
        self.verdict = judge(self.evaluations, config)

    def rewind(self, step: int) -> None:
        """Forgets evaluations after `step`, from where the run goes on."""
        self.evaluations = [evaluation for evaluation in self.evaluations if evaluation["step"] <= step]
        self.verdict = judge(self.evaluations, self.config)

    def has(self, step: int) -> bool:
        """Whether the state after `step` was evaluated."""
        return any(evaluation["step"] == step for evaluation in self.evaluations)

    def add(self, step: int, figures: Mapping[str, float]) -> Verdict:
        """Notes an evaluation and judges."""
        self.evaluations = [e for e in self.evaluations if e["step"] < step] + [{"step": step, **figures}]
        self.verdict = judge(self.evaluations, self.config)
        return self.verdict

    @property
    def held_steps(self) -> set[int]:
        """Steps whose checkpoints are to be kept, however old."""
        held = {self.verdict.best["step"]} if self.config.keep_best and self.verdict.best is not None else set()
        if self.config.is_gate and self.verdict.good_step is not None:
            held.add(self.verdict.good_step)
        return held

    def to_manifest(self) -> dict[str, Any]:
        """Its entries in the run's manifest."""
        v = self.verdict
        found: dict[str, Any] = {"evaluations": self.evaluations, "best": v.best, "stopped_early": v.stop}
        if self.config.is_gate:
            last = self.evaluations[-1]["step"] if self.evaluations else None
            found["gate"] = {"status": "failed" if v.failed else "passed", "step": last, "failed": v.failed,
                             "good_step": v.good_step, "passed_steps": list(v.passed), "at_most": self.config.at_most,
                             "max_rise": self.config.max_rise}
        return found

    def said(self) -> str:
        """What the last evaluation failed, in a line; empty if nothing."""
        if not self.verdict.failed or not self.evaluations[-1]["step"]:  # before the first step nobody expects it
            return ""
        reasons = ", ".join(f"{name} {figure:.4f}, at most {limit:g}"
                            for name, (figure, limit) in self.verdict.failed.items())
        good = self.verdict.good_step
        back = "no checkpoint has passed yet" if good is None else f"step {good} is the last that passed"
        return f"the gate is not passed: {reasons}; {back}"


def is_over(manifest: Mapping[str, Any], config: GateConfig) -> bool:
    """Whether a run ended early, and would end there by `config` too."""
    evaluations = manifest.get("evaluations") or []
    finished = manifest.get("finished_steps", 0)
    return bool(finished and evaluations and evaluations[-1]["step"] == finished and judge(evaluations, config).stop)
