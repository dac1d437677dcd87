"""How near a lone stream comes to the time that reading the weights takes.

    python -m benchmarks.weight_reading                # 88 M parameters
    python -m benchmarks.weight_reading --model=9m

To draw a token for one sequence each matrix is read once and used once, so memory's bandwidth bounds the time of a
token from below. Three probes read as many bytes as the weights have, each on all cores: sums by NumPy in threads, a
product of a matrix and a vector by NumPy's BLAS, and one by XLA. The best of them is the measure; they take turns with
the stream, so that what else the machine does falls on all alike. The last line is JSON.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import statistics
import timeit
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.prefix_cache import make_services
from benchmarks.priority import Load
from benchmarks.serve_trace.weights import MODELS
from llm_jax import compile_cache
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.service import Service

CONTEXT, WIDTH, REPEATS = 256, 1024, 5


def weight_bytes(service: Service) -> int:
    """Of what one token needs: everything but the table of embeddings, of which it needs a row; unless that table makes
    the logits too."""
    config, params = service.engine.config, service.engine.params
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    itemsize = jax.tree.leaves(params)[0].dtype.itemsize
    return total if config.tie_embeddings else total - config.vocab_size * config.embed_dim * itemsize


def probes(num_bytes: int) -> dict[str, Callable[[], object]]:
    """Functions that read so many bytes."""
    cores = len(os.sched_getaffinity(0))
    pool = concurrent.futures.ThreadPoolExecutor(cores)
    matrix = np.ones((num_bytes // (4 * WIDTH), WIDTH), np.float32)
    parts, vector = np.array_split(matrix, cores), np.ones(WIDTH, np.float32)
    on_device, x = jnp.asarray(matrix), jnp.asarray(vector)
    product = jax.jit(lambda matrix, x: matrix @ x)
    return {"sums, NumPy": lambda: list(pool.map(np.sum, parts)), "matrix × vector, BLAS": lambda: matrix @ vector,
            "matrix × vector, XLA": lambda: product(on_device, x).block_until_ready()}


def gaps(service: Service, tokens: int) -> list[float]:
    """Seconds between the tokens of a lone greedy stream."""
    stream = Load(service).send(32, tokens)
    stream.done.wait()
    return [b - a for a, b in itertools.pairwise(stream.times)][4:]


def main() -> None:
    """Measures, prints a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="88m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64, help="of the stream in each round")
    args = parser.parse_args()
    compile_cache.enable_compile_cache()
    options = EngineConfig(max_context=CONTEXT, num_pages=4 * CONTEXT // 16, max_rows=4)
    (_, service), = make_services(args.model, CONTEXT, {"": options})
    num_bytes = weight_bytes(service)
    calls = probes(num_bytes)
    gaps(service, 8)  # warm up
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        rounds.append({name: min(timeit.repeat(call, number=1, repeat=REPEATS)) for name, call in calls.items()}
                      | {"a token of the stream": statistics.median(gaps(service, args.tokens))})
    service.close()
    ratios = [found["a token of the stream"] / min(found[name] for name in calls) for found in rounds]
    print(f"{args.model}, {service.engine.config.num_params() / 1e6:.1f} M parameters, {num_bytes / 1e6:,.0f} MB of "
          f"weights a token, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name in rounds[0]:
        seconds = statistics.median(found[name] for found in rounds)
        print(f"{name:24} {seconds * 1e3:8.2f} ms   {num_bytes / seconds / 1e9:6.1f} GB/s")
    print(f"a token takes {statistics.median(ratios):.2f} × the best probe of its round ({min(ratios):.2f} to "
          f"{max(ratios):.2f}); the target is 1.5")
    print(json.dumps({"model": args.model, "ratio_to_best_probe": round(statistics.median(ratios), 3)}))


if __name__ == "__main__":
    main()
