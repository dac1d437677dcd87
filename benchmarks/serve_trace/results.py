"""What a replay gave: throughput and latencies; the table and the line of JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)
ENGINE, STATIC, CONTINUOUS = "engine", "static_batching", "hf_continuous_batching"


@dataclasses.dataclass(frozen=True)
class Served:
    """One request, seconds since the replay began: due, first token, last token; and the tokens that were asked for.

    Attributes:
      first: None where the contender does not say.
    """

    at: float
    first: float | None
    last: float
    output: int


def throughput(served: Sequence[Served]) -> float:
    """Requested output tokens a second, from the first arrival to the last token."""
    return sum(s.output for s in served) / (max(s.last for s in served) - min(s.at for s in served))


def latencies(served: Sequence[Served]) -> dict[str, list[float]]:
    """Samples in seconds: "ttft" (arrival to first token), "tpot" (time per token after the first), "e2e" (arrival to
    last token). What a contender does not say is left out."""
    found = {"ttft": [s.first - s.at for s in served if s.first is not None],
             "tpot": [(s.last - s.first) / (s.output - 1) for s in served if s.first is not None and s.output > 1],
             "e2e": [s.last - s.at for s in served]}
    return {name: values for name, values in found.items() if values}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """{"p50": …, "p90": …, "p99": …}."""
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def summary(rounds: Sequence[Sequence[Served]]) -> dict[str, Any]:
    """Medians over rounds: "tokens_per_second", its "spread" ((most − least) / median), latency percentiles."""
    rates = [throughput(served) for served in rounds]
    median = statistics.median(rates)
    made: dict[str, Any] = {"tokens_per_second": median, "spread": (max(rates) - min(rates)) / median}
    by_round = [latencies(served) for served in rounds]
    for name in by_round[0]:
        each = [percentiles(found[name]) for found in by_round]
        made[name] = {p: statistics.median(e[p] for e in each) for p in each[0]}
    return made


def share_of_bound(ratio: float, bound: float) -> float | None:
    """How much of the gain that is possible was had: (ratio − 1) / (bound − 1); None where nothing can be gained."""
    return (ratio - 1) / (bound - 1) if bound > 1 else None


def line(rates: Mapping[str, Mapping[str, float]], bounds: Mapping[str, float]) -> dict[str, Any]:
    """The object that is printed last.

    Args:
      rates: tokens/s by model ("9m", "88m") and contender; those of `generate` begin with "hf_generate_".
      bounds: by model, most times the throughput of static batching that is possible.
    Returns:
      for the model 9m without, for others with their name as suffix: `tokens_per_second` (by contender),
      `ratio_to_hf_continuous_batching`, `ratio_to_hf_generate`, `static_bound`, `share_of_static_bound`. What was not
      measured is left out.
    """
    made: dict[str, Any] = {}
    for model, found in rates.items():
        suffix = "" if model == "9m" else f"_{model}"
        values: dict[str, Any] = {"tokens_per_second": {name: round(rate, 1) for name, rate in found.items()}}
        ours = found.get(ENGINE)
        generate = [rate for name, rate in found.items() if name.startswith("hf_generate_")]
        if ours and CONTINUOUS in found:
            values["ratio_to_hf_continuous_batching"] = round(ours / found[CONTINUOUS], 3)
        if ours and generate:
            values["ratio_to_hf_generate"] = round(ours / max(generate), 3)
        if ours and STATIC in found and model in bounds:
            share = share_of_bound(ours / found[STATIC], bounds[model])
            values["static_bound"] = round(bounds[model], 3)
            values["share_of_static_bound"] = None if share is None else round(share, 3)
        made |= {name + suffix: value for name, value in values.items()}
    return made


def table(summaries: Mapping[str, Mapping[str, Any]], kept: Mapping[str, tuple[int, int]]) -> str:
    """A row a contender: throughput, rounds kept and discarded, milliseconds of latency (p50/p90/p99)."""
    rows = [("contender", "tokens/s", "spread", "engine ×", "rounds", "first token ms", "per token ms",
             "end to end ms")]
    ours = summaries.get(ENGINE, {}).get("tokens_per_second")
    for name, found in summaries.items():
        good, discarded = kept[name]
        times = ["/".join(f"{found[key][f'p{p}'] * 1000:,.{digits}f}" for p in PERCENTILES) if key in found else "-"
                 for key, digits in (("ttft", 0), ("tpot", 1), ("e2e", 0))]
        rate = found["tokens_per_second"]
        rows.append((name, f"{rate:,.1f}", f"{found['spread']:.0%}", f"{ours / rate:.2f}" if ours else "-",
                     f"{good}" + (f" (-{discarded})" if discarded else ""), *times))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows)
