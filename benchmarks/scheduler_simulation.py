"""What the scheduler alone decides: page memory that holds nothing, and steps saved over static batching.

    python -m benchmarks.scheduler_simulation --trace=AzureLLMInferenceTrace_conv.csv
    python -m benchmarks.scheduler_simulation               # a synthetic trace, fitted to that one

The engine's own scheduler plays the trace through at its unscaled lengths, without a model: every step takes the same
time, and the draws are made up. All requests are there from the start, so that rows stand empty only where the
scheduler leaves them empty. Answers never begin alike, so nothing is found in the prefix cache.

- **Memory wasted** is the slots of held pages that hold no token, divided by the slots of held pages, both summed over
  all steps. Beside it, what the same requests would waste if each row held room for a whole context.
- **The gain over static batching**: a static batch takes as many requests as there are rows, in order of arrival, and
  the next begins when its longest has ended. `bound` is its steps divided by the fewest in which any schedule can
  serve the requests: all rows full, or all chunks of prompts, whichever is more. `reached` is the same for this
  scheduler. A step with prompts costs more than one without; `benchmarks.serve_trace.bound` weighs each by its measured
  time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Many

from benchmarks.serve_trace.static import StaticScheduler
from benchmarks.serve_trace.trace import AZURE_CONVERSATION, Arrival, read, synthetic, thinned
from llm_jax.inference.pages import PagePool
from llm_jax.inference.scheduler import Plan, Scheduler, Sequence


@dataclasses.dataclass(frozen=True)
class Layout:
    """See `EngineConfig`."""

    max_rows: int = 64
    prefill_rows: int = 4
    chunk: int = 256
    page_size: int = 16
    num_pages: int = 16384
    max_context: int = 16384


@dataclasses.dataclass
class Played:
    """A trace played through.

    Attributes:
      steps: device steps.
      wasted, held: slots of held pages without a token, and all of them, summed over the steps.
      live: tokens in the cache, summed over the steps.
      running: running sequences, summed over the steps.
      preemptions: sequences that lost their place for want of pages.
      seconds: CPU time of `schedule`, `dispatched` and `resolve`.
    """

    steps: int = 0
    wasted: int = 0
    held: int = 0
    live: int = 0
    running: int = 0
    preemptions: int = 0
    seconds: float = 0.0


def play(arrivals: Many[Arrival], layout: Layout, kind: Callable[..., Scheduler] = Scheduler) -> Played:
    """Plays all requests, one step in flight while the next is scheduled."""
    scheduler = kind(PagePool(layout.num_pages, layout.page_size), max_rows=layout.max_rows,
                     prefill_rows=layout.prefill_rows, chunk=layout.chunk, max_context=layout.max_context,
                     max_queue=len(arrivals))
    for i, a in enumerate(arrivals):
        prompt = min(a.prompt, layout.max_context - 1)
        scheduler.add(Sequence(i, [i] * prompt, prompt, max(a.output, 1)))
    played, flight = Played(), None
    while True:
        at = time.thread_time()
        plan = scheduler.schedule()
        if plan is not None:
            scheduler.dispatched(plan)
        played.seconds += time.thread_time() - at
        if plan is None and flight is None:
            played.preemptions = scheduler.stats.preemptions
            return played
        if plan is not None:
            wasted = scheduler.wasted_slots()
            held = sum(len(s.pages) for s in scheduler.running) * layout.page_size
            played.steps += 1
            played.wasted += wasted
            played.held += held
            played.live += held - wasted
            played.running += len(scheduler.running)
        if flight is not None:
            played.seconds += _land(scheduler, flight)
        flight = plan


def _land(scheduler: Scheduler, plan: Plan) -> float:
    drawn = {c.sequence.id: [c.sequence.id] for c in plan if c.samples}
    at = time.thread_time()
    scheduler.resolve(plan, drawn)
    seconds = time.thread_time() - at
    for chunk in plan:
        if chunk.samples and chunk.start + chunk.count + 1 - chunk.sequence.num_prompt >= chunk.sequence.max_tokens:
            scheduler.remove(chunk.sequence)
    return seconds


def waste(arrivals: Many[Arrival], layout: Layout = Layout()) -> float:
    """Share of the held page memory that holds no token, over time; 0 … 1."""
    played = play(arrivals, layout)
    return played.wasted / played.held


def fewest_steps(arrivals: Many[Arrival], layout: Layout) -> int:
    """No schedule serves the requests in fewer: each step advances so many rows, so many prompts, and each request
    once. The last chunk of a prompt draws the first token, and needs no decoding row."""
    lengths = [min(a.prompt, layout.max_context - 1) for a in arrivals]
    outputs = [min(max(a.output, 1), layout.max_context - n) for a, n in zip(arrivals, lengths, strict=True)]
    prompts = [-(-n // layout.chunk) for n in lengths]
    # What is one token over a chunk goes as a decoding row.
    chunks = sum(n // layout.chunk + (n % layout.chunk > 1) for n in lengths)
    return max(math.ceil(sum(o - 1 + p for o, p in zip(outputs, prompts, strict=True)) / layout.max_rows),
               math.ceil(chunks / layout.prefill_rows), max(p + o - 1 for p, o in zip(prompts, outputs, strict=True)))


def static_bound(arrivals: Many[Arrival], layout: Layout = Layout()) -> dict[str, float]:
    """Steps of static batching and of this scheduler, the fewest possible, and what that gains (see above)."""
    static, ours = (play(arrivals, layout, kind).steps for kind in (StaticScheduler, Scheduler))
    fewest = fewest_steps(arrivals, layout)
    return {"static_steps": static, "steps": ours, "fewest_steps": fewest, "bound": static / fewest,
            "reached": static / ours, "share_of_bound": fewest / ours}


def main() -> None:
    """Prints tables, and as the last line JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens; default: synthetic")
    parser.add_argument("--requests", type=int, default=2000, help="evenly spaced over the trace; 0 takes all")
    parser.add_argument("--max_rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--page_size", type=int, nargs="+", default=[8, 16, 32, 64])
    args = parser.parse_args()
    if args.trace:
        arrivals = read(args.trace)
        arrivals = thinned(arrivals, args.requests) if args.requests else arrivals
        print(f"{len(arrivals)} requests of {args.trace}", end="")
    else:
        arrivals = synthetic(AZURE_CONVERSATION, args.requests or 2000)
        print(f"SYNTHETIC: {len(arrivals)} requests drawn from a fit of the Azure conversation trace of 2023", end="")
    print(f": {sum(a.prompt for a in arrivals) / len(arrivals):.0f} tokens of prompt and "
          f"{sum(a.output for a in arrivals) / len(arrivals):.0f} of output on average\n")
    base = dataclasses.replace(Layout(), max_rows=max(args.max_rows))
    print(f"{'page':>6} {'memory wasted':>14} {'whole contexts':>15} {'preemptions':>12} {'scheduler, µs a step':>21}")
    wasted = {}
    for size in args.page_size:
        layout = dataclasses.replace(base, page_size=size, num_pages=base.num_pages * base.page_size // size)
        played = play(arrivals, layout)
        wasted[size] = played.wasted / played.held
        reserved = 1 - played.live / (played.running * layout.max_context)
        print(f"{size:>6} {wasted[size]:>14.2%} {reserved:>15.1%} {played.preemptions:>12} "
              f"{played.seconds / played.steps * 1e6:>21.0f}")
    print(f"\n{'rows':>6} {'static steps':>13} {'steps':>8} {'fewest':>8} {'bound':>7} {'reached':>8} {'share':>7}")
    gains = {}
    for rows in args.max_rows:
        g = gains[rows] = static_bound(arrivals, dataclasses.replace(base, max_rows=rows))
        print(f"{rows:>6} {g['static_steps']:>13} {g['steps']:>8} {g['fewest_steps']:>8} {g['bound']:>7.2f} "
              f"{g['reached']:>8.2f} {g['share_of_bound']:>7.1%}")
    print(json.dumps({"trace": args.trace or "synthetic", "wasted": {str(k): round(v, 5) for k, v in wasted.items()},
                      "gain": {str(k): round(g["bound"], 3) for k, g in gains.items()},
                      "share": {str(k): round(g["share_of_bound"], 4) for k, g in gains.items()}}))


if __name__ == "__main__":
    main()
