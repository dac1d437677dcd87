"""Requests to replay: from a recorded trace, or from a synthetic one fitted to it; lengths and arrivals scaled.

A trace file is CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens, as in the Azure LLM inference traces
(Patel et al. 2024, arXiv:2311.18677). The synthetic trace has the first moments of their conversation trace of 2023
(19,366 requests in 58 minutes): log-normal lengths and Poisson arrivals (the gaps' standard deviation is 1.09 times
their mean there; 1 would be Poisson; the two lengths' logarithms correlate by 0.09).
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import math
import os
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A line of a trace: seconds since its first line, tokens of the prompt, tokens generated."""

    at: float
    prompt: int
    output: int


@dataclasses.dataclass(frozen=True)
class Request:
    """What a contender is asked: at `at` seconds, continue `tokens` by exactly `output` tokens."""

    at: float
    tokens: list[int]
    output: int


@dataclasses.dataclass(frozen=True)
class Fit:
    """A trace in six numbers.

    Attributes:
      prompt_median, prompt_sigma: exp of the mean, and the standard deviation, of the logarithm of prompt lengths.
      output_median, output_sigma: the same of output lengths.
      longest_prompt, longest_output: tokens.
      rate: requests a second.
    """

    prompt_median: float
    prompt_sigma: float
    output_median: float
    output_sigma: float
    longest_prompt: int
    longest_output: int
    rate: float


# `fit(read(...))` of AzureLLMInferenceTrace_conv.csv.
AZURE_CONVERSATION = Fit(prompt_median=760.0, prompt_sigma=0.985, output_median=151.3, output_sigma=0.859,
                         longest_prompt=14050, longest_output=1000, rate=5.53)
# What most of that service's requests had to fit: 99 % of its prompts are shorter than 4,143 tokens.
TRACE_CONTEXT = 4096


def read(path: str | os.PathLike) -> list[Arrival]:
    """The lines of a trace file, by time.

    Raises:
      SystemExit: it lacks a column.
    """
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    try:
        rows = sorted((_seconds(line["TIMESTAMP"]), int(line["ContextTokens"]), int(line["GeneratedTokens"]))
                      for line in lines)
    except KeyError as error:
        raise SystemExit(f"{path} has no column {error}; a trace has TIMESTAMP, ContextTokens and GeneratedTokens"
                         ) from None
    return [Arrival(at - rows[0][0], prompt, output) for at, prompt, output in rows]


def _seconds(timestamp: str) -> float:
    try:
        return float(timestamp)
    except ValueError:  # seven digits of a second: one more than Python reads
        whole, _, fraction = timestamp.partition(".")
        moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
        return moment.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)


def fit(arrivals: Sequence[Arrival]) -> Fit:
    """The log-normal laws and the rate of a trace (maximum likelihood)."""
    prompt = np.log([max(a.prompt, 1) for a in arrivals])
    output = np.log([max(a.output, 1) for a in arrivals])
    return Fit(math.exp(prompt.mean()), float(prompt.std()), math.exp(output.mean()), float(output.std()),
               max(a.prompt for a in arrivals), max(a.output for a in arrivals),
               (len(arrivals) - 1) / (arrivals[-1].at - arrivals[0].at))


def synthetic(law: Fit, count: int, seed: int = 0) -> list[Arrival]:
    """`count` requests drawn from a fit, none longer than its longest."""
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1 / law.rate, count))
    prompt = law.prompt_median * np.exp(law.prompt_sigma * rng.standard_normal(count))
    output = law.output_median * np.exp(law.output_sigma * rng.standard_normal(count))
    return [Arrival(float(t - at[0]), int(np.clip(round(p), 1, law.longest_prompt)),
                    int(np.clip(round(o), 1, law.longest_output))) for t, p, o in zip(at, prompt, output, strict=True)]


def thinned(arrivals: Sequence[Arrival], count: int) -> list[Arrival]:
    """`count` of the requests, evenly spaced over the whole trace: its first minute alone has other lengths."""
    if count > len(arrivals):
        raise SystemExit(f"the trace has {len(arrivals)} requests, and {count} were asked for")
    return [arrivals[i * len(arrivals) // count] for i in range(count)]


def scaled(arrivals: Sequence[Arrival], scale: float, max_context: int) -> list[Arrival]:
    """Prompts and outputs times the same `scale`, at least one token each, prompt and output within `max_context`.

    What is too long loses the beginning of its prompt, as the service that the trace comes from will have done.
    """
    made = []
    for a in arrivals:
        output = min(max(round(a.output * scale), 1), max_context // 2)
        made.append(Arrival(a.at, min(max(round(a.prompt * scale), 1), max_context - output), output))
    return made


def timed(arrivals: Sequence[Arrival], tokens_per_second: float) -> list[Arrival]:
    """Arrivals at the same rhythm, faster or slower, such that so many output tokens are asked for in a second.

    Infinite tokens per second: all at once, so that a server's queue is never empty.
    """
    if math.isinf(tokens_per_second):
        return [dataclasses.replace(a, at=0.0) for a in arrivals]
    first, last = arrivals[0].at, arrivals[-1].at
    span = sum(a.output for a in arrivals) / tokens_per_second
    factor = span / (last - first) if last > first else 0.0
    return [dataclasses.replace(a, at=(a.at - first) * factor) for a in arrivals]


def requests(arrivals: Sequence[Arrival], vocab_size: int, seed: int) -> list[Request]:
    """Prompts of random tokens, others for every seed: nothing to find in a prefix cache, within a round or between."""
    rng = np.random.default_rng(seed)
    return [Request(a.at, rng.integers(3, vocab_size, a.prompt).tolist(), a.output) for a in arrivals]
