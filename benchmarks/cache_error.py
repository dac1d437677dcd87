"""What a key/value cache of one or two bytes does to a trained model's log-probabilities.

    python -m benchmarks.cache_error                         # trains the target of benchmarks.speculation, if need be
    python -m benchmarks.cache_error --run_dir=runs/quickstart --data_dir=data/quickstart --tokens=8192

Stretches of the validation split are prefilled in chunks, each reading from the cache what those before it wrote, and
every token's log-probability is compared with that of a float32 cache; a chunk's own keys and values come back from the
cache too. Weights and products are float32 throughout: the differences are the cache's.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys

import numpy as np

from benchmarks.trained_pair import held_out, make
from llm_jax import compile_cache, runs
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import CACHE_DTYPES, EngineConfig
from llm_jax.inference.generation import complete
from llm_jax.inference.request import SamplingParams
from llm_jax.inference.service import Service


def log_probabilities(run: runs.Run, texts: list[list[int]], dtype: str) -> np.ndarray:
    """The log-probability of every token but each text's first, float64 [n], with a cache of `dtype`."""
    length = max(map(len, texts))
    engine = Engine(run.config, run.params, EngineConfig(
        max_rows=4, prefill_rows=4, chunk=32, dtype="float32", cache_dtype=dtype, max_context=length + 1,
        num_pages=6 * -(-(length + 1) // 16), prefix_cache=False))
    engine.compile()
    service = Service(engine, run.tokenizer, max_queue=len(texts))
    try:
        done = complete(service, texts, [SamplingParams(max_tokens=1, prompt_logprobs=0)] * len(texts))
    finally:
        service.close()
    return np.array([p.logprob for one in done for p in one.prompt_logprobs])


def compare(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """How far log-probabilities are from exact ones: mean and greatest difference (absolute), and of the perplexity,
    as a share."""
    gap = np.abs(found - exact)
    return {"mean": float(gap.mean()), "p99": float(np.quantile(gap, 0.99)), "max": float(gap.max()),
            "perplexity": math.exp(-found.mean()), "perplexity_change": math.exp(exact.mean() - found.mean()) - 1}


def main() -> int:
    """Measures and prints a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="runs/speculation", help="where the model is trained, or was")
    parser.add_argument("--corpus", default="python-stdlib", help="what it is trained on: a file or folder of text")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--run_dir", help="a trained model to take instead")
    parser.add_argument("--data_dir", help="its prepared data")
    parser.add_argument("--tokens", type=int, default=8192, help="to compare, about")
    parser.add_argument("--length", type=int, default=256, help="tokens of a stretch")
    args = parser.parse_args()
    if bool(args.run_dir) != bool(args.data_dir):
        parser.error("--run_dir and --data_dir go together")
    compile_cache.enable_compile_cache()
    if args.run_dir:
        run_dir, data_dir = pathlib.Path(args.run_dir), pathlib.Path(args.data_dir)
    else:
        pair = make(pathlib.Path(args.directory).expanduser(), args.corpus, args.steps)
        run_dir, data_dir = pair.target, pair.data_dir
    run = runs.load(run_dir)
    texts = held_out(data_dir, max(1, args.tokens // args.length), args.length)
    exact = log_probabilities(run, texts, "float32")
    print(f"{run.config.num_params() / 1e6:.2f} M parameters, {len(exact):,} tokens in stretches of {args.length}, "
          f"perplexity {math.exp(-exact.mean()):.3f} with a float32 cache; difference of log-probabilities:")
    print(f"{'cache':16}{'mean':>10}{'p99':>10}{'max':>10}{'perplexity':>12}{'change':>10}")
    table = {}
    for dtype in CACHE_DTYPES[1:]:
        line = table[dtype] = compare(log_probabilities(run, texts, dtype), exact)
        print(f"{dtype:16}{line['mean']:10.2e}{line['p99']:10.2e}{line['max']:10.2e}{line['perplexity']:12.4f}"
              f"{line['perplexity_change']:+10.4%}", flush=True)
    print(json.dumps({"tokens": len(exact), "by_cache_dtype": table}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
