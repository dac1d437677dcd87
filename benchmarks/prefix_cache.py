"""What the prefix cache gains on prompts that share most of their tokens, and what it costs where nothing is shared.

    python -m benchmarks.prefix_cache                        # 9.3 M parameters, 1,024-token prompts, 90 % shared
    python -m benchmarks.prefix_cache --model=88m --requests=32
    python -m benchmarks.prefix_cache --requests=4 --rounds=1   # does it run at all?

Two services over the same weights, one with the cache and one without, serve the same prompts in turn, round by round;
medians are printed. Hits: prompts of which nine tenths are common to all of a round, 16 tokens generated from each.
Nothing of a round is left to the next: every round has other tokens. The first prompt of a round is served alone in
both, as whoever sends thousands of prompts with one beginning has sent one before. No hits: prompts that share nothing.
The cost is a ratio of two nearly equal times: the CPU seconds of this process are compared too, which others disturb
less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.serve_trace.weights import MODELS
from llm_jax import compile_cache, models
from llm_jax.data.tokenizer_training import train_tokenizer
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.generation import complete
from llm_jax.inference.request import SamplingParams
from llm_jax.inference.service import Service


def make_services(model: str, max_context: int, names: dict[str, EngineConfig]) -> Iterator[tuple[str, Service]]:
    """A service for each layout, over the same random weights."""
    config = dataclasses.replace(MODELS[model], max_context=max_context)
    params = jax.jit(lambda key: models.init_params(models.build(config), key))(jax.random.key(0))
    tokenizer = train_tokenizer(["for i in range(10):\n    print(i)\n" * 5], 300)
    for name, options in names.items():
        engine = Engine(config, params, options)
        engine.compile()
        yield name, Service(engine, tokenizer, max_queue=100_000)


def prompts_of(rng: np.random.Generator, count: int, length: int, shared: int, vocab_size: int) -> list[list[int]]:
    """`count` prompts of `length` random tokens that begin with the same `shared` ones."""
    common = rng.integers(3, vocab_size, shared).tolist()
    return [common + rng.integers(3, vocab_size, length - shared).tolist() for _ in range(count)]


def served(service: Service, prompts: list[list[int]], output: int) -> tuple[float, float]:
    """(wall, CPU) seconds of serving prompts that come together."""
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    cpu, began = time.process_time(), time.perf_counter()
    done = complete(service, prompts, [params] * len(prompts))
    times = time.perf_counter() - began, time.process_time() - cpu
    for each in done:
        if len(each.token_ids) != output:
            raise SystemExit(f"a request ended with {len(each.token_ids)} tokens: {each.error or each.finish_reason}")
    return times


def main() -> int:
    """Measures and prints a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="9m")
    parser.add_argument("--requests", type=int, default=64, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--shared", type=float, default=0.9, help="share of them that all have in common")
    parser.add_argument("--output", type=int, default=16)
    args = parser.parse_args()
    compile_cache.enable_compile_cache()
    context = args.length + args.output
    # Room for all rows: pages that are evicted would be another subject.
    layout = EngineConfig(max_context=context, num_pages=40 * -(-context // 16))
    services = dict(make_services(args.model, context, {
        name: dataclasses.replace(layout, prefix_cache=on) for name, on in (("cache", True), ("none", False))}))
    rng, vocabulary = np.random.default_rng(0), MODELS[args.model].vocab_size
    times: dict[tuple[str, str], list[tuple[float, float]]] = {
        (case, name): [] for case in ("hits", "no hits") for name in services}
    for number in range(args.rounds + 1):
        for case, share in (("hits", args.shared), ("no hits", 0.0)):
            prompts = prompts_of(rng, args.requests + 1, args.length, int(args.length * share), vocabulary)
            for name in sorted(services, reverse=bool(number % 2)):
                if case == "hits":
                    served(services[name], prompts[:1], 1)
                measured = served(services[name], prompts[1:], args.output)
                if number:  # the first one warms up
                    times[case, name].append(measured)
                print(f"round {number}, {case}, {name}: {measured[0]:.2f} s", file=sys.stderr, flush=True)
    stats = services["cache"].stats()
    for service in services.values():
        service.close()
    print(f"{args.model}, jax {jax.__version__}, {args.requests} prompts of {args.length} tokens, {args.output} tokens "
          f"from each; prefix hits {stats['prefix_hits']:,} of {stats['prefix_lookups']:,} tokens")
    print(f"{'':8} {'prefix cache':>14} {'requests/s':>11} {'prompt+output tokens/s':>23}")
    for (case, name), each in times.items():
        seconds = statistics.median(t[0] for t in each)
        print(f"{case:8} {name:>14} {args.requests / seconds:11.2f} {args.requests * context / seconds:23,.0f}")

    def ratio(case: str, which: int) -> float:  # round by round: what else the machine does changes slowly
        return statistics.median(a[which] / b[which] for a, b in zip(
            times[case, "none"], times[case, "cache"], strict=True))

    print(json.dumps({"model": args.model, "gain_at_hits": round(ratio("hits", 0), 3),
                      "cost_at_no_hits": round(1 / ratio("no hits", 0) - 1, 4),
                      "cpu_cost_at_no_hits": round(1 / ratio("no hits", 1) - 1, 4)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
