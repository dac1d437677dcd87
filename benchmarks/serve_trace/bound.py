"""How much faster than static batching any schedule of the same requests could be, by what the engine's steps cost.

In static batching a row stands empty from its request's end to that of the batch's longest. How much time this wastes
depends on what a step with empty rows costs, and on the prompts, which cost the same in any schedule. So the time of
each compiled shape of step is measured; static batching is played through by the scheduler itself; and the least time
is a linear program: how many steps of each shape have rows enough for all output tokens and all chunks of prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linprog

from benchmarks.serve_trace.static import StaticScheduler
from benchmarks.serve_trace.workers import answer
from llm_jax.inference.batch import StepShape, choose_shape
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.pages import PagePool
from llm_jax.inference.scheduler import Chunk, Plan, Scheduler
from llm_jax.inference.scheduler import Sequence as Running

Lengths = Sequence[tuple[int, int]]  # (prompt, output) in tokens
Costs = Mapping[StepShape, float]  # seconds


def least_seconds(lengths: Lengths, costs: Costs, chunk: int) -> float:
    """Least time in which steps of these costs can serve the requests, in whatever order.

    Args:
      lengths: the requests. The last chunk of a prompt draws the first output token.
      costs: of each shape of step, however full.
      chunk: prompt tokens of one row in one step.
    """
    shapes = list(costs)
    tokens, chunks = sum(o - 1 for _, o in lengths), sum(-(-p // chunk) for p, _ in lengths)
    solved = linprog([costs[s] for s in shapes], b_ub=[-tokens, -chunks],
                     A_ub=[[-s.decode_rows for s in shapes], [-s.prefill_rows for s in shapes]])
    # One request's steps follow one another.
    cheapest = min(costs.values())
    return max(float(solved.fun), max(-(-p // chunk) + o - 1 for p, o in lengths) * cheapest)


def played_seconds(scheduler: Scheduler, lengths: Lengths, costs: Costs) -> float:
    """Time that steps of these costs take, all requests there from the start, as the scheduler plans them."""
    for i, (prompt, output) in enumerate(lengths):
        # Tokens that no other prompt has, so that no prefix is shared.
        scheduler.add(Running(i, [i * scheduler.max_context + k for k in range(prompt)], prompt, output))
    seconds = 0.0
    while plan := scheduler.schedule():
        seconds += costs[choose_shape(plan, costs)]
        scheduler.dispatched(plan)
        scheduler.resolve(plan, {c.sequence.id: [0] for c in plan if c.samples})
        for c in plan:
            if c.sequence.num_generated >= c.sequence.max_tokens:
                scheduler.remove(c.sequence)
    return seconds


def bound_by_steps(lengths: Lengths, slots: int) -> float:
    """The same if every step cost the same and prompts nothing: Σ over batches of their longest output, against
    full rows."""
    outputs = [o for _, o in lengths]
    static = sum(max(outputs[i:i + slots]) for i in range(0, len(outputs), slots))
    return static / max(math.ceil(sum(outputs) / slots), *outputs)


def measured_costs(engine: Engine, context: int, repeats: int = 7) -> dict[StepShape, float]:
    """Median seconds of each compiled shape, all rows full, at `context` live tokens a row.

    Several steps are sent before the first is read, as the service does: what counts is the device's time.
    """
    g = engine.geometry
    rng = np.random.default_rng(0)
    prepared = {}
    for shape in engine.shapes:
        pool, rows = PagePool(g.num_pages, g.page_size), []
        for i in range(shape.decode_rows + shape.prefill_rows):
            tokens = rng.integers(3, engine.config.vocab_size, context + 1).tolist()
            rows.append(Running(i, tokens, context, 8, computed=context, slot=i % engine.options.max_rows,
                                pages=list(pool.take(pool.pages_for(context + 1)))))
        decode = tuple(Chunk(r, context, 1) for r in rows[:shape.decode_rows])
        count = min(engine.options.chunk, context)
        prefill = tuple(Chunk(r, (context - count) // 2, count) for r in rows[shape.decode_rows:])
        prepared[shape] = engine.prepare(Plan(decode, prefill), {})
    times: dict[StepShape, list[float]] = {shape: [] for shape in prepared}
    for _ in range(repeats):
        for shape, step in prepared.items():
            began = time.perf_counter()
            for running in [engine.dispatch(step) for _ in range(3)]:
                engine.collect(running)
            times[shape].append((time.perf_counter() - began) / 3)
    return {shape: statistics.median(t) for shape, t in times.items()}


def bound(engine: Engine, lengths: Lengths) -> dict[str, Any]:
    """Everything above for one engine and one trace, in seconds: what the parent process prints."""
    live = sum((p + o / 2) * o for p, o in lengths) / sum(o for _, o in lengths)
    costs = measured_costs(engine, min(round(live), engine.max_context - 8))
    static, continuous = (played_seconds(engine.make_scheduler(len(lengths), kind), lengths, costs)
                          for kind in (StaticScheduler, Scheduler))
    least = least_seconds(lengths, costs, engine.options.chunk)
    return {"costs": {f"{s.decode_rows} rows + {s.prefill_rows} prompts": cost for s, cost in costs.items()},
            "static_s": static, "continuous_s": continuous, "least_s": least, "bound": static / least,
            "by_steps": bound_by_steps(lengths, engine.options.max_rows)}


def main() -> None:
    """Answers the command `bound`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", required=True)
    parser.add_argument("--options", default="{}", help="fields of EngineConfig, as JSON")
    arguments = parser.parse_args()

    from llm_jax import compile_cache, runs

    compile_cache.enable_compile_cache()
    engine, _ = runs.load(arguments.run_dir).engine(EngineConfig(**json.loads(arguments.options)))
    engine.compile()
    answer({"bound": lambda lengths: bound(engine, [(p, o) for p, o in lengths])})


if __name__ == "__main__":
    main()
