"""Does the run learn? A learning rate too high or too low, gradients that explode.

What a healthy run looks like: within the warm-up and a little more, the loss is below what token frequencies alone
would give (the unigram model); an update moves a matrix by about a thousandth of its size, up to a hundredth for small
models early on (Goh 2017 and many since); the gradient's norm falls and then stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llm_jax.diagnosis.finding import Finding
from llm_jax.diagnosis.record import Record, level, median_ratio, smooth

LEAST_ROWS = 6
LEAST_STEPS = 100
RISE = 0.15  # of the loss learnt so far: from its lowest point on, a loss that rises by more has diverged
DIVERGED = 3.0  # its highest value over that of the untrained model
HIGH_RATIO, LOW_RATIO = 0.03, 2e-4  # update to weight
EXPLODED = 10.0  # the gradient's norm, late over early
SPIKED = 50.0  # its highest value over its median
HUGE = 100.0  # of a loss that is a mean over tokens, it is 0.1 to 10 where a run learns


def learning(record: Record) -> list[Finding]:
    """Not learning: why, if the rows say it."""
    steps, losses = record.series("loss")
    finite = np.isfinite(losses)
    steps, losses = steps[finite], losses[finite]
    start = record.first_loss
    if start is None or losses.size < LEAST_ROWS:
        return []
    has_diverged = losses.max() > DIVERGED * start  # which needs no patience to be seen
    if not (has_diverged or _is_past_warmup(record)):
        return []
    window = max(3, losses.size // 8)
    end = level(losses, window)
    smoothed = smooth(losses, window)
    lowest = int(np.argmin(smoothed[window - 1:])) + window - 1
    low = float(smoothed[lowest])
    ratio = _ratio_at_peak(record)
    said_ratio = [] if ratio is None else [f"at its highest rate, an update moved weights by {ratio:.1e} of their size "
                                           "(the median over the model's parts; 1e-4 to 1e-2 is usual)"]
    rate = record.setting("optimizer", "peak_learning_rate")
    named = f"{rate:g}" if rate else "unknown"
    learnt = max(start - low, 0.0)
    noise = float(np.std(losses - smoothed)) / math.sqrt(window)  # of a mean over the window
    has_risen = end - low > max(RISE * max(learnt, 0.2), 4 * noise)
    is_learning = end < _reference(record, start)
    highest = float(smoothed.max())
    is_wild = highest > 1.25 * start or ratio is not None and ratio > HIGH_RATIO
    if has_diverged or has_risen or not is_learning and is_wild:
        evidence = [f"the loss was {start:.2f} at first, then between {low:.2f} (step {steps[lowest]:.0f}) and "
                    f"{highest:.2f}, and {end:.2f} at the end", *said_ratio]
        return [Finding("rate_too_high", f"The learning rate ({named}) is too high: the loss "
                        + ("rose again after it had fallen." if learnt > 0.2 and has_risen else "does not come down."),
                        tuple(evidence),
                        (f"divide LEARNING_RATE by 3 to 10 (to {_rounded(rate, 1 / 5)})" if rate else
                         "divide the learning rate by 3 to 10",
                         "give it a longer warm-up (OptimizerConfig.warmup_steps)"))]
    if is_learning:
        return []
    unigram = record.unigram_loss
    evidence = [f"the loss went from {start:.2f} to {end:.2f} in {record.last_step} steps"
                + ("" if unigram is None else f"; knowing token frequencies alone would give {unigram:.2f}"),
                *said_ratio]
    if ratio is not None and ratio < LOW_RATIO or _is_still_falling(steps, losses):
        return [Finding("rate_too_low", f"The learning rate ({named}) is too low: the loss falls, but hardly.",
                        tuple(evidence), (f"multiply LEARNING_RATE by 3 to 10 (to {_rounded(rate, 5)})" if rate else
                                          "multiply the learning rate by 3 to 10",
                                          "with a rate that suits the model, the loss is below the unigram model's "
                                          "within some hundred steps"))]
    return [Finding("not_learning", "The loss stays where token frequencies alone would bring it.", tuple(evidence),
                    ("look at the text that is trained on: is it in order, are documents more than a few tokens long?",
                     "try learning rates a factor of 3 apart with experiments.sweep"))]


def gradients(record: Record) -> list[Finding]:
    """Gradients that explode, or a run that was stopped by what is not finite."""
    steps, norms = record.series("grad_norm")
    not_finite = [event for event in record.events if event.get("kind") in ("not_finite", "spike")]
    evidence: list[str] = []
    finite = np.isfinite(norms)
    if np.sum(finite) >= LEAST_ROWS:
        steps, norms = steps[finite], norms[finite]
        after = steps > max(record.setting("optimizer", "warmup_steps", default=0), steps[-1] / 10)
        usual = float(np.median(norms[:max(3, norms.size // 3)]))
        late = float(np.median(norms[-max(3, norms.size // 4):]))
        if late > EXPLODED * usual:
            evidence.append(f"the gradient's norm was {usual:.3g} (median) in the first third of the run and is "
                            f"{late:.3g} in the last quarter")
        elif late > HUGE:
            evidence.append(f"the gradient's norm is {late:.3g} in the last quarter of the run; where a run learns "
                            "it is 0.1 to 10")
        elif np.any(after) and norms[after].max() > SPIKED * float(np.median(norms)):
            at = int(np.argmax(np.where(after, norms, -np.inf)))
            evidence.append(f"the gradient's norm was {norms[at]:.3g} at step {steps[at]:.0f}; its median is "
                            f"{np.median(norms):.3g}")
    if not_finite:
        event = not_finite[0]
        evidence.append(f"{len(not_finite)} steps were not applied, the first at step {event.get('step')}: loss "
                        f"{event.get('loss')}, gradient norm {event.get('grad_norm')}")
    if not evidence:
        return []
    if worst := _worst_part(record):
        evidence.append(worst)
    clip = record.setting("optimizer", "clip_norm")
    advice = ["lower LEARNING_RATE, or lengthen the warm-up"]
    advice.insert(0, "clip gradients: OptimizerConfig.clip_norm = 1.0" if not clip else
                  f"clip them harder than OptimizerConfig.clip_norm = {clip:g}")
    if not_finite:
        advice.append("RecoveryConfig.on_bad = 'skip' or 'rollback' passes over such batches; logs/events.jsonl "
                      "names their documents")
    return [Finding("exploding_gradients", "The gradients explode.", tuple(evidence), tuple(advice))]


def _is_past_warmup(record: Record) -> bool:
    warmup = record.setting("optimizer", "warmup_steps", default=0)
    enough = record.last_step >= max(1.5 * warmup, LEAST_STEPS)
    return enough and (record.is_finished or record.last_step >= record.num_steps / 10)


def _reference(record: Record, start: float) -> float:
    """The loss below which a model has learnt more than how often each token occurs."""
    unigram = record.unigram_loss
    return 0.98 * unigram if unigram is not None and unigram < start else start - 0.2 * abs(start)


def _ratio_at_peak(record: Record) -> float | None:
    """The median update-to-weight ratio where the learning rate was at least half of its highest."""
    rows = [(row.get("learning_rate", math.nan), median_ratio(row)) for row in record.train]
    known = [(rate, ratio) for rate, ratio in rows if ratio is not None and math.isfinite(rate)]
    if not known:
        return None
    peak = max(rate for rate, _ in known)
    return float(np.median([ratio for rate, ratio in known if rate >= peak / 2]))


def _is_still_falling(steps: np.ndarray, losses: np.ndarray) -> bool:
    """Whether the second half goes on falling, by more than its noise."""
    half = losses.size // 2
    slope, offset = np.polyfit(steps[half:], losses[half:], 1)
    noise = float(np.std(losses[half:] - (slope * steps[half:] + offset)))
    return -slope * (steps[-1] - steps[half]) > 2 * noise


def _worst_part(record: Record) -> str:
    """Where the gradient was largest when its norm was highest."""
    row = max(record.train, key=lambda row: row["grad_norm"] if math.isfinite(row["grad_norm"]) else 0.0, default={})
    parts: list[tuple[float, str]] = []
    for name, value in row.get("gradient_norm", {}).items():
        values: Sequence[float] = value if isinstance(value, list) else [value]
        parts += [(v, f"{name} of layer {i}" if isinstance(value, list) else name) for i, v in enumerate(values)
                  if isinstance(v, (int, float)) and math.isfinite(v)]
    if not parts:
        return ""
    norm, name = max(parts)
    return f"it was largest in {name} ({norm:.3g} at step {row['step']})"


def _rounded(rate: float, factor: float) -> str:
    return f"{rate * factor:.1g}"
