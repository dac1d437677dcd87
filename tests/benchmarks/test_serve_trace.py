"""The pure parts of the replay: scaling, fits, percentiles, discarded rounds, bounds, the line of JSON."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from benchmarks.serve_trace import bound, noise, results, trace
from benchmarks.serve_trace.noise import Snapshot
from benchmarks.serve_trace.results import Served
from benchmarks.serve_trace.static import StaticScheduler
from benchmarks.serve_trace.trace import Arrival
from llm_jax.inference.batch import StepShape
from llm_jax.inference.pages import PagePool
from llm_jax.inference.scheduler import Scheduler


def test_reading_a_trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n"
                    "2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.6805900,374,44\n")
    first, second = trace.read(path)
    assert first == Arrival(0.0, 374, 44)
    assert (second.prompt, second.output) == (396, 109) and second.at == pytest.approx(4.314579, abs=1e-6)
    path.write_text("TIMESTAMP,ContextTokens\n1,2\n")
    with pytest.raises(SystemExit, match="GeneratedTokens"):
        trace.read(path)


def test_a_synthetic_trace_has_the_law_it_was_drawn_from():
    law = trace.AZURE_CONVERSATION
    found = trace.fit(trace.synthetic(law, 20_000))
    assert found.prompt_median == pytest.approx(law.prompt_median, rel=0.03)
    assert found.output_median == pytest.approx(law.output_median, rel=0.03)
    assert found.prompt_sigma == pytest.approx(law.prompt_sigma, abs=0.03)
    assert found.output_sigma == pytest.approx(law.output_sigma, abs=0.03)
    assert found.rate == pytest.approx(law.rate, rel=0.03)
    assert found.longest_prompt <= law.longest_prompt and found.longest_output <= law.longest_output


def test_scaling_keeps_order_and_fits_the_context():
    arrivals = [Arrival(0, 80, 16), Arrival(1, 1, 1), Arrival(2, 14050, 1000), Arrival(3, 100, 9000)]
    assert trace.scaled(arrivals, 1 / 8, 1024) == [Arrival(0, 10, 2), Arrival(1, 1, 1), Arrival(2, 899, 125),
                                                   Arrival(3, 12, 512)]
    assert [a.at for a in trace.thinned(arrivals, 2)] == [0, 2]
    with pytest.raises(SystemExit, match="4 requests"):
        trace.thinned(arrivals, 5)


def test_arrivals_are_stretched_to_the_load():
    arrivals = [Arrival(10, 1, 30), Arrival(11, 1, 30), Arrival(14, 1, 60)]
    assert [a.at for a in trace.timed(arrivals, 60.0)] == pytest.approx([0, 0.5, 2])  # 120 tokens in 2 seconds
    assert [a.at for a in trace.timed(arrivals, math.inf)] == [0, 0, 0]
    one, other = (trace.requests(arrivals, 100, seed)[2] for seed in (0, 1))
    assert len(one.tokens) == 1 and one.output == 60
    assert trace.requests([Arrival(0, 50, 1)], 100, 0) != trace.requests([Arrival(0, 50, 1)], 100, 1)
    assert other.output == 60


def test_throughput_and_latencies():
    served = [Served(1.0, 1.5, 3.5, 5), Served(2.0, 2.25, 2.25, 1), Served(2.0, None, 6.0, 14)]
    assert results.throughput(served) == pytest.approx(20 / 5)
    assert results.latencies(served) == {"ttft": [0.5, 0.25], "tpot": [0.5], "e2e": [2.5, 0.25, 4.0]}
    assert results.percentiles(range(101)) == {"p50": 50, "p90": 90, "p99": 99}
    rounds = [[Served(0, 1.0, t, 10)] for t in (2.0, 5.0, 4.0)]
    found = results.summary(rounds)
    assert found["tokens_per_second"] == 2.5 and found["spread"] == pytest.approx(3 / 2.5)
    assert found["e2e"]["p50"] == 4.0 and found["tpot"]["p99"] == pytest.approx(3 / 9)


def test_the_line_of_json():
    rates = {"9m": {"engine": 400.0, "static_batching": 300.0, "hf_generate_1": 50.0, "hf_generate_8": 160.0,
                    "hf_continuous_batching": 80.0}, "88m": {"engine": 30.0, "hf_generate_8": 20.0}}
    made = json.loads(json.dumps(results.line(rates, {"9m": 1.5})))
    assert made == {"tokens_per_second": rates["9m"], "ratio_to_hf_continuous_batching": 5.0,
                    "ratio_to_hf_generate": 2.5, "static_bound": 1.5, "share_of_static_bound": 0.667,
                    "tokens_per_second_88m": rates["88m"], "ratio_to_hf_generate_88m": 1.5}
    assert results.share_of_bound(1.0, 1.0) is None
    summaries = {name: results.summary([[Served(0, None, 10 / rate, 10)]]) for name, rate in rates["9m"].items()}
    table = results.table(summaries, {name: (2, 1) for name in summaries})
    assert "5.00" in table.splitlines()[-1] and "2 (-1)" in table and len(set(map(len, table.splitlines()))) == 1


def test_the_share_of_others():
    before, after = Snapshot(0.0, 100.0, 30.0), Snapshot(10.0, 118.0, 45.0)
    assert noise.others_share(before, after, 2) == pytest.approx((18 - 15) / 20)
    assert noise.others_share(before, Snapshot(10.0, 100.0, 31.0), 2) == 0.0
    now = noise.snapshot(noise.own_cpus())
    assert now.own > 0 and now.clock > 0


def test_noisy_runs_are_repeated_and_do_not_count(monkeypatch):
    monkeypatch.setattr(noise, "own_cpus", lambda: frozenset({0}))
    shares = iter([0.5, 0.05, 0.0, 0.3, 0.2, 0.4, 0.0, 0.9, 0.6, 0.7])  # a, a again, b; then a three times, b
    state, calls, said = {"clock": 0.0, "busy": 0.0}, [], []

    def run(name):
        def measure(number, attempt):
            calls.append((name, number, attempt))
            state["clock"] += 1.0
            state["busy"] += next(shares)
            return name, number
        return measure

    kept = noise.interleaved({"a": run("a"), "b": run("b")}, rounds=2, most_others=0.1, repeats=2, seconds=100,
                             say=said.append, watch=lambda: Snapshot(state["clock"], state["busy"], 0.0),
                             clock=lambda: state["clock"])
    assert calls == [("a", 0, 0), ("a", 0, 1), ("b", 0, 0), ("a", 1, 0), ("a", 1, 1), ("a", 1, 2), ("b", 1, 0)]
    assert [m.result for m in kept["a"].good] == [("a", 0)] and len(kept["a"].discarded) == 4
    assert len(kept["b"].good) == 2 and not kept["b"].noisy
    assert sum("discarded" in line for line in said) == 4


def test_rounds_stop_in_time_and_the_quietest_counts_if_none_is_quiet(monkeypatch):
    monkeypatch.setattr(noise, "own_cpus", lambda: frozenset({0}))
    shares, state = itertools.cycle([0.9, 0.6, 0.7]), {"clock": 0.0, "busy": 0.0}

    def run(number, attempt):
        state["clock"] += 10.0
        state["busy"] += 10 * next(shares)
        return number

    kept = noise.interleaved({"a": run}, rounds=5, most_others=0.1, repeats=2, seconds=55, say=lambda line: None,
                             watch=lambda: Snapshot(state["clock"], state["busy"], 0.0),
                             clock=lambda: state["clock"])["a"]
    assert state["clock"] == 30  # a second round would end after 60
    assert kept.noisy and len(kept.good) == 1 and kept.good[0].others == pytest.approx(0.6)


COSTS = {StepShape(0, 2): 1.0, StepShape(1, 2): 3.0}


def scheduler(kind):
    return kind(PagePool(64, 4), max_rows=2, prefill_rows=1, chunk=4, max_context=64, max_queue=100)


def test_the_least_time_by_hand():
    # 3 chunks of prompts, 3 steps of 3 s, in which 6 of the 2 + 0 + 5 = 7 further tokens find a row: half a step more.
    assert bound.least_seconds([(4, 3), (3, 1), (2, 6)], COSTS, 4) == pytest.approx(9.5)
    # One request alone: its steps follow one another.
    assert bound.least_seconds([(4, 30)], COSTS, 4) == pytest.approx(30)
    assert bound.bound_by_steps([(1, 1), (1, 9), (1, 5), (1, 5)], 2) == pytest.approx(14 / 10)


def test_static_batching_waits_for_the_longest_and_continuous_does_not():
    lengths = [(4, 9), (4, 1), (4, 9), (4, 1)]
    # In either half: prompts of both (two steps, in the second of which the first decodes), 7 decodes of the longer.
    assert bound.played_seconds(scheduler(StaticScheduler), lengths, COSTS) == pytest.approx(2 * (3 + 3 + 7))
    continuous = bound.played_seconds(scheduler(Scheduler), lengths, COSTS)
    assert continuous < 26
    rng = np.random.default_rng(0)
    drawn = [(int(p), int(o)) for p, o in rng.integers(1, 20, (40, 2))]
    static, continuous = (bound.played_seconds(scheduler(kind), drawn, COSTS) for kind in (StaticScheduler, Scheduler))
    assert bound.least_seconds(drawn, COSTS, 4) <= continuous <= static
