"""What one request's wishes cost the others that run beside it.

    python -m benchmarks.request_cost                        # 9.3 M parameters, 32 rows
    python -m benchmarks.request_cost --rows=16 --features=logprobs,top_p --rounds=3

Requests that decode together; none, one, half or all of them ask for something. Each case is measured beside one in
which nobody asks, in turn, and told as the ratio of their times: of everything from the first submission to the last
token (`wall`), of a decoding step while all of them run (`step`), and of this process's CPU (`cpu`), which other
processes disturb least. The weights are random: what is asked costs the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.serve_trace.weights import MODELS
from llm_jax import compile_cache, models
from llm_jax.data.tokenizer_training import train_tokenizer
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.request import Constraint, Delta, SamplingParams
from llm_jax.inference.service import Service

# Numbers that go on: the constraint is one that no completion reaches the end of.
NUMBERS = Constraint("json_schema", json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 4096}))
FEATURES: dict[str, dict] = {
    "plain": {},
    "logprobs": {"logprobs": 5},
    "prompt_logprobs": {"prompt_logprobs": 5},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "logit_bias": {"logit_bias": {i: -1.0 for i in range(20)}},
    "json": {"constraint": NUMBERS},
    "temperature": {"temperature": 0.8, "seed": 1},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k": {"temperature": 0.8, "top_k": 40},
}


def serve(service: Service, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> dict[str, float]:
    """Submits prompts together and waits. Seconds: `wall`, `cpu` (of the process) for everything, and `step`, a
    decoding step's, from when every row had its first token to when the first row had its last."""
    finished, times = threading.Semaphore(0), [[] for _ in prompts]
    problems: list[str] = []

    def listener(into: list[float]) -> Callable[[Delta], None]:
        def listen(delta: Delta) -> None:
            into.append(time.perf_counter())
            if delta.finish_reason is not None:
                if delta.finish_reason != "length":
                    problems.append(delta.error or delta.finish_reason)
                finished.release()
        return listen

    cpu, began = time.process_time(), time.perf_counter()
    for prompt, each, into in zip(prompts, params, times, strict=True):
        service.submit(prompt, each, listener(into))
    for _ in prompts:
        finished.acquire()
    seconds = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    if problems:
        raise SystemExit(f"a request ended otherwise than with its length: {problems[0]}")
    first, last = max(t[0] for t in times), min(t[-1] for t in times)
    between = [at for at in times[0] if first <= at <= last]
    return seconds | {"step": (between[-1] - between[0]) / max(1, len(between) - 1)}


def features(service: Service, names: Sequence[str], rows: int, length: int, output: int, rounds: int) -> list[dict]:
    """A line for each feature and share of rows that ask for it, as ratios to plain rounds beside them."""
    rng = np.random.default_rng(0)
    vocab_size = service.engine.config.vocab_size
    lines = []
    for name in names:
        shares = {"one": 1, "half": rows // 2, "all": rows}
        measured: dict[str, list[dict[str, float]]] = {share: [] for share in ("none", *shares)}
        for number in range(rounds + 1):
            prompts = rng.integers(3, vocab_size, (rows, length)).tolist()
            order = list(measured)
            for share in order if number % 2 else reversed(order):
                asking = shares.get(share, 0)
                params = [SamplingParams(max_tokens=output, ignore_eos=True, **(FEATURES[name] if i < asking else {}))
                          for i in range(rows)]
                found = serve(service, prompts, params)
                if number:  # the first one warms up
                    measured[share].append(found)
        for share in shares:
            line = {"feature": name, "asking": shares[share], "rows": rows}
            for which in ("wall", "step", "cpu"):
                line[which] = round(statistics.median(
                    a[which] / b[which] for a, b in zip(measured[share], measured["none"], strict=True)), 3)
            lines.append(line)
            print(f"{name:16}{shares[share]:4d} of {rows:<4d}{line['wall']:8.2f}{line['step']:8.2f}{line['cpu']:8.2f}",
                  flush=True)
    return lines


def make_service(model: str, max_context: int, **options: Any) -> Service:
    """A compiled service over random weights, with a tokenizer of the model's size."""
    config = dataclasses.replace(MODELS[model], max_context=max_context)
    params = jax.jit(lambda key: models.init_params(models.build(config), key))(jax.random.key(0))
    sources = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    tokenizer = train_tokenizer([path.read_text(errors="replace") for path in sources], config.vocab_size)
    engine = Engine(config, params, EngineConfig(max_context=max_context, num_pages=40 * -(-max_context // 16),
                                                 prefix_cache=False, **options))
    engine.compile()
    return Service(engine, tokenizer, max_queue=1000)


def main() -> int:
    """Measures and prints a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="9m")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--features", default=",".join(FEATURES))
    parser.add_argument("--length", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=48, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    names = args.features.split(",")
    if unknown := set(names) - set(FEATURES):
        parser.error(f"no feature is called {', '.join(unknown)}; there are {', '.join(FEATURES)}")
    compile_cache.enable_compile_cache()
    service = make_service(args.model, args.length + args.output)
    print(f"{args.model}, jax {jax.__version__}, {jax.devices()[0].device_kind}; {args.length}-token prompts, "
          f"{args.output} tokens from each; times with the wish over times without")
    print(f"{'feature':16}{'asking':>10}{'wall':>10}{'step':>8}{'cpu':>8}")
    lines = features(service, names, args.rows, args.length, args.output, args.rounds)
    service.close()
    print(json.dumps({"model": args.model, "cases": lines}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
