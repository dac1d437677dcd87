"""What the host does in a decoding step, beside what the device does, and what sending steps ahead saves.

    python -m benchmarks.host_cost
    python -m benchmarks.host_cost --rows=32 --profile      # and where the host's time goes, at the most rows

The engine is driven without the service, as it drives it. "in order": a step is read before the next is planned;
`plan` (scheduling and arrays), `dispatch`, `device` (waiting) and `collect` (reading, bookkeeping) make up its time.
"ahead": the next is planned and sent while the device computes, as the service does. The modes take turns. Last, the
whole service: its engine thread's CPU time for each step is Python's, detokenising and telling listeners included, and
what XLA computes in the thread that calls it.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import threading
import time

import jax
import numpy as np

from benchmarks.request_cost import make_service
from benchmarks.serve_trace.weights import MODELS
from llm_jax import compile_cache
from llm_jax.inference.engine import Engine
from llm_jax.inference.request import Delta, SamplingParams
from llm_jax.inference.scheduler import Plan, Sequence
from llm_jax.inference.service import Service
from llm_jax.inference.steps import RunningStep

PARTS = ("plan", "dispatch", "device", "collect")


def decode(engine: Engine, rows: int, length: int, steps: int, ahead: bool) -> dict[str, float]:
    """Milliseconds of a decoding step of `rows` sequences: `step`, and in order also `PARTS`."""
    scheduler = engine.make_scheduler(max_queue=rows)
    rng = np.random.default_rng(0)
    for i in range(rows):
        scheduler.add(Sequence(i, rng.integers(0, engine.config.vocab_size, length).tolist(), length, steps))
    spent, count, began = dict.fromkeys(PARTS, 0.0), 0, 0.0
    flight: tuple[Plan, RunningStep] | None = None
    while True:
        at = [time.perf_counter()]
        plan = scheduler.schedule()
        if plan is None and flight is None:
            break
        following = None
        if plan is not None:
            step = engine.prepare(plan, {})
            scheduler.dispatched(plan)
            at.append(time.perf_counter())
            following = plan, engine.dispatch(step)
            at.append(time.perf_counter())
            if not plan.prefill and len(plan.decode) == rows:
                began = began or at[0]
                count += 1
        if not ahead:
            flight, following = following, None
        if flight is not None:
            if not ahead:
                jax.block_until_ready(flight[1].tokens)
                at.append(time.perf_counter())
            drawn = engine.collect(flight[1]).drawn
            scheduler.resolve(flight[0], {i: list(d.tokens) for i, d in drawn.items()})
            at.append(time.perf_counter())
        if not ahead and began:
            for name, seconds in zip(PARTS, np.diff(at), strict=True):
                spent[name] += 1e3 * seconds / (steps - 1)
        flight = following
    whole = {"step": 1e3 * (time.perf_counter() - began) / count}
    return whole if ahead else whole | spent


def serve(service: Service, rows: int, length: int, steps: int) -> dict[str, float]:
    """Milliseconds of a decoding step through the service, and of them its engine thread's own CPU time."""
    finished = threading.Semaphore(0)
    times: list[tuple[float, float]] = []

    def listen(delta: Delta) -> None:
        times.append((time.perf_counter(), time.thread_time()))
        if delta.finish_reason is not None:
            finished.release()

    rng = np.random.default_rng(0)
    for _ in range(rows):
        service.submit(rng.integers(3, service.engine.config.vocab_size, length).tolist(),
                       SamplingParams(max_tokens=steps, ignore_eos=True), listen)
    for _ in range(rows):
        finished.acquire()
    # The last deltas come together, a row each, and so do those of every step in which all rows drew.
    first, last = times[-rows * (steps // 2) - 1], times[-1]
    return {"step": 1e3 * (last[0] - first[0]) / (steps // 2), "thread_cpu": 1e3 * (last[1] - first[1]) / (steps // 2)}


def profiled(engine: Engine, rows: int, length: int, steps: int) -> None:
    """Prints where Python's time goes while steps are sent ahead."""
    profile = cProfile.Profile()
    profile.enable()
    decode(engine, rows, length, steps, ahead=True)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def main() -> int:
    """Measures and prints a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="9m")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    compile_cache.enable_compile_cache()
    service = make_service(args.model, args.length + args.steps)
    engine, cases = service.engine, [int(rows) for rows in args.rows.split(",")]
    found: dict[tuple[int, str], list[dict[str, float]]] = {
        (rows, mode): [] for rows in cases for mode in ("ahead", "in order", "service")}
    for number in range(args.rounds + 1):
        for rows, mode in list(found)[::1 if number % 2 else -1]:
            result = serve(service, rows, args.length, args.steps) if mode == "service" else decode(
                engine, rows, args.length, args.steps, mode == "ahead")
            if number:  # the first one warms up
                found[rows, mode].append(result)
    table = {}
    print(f"{args.model}, jax {jax.__version__}, {jax.devices()[0].device_kind}; milliseconds a step, medians of "
          f"{args.rounds} rounds")
    print(f"{'rows':>4} {'plan':>7}{'dispatch':>9}{'device':>8}{'collect':>8}{'in order':>9}{'ahead':>7}"
          f"{'service':>8}{'its thread':>11}{'share':>7}")
    for rows in cases:
        def median(mode: str, name: str, rows: int = rows) -> float:
            return statistics.median(r[name] for r in found[rows, mode])

        line = {name: median("in order", name) for name in PARTS} | {
            "in_order": median("in order", "step"), "ahead": median("ahead", "step"),
            "service": median("service", "step"), "thread_cpu": median("service", "thread_cpu")}
        line["host_share"] = (line["plan"] + line["dispatch"] + line["collect"]) / line["in_order"]
        line["in_order_over_ahead"] = statistics.median(
            a["step"] / b["step"] for a, b in zip(found[rows, "in order"], found[rows, "ahead"], strict=True))
        table[rows] = {name: round(value, 4) for name, value in line.items()}
        print(f"{rows:4d} {line['plan']:7.3f}{line['dispatch']:9.3f}{line['device']:8.3f}{line['collect']:8.3f}"
              f"{line['in_order']:9.3f}{line['ahead']:7.3f}{line['service']:8.3f}{line['thread_cpu']:11.3f}"
              f"{line['host_share']:7.1%}")
    if args.profile:
        profiled(engine, max(cases), args.length, args.steps)
    service.close()
    print(json.dumps({"model": args.model, "milliseconds_by_rows": table}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
