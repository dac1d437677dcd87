"""Does the run learn the text, or learn it by heart? Overfitting, and data that repeat themselves."""

from __future__ import annotations

import math

import numpy as np

from llm_jax.diagnosis.finding import Finding
from llm_jax.diagnosis.record import Record

LEAST_EVALUATIONS = 3
RISE = 0.02  # of the best validation loss: it has risen for good
GAP = 0.05  # of the validation loss: training text is known better than other text
GAP_WHEN_NEW = 0.15  # the same, before the first epoch is over
MANY_EPOCHS = 4.0  # up to about so many, repeated text is nearly as good as new (Muennighoff et al. 2023)
KNOWN_BY_HEART = 0.25  # bits per byte: large models, on code, come no lower


def memorising(record: Record) -> list[Finding]:
    """Overfitting and repeated data; the first where validation gets worse, the second where it may still not."""
    return [*_overfitting(record), *_repetition(record)]


def _train_level(record: Record, step: float) -> float:
    """The mean training loss about `step`."""
    steps, losses = record.series("loss")
    if not steps.size:
        return math.nan
    width = max(steps[-1] / 10, 1.0)
    near = np.abs(steps - step) <= width / 2
    if np.sum(near) < 3:
        near = np.isin(np.arange(steps.size), np.argsort(np.abs(steps - step))[:3])
    return float(np.mean(losses[near]))


def _evaluations(record: Record) -> tuple[np.ndarray, np.ndarray]:
    steps, losses = record.series("loss", record.validation)
    trained = (steps > 0) & np.isfinite(losses)
    return steps[trained], losses[trained]


def _overfitting(record: Record) -> list[Finding]:
    steps, losses = _evaluations(record)
    if steps.size < LEAST_EVALUATIONS or not record.train:
        return []
    best = int(np.argmin(losses))
    last_train, best_train = _train_level(record, steps[-1]), _train_level(record, steps[best])
    has_risen = losses[-1] > losses[best] * (1 + RISE)
    gap = losses[-1] - last_train
    if not has_risen or last_train > best_train * (1 - RISE / 2) or gap < GAP * losses[-1]:
        return []
    evidence = [f"validation loss was best at step {steps[best]:.0f} ({losses[best]:.3f}) and is {losses[-1]:.3f} at "
                f"step {steps[-1]:.0f}",
                f"training loss went on falling in between, from {best_train:.3f} to {last_train:.3f}; the gap is "
                f"{gap:.3f} nats per token"]
    advice = [f"stop about step {steps[best]:.0f}: GateConfig.patience = 3 ends such a run by itself, and "
              "GateConfig.keep_best keeps its best checkpoint"]
    if record.epochs is not None:
        evidence.append(f"the training text was seen {record.epochs:.1f} times")
        if record.epochs > 1:
            advice.append("train on more text, or for fewer epochs")
    advice.append("a smaller model, or more weight decay (OptimizerConfig.weight_decay)")
    return [Finding("overfitting", "The run overfits: it gets better on its training text and worse on other text.",
                    tuple(evidence), tuple(advice))]


def _repetition(record: Record) -> list[Finding]:
    steps, losses = _evaluations(record)
    if not steps.size or not record.train:
        return []
    evidence: list[str] = []
    bits = [row["bits_per_byte"] for row in record.validation if isinstance(row.get("bits_per_byte"), (int, float))]
    if bits and min(bits) < KNOWN_BY_HEART:
        evidence.append(f"{min(bits):.3f} bits per byte on validation: text that was never seen can't be predicted so "
                        "well, so much of it is in the training text too, or it repeats itself")
    per_epoch = record.manifest.get("steps_per_epoch")
    if per_epoch:
        new = steps <= per_epoch
        if np.any(new):
            step, loss = steps[new][-1], losses[new][-1]
            train = _train_level(record, step)
            if loss - train > GAP_WHEN_NEW * loss and step > record.setting("optimizer", "warmup_steps", default=0):
                evidence.append(f"at step {step:.0f}, in the first epoch, training loss is {train:.3f} and validation "
                                f"loss {loss:.3f}: text that is read for the first time is known so much better "
                                "only if it is like what was read before")
        gap = losses[-1] - _train_level(record, steps[-1])
        if record.epochs is not None and record.epochs > MANY_EPOCHS and gap > GAP * losses[-1]:
            evidence.append(f"the training text was seen {record.epochs:.1f} times ({per_epoch} steps an epoch), and "
                            f"training loss is {gap:.3f} below validation loss")
    if not evidence:
        return []
    return [Finding("data_repeated", "The data repeat themselves: the run learns them by heart.", tuple(evidence),
                    ("train on more text, or for fewer steps; up to about 4 epochs of a text are nearly as good as new "
                     "text",
                     "look for documents that are nearly the same (exact copies are removed by experiments.prepare)"))]
