"""What high-priority requests wait for under saturating load, and what a long prompt costs the streams that run.

    python -m benchmarks.priority                            # 9.3 M parameters
    python -m benchmarks.priority --model=88m --requests=40
    python -m benchmarks.priority --requests=3 --arrivals=2  # does it run at all?

In process, greedy, everything in one service:

1. Time to first token of high-priority requests, one after another on an idle engine, and then with all rows taken by
   requests of low priority and more of them waiting. The difference at p99 is to be under 100 ms plus one step.
2. The gaps between the tokens of running streams, without and with prompts of 2,000 tokens that arrive one at a time.
   The p99 gap is to grow by at most one budgeted step: the dearest shape of step, whose time is measured too.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import threading
import time

import jax
import numpy as np

from benchmarks.prefix_cache import make_services
from benchmarks.serve_trace.bound import measured_costs
from benchmarks.serve_trace.weights import MODELS
from llm_jax import compile_cache
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.request import Delta, SamplingParams
from llm_jax.inference.service import Service

CONTEXT = 2304


@dataclasses.dataclass
class Stream:
    """A request under way: when it was sent, and when its tokens came."""

    sent: float
    times: list[float] = dataclasses.field(default_factory=list)
    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    id: int = -1

    def listen(self, delta: Delta) -> None:
        """Notes a delta."""
        if delta.token_ids:
            self.times.append(time.perf_counter())
        if delta.finish_reason is not None:
            self.done.set()

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent


class Load:
    """Sends requests of random prompts to one service."""

    def __init__(self, service: Service):
        self.service = service
        self._rng = np.random.default_rng(0)

    def send(self, prompt: int, output: int, priority: int = 0) -> Stream:
        """One request, of so many tokens."""
        tokens = self._rng.integers(3, self.service.engine.config.vocab_size, prompt).tolist()
        stream = Stream(time.perf_counter())
        stream.id = self.service.submit(tokens, SamplingParams(max_tokens=output, ignore_eos=True), stream.listen,
                                        priority)
        return stream

    def cancel(self, streams: list[Stream]) -> None:
        """Ends requests, and waits until they have ended."""
        for stream in streams:
            self.service.cancel(stream.id)
        for stream in streams:
            stream.done.wait()


def first_tokens(load: Load, count: int, priority: int, pause_s: float) -> list[float]:
    """Seconds to the first token of requests of 64 tokens, one after another, with pauses that match no rhythm."""
    found = []
    for i in range(count):
        time.sleep(pause_s * (0.5 + (i * 0.618) % 1))
        stream = load.send(64, 4, priority)
        stream.done.wait()
        found.append(stream.first)
    return found


def under_load(load: Load, count: int, rows: int, pause_s: float) -> list[float]:
    """The same at high priority, with all rows taken by low priority and as many requests waiting, always."""
    waiting: list[Stream] = []
    over = threading.Event()

    def saturate() -> None:
        rng = np.random.default_rng(1)
        while not over.is_set():
            waiting[:] = [s for s in waiting if not s.done.is_set()]
            while len(waiting) < 2 * rows:
                waiting.append(load.send(int(rng.integers(50, 400)), int(rng.integers(20, 120))))
            over.wait(0.005)

    thread = threading.Thread(target=saturate)
    thread.start()
    try:
        while load.service.stats()["running"] < rows:
            time.sleep(0.05)
        return first_tokens(load, count, 10, pause_s)
    finally:
        over.set()
        thread.join()
        load.cancel(waiting)


def gaps(load: Load, streams: int, arrivals: int) -> tuple[list[float], list[float]]:
    """Gaps, in seconds, between tokens of running streams: on their own, and while prompts of 2,000 tokens are read."""
    running = [load.send(32, CONTEXT - 64) for _ in range(streams)]
    while any(len(s.times) < 8 for s in running):
        time.sleep(0.01)
    long: list[tuple[float, float]] = []
    began = time.perf_counter()
    for _ in range(arrivals):
        before = max(len(s.times) for s in running)
        while max(len(s.times) for s in running) < before + 16:  # some time alone
            time.sleep(0.005)
        stream = load.send(2000, 1)
        stream.done.wait()
        long.append((stream.sent, stream.times[0]))
    ended = time.perf_counter()
    load.cancel(running)
    alone, beside = [], []
    for stream in running:
        for a, b in itertools.pairwise(t for t in stream.times if began <= t <= ended):
            (beside if any(a < last and b > first for first, last in long) else alone).append(b - a)
    return alone, beside


def main() -> int:
    """Measures, prints what it found, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="9m")
    parser.add_argument("--requests", type=int, default=200, help="of high priority, in each of the two situations")
    parser.add_argument("--arrivals", type=int, default=20, help="of prompts of 2,000 tokens")
    parser.add_argument("--streams", type=int, default=16, help="that run when they arrive")
    parser.add_argument("--pause", type=float, default=0.05, help="mean seconds between high-priority requests")
    args = parser.parse_args()
    compile_cache.enable_compile_cache()
    options = EngineConfig(max_context=CONTEXT, num_pages=36 * CONTEXT // 16)
    (_, service), = make_services(args.model, CONTEXT, {"": options})
    steps = measured_costs(service.engine, 512)  # before any request: the engine is the service's from then on
    step = max(steps.values())
    load = Load(service)
    first_tokens(load, 3, 0, 0.0)  # warm up
    idle = first_tokens(load, args.requests, 0, args.pause)
    loaded = under_load(load, args.requests, options.max_rows, args.pause)
    alone, beside = gaps(load, args.streams, args.arrivals)
    service.close()

    def ms(values: list[float], percent: float) -> float:
        return float(np.percentile(values, percent)) * 1000

    print(f"{args.model}, jax {jax.__version__}, one budgeted step (the dearest shape): {step * 1000:.1f} ms")
    rows = (("first token, idle", idle), ("first token, high priority under load", loaded),
            ("gap, streams alone", alone), ("gap, while a 2,000-token prompt is read", beside))
    for name, values in rows:
        print(f"{name:42} {len(values):6} samples, ms: p50 {ms(values, 50):7.1f}  p90 {ms(values, 90):7.1f}  "
              f"p99 {ms(values, 99):7.1f}")
    added, grown = ms(loaded, 99) - ms(idle, 99), ms(beside, 99) - ms(alone, 99)
    print(f"added to the first token at p99: {added:.1f} ms, target {100 + step * 1000:.1f} ms; "
          f"p99 gap grown by {grown:.1f} ms, target {step * 1000:.1f} ms")
    print(json.dumps({"model": args.model, "step_ms": round(step * 1000, 1), "added_ttft_p99_ms": round(added, 1),
                      "added_gap_p99_ms": round(grown, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
