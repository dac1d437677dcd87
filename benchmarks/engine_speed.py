"""Tokens per second of the serving engine, alone and full, at short and long live contexts.

    python -m benchmarks.engine_speed                      # 9.3 M parameters, any machine
    python -m benchmarks.engine_speed --model=llama3_1b    # for a GPU or TPU
    python -m benchmarks.engine_speed --deterministic      # what deterministic mode costs: both engines, in turn

The weights are random: speed does not depend on them. Each case is measured in several rounds, in turn, so that what
else the machine does falls on all alike; medians are printed, with the spread and the process's own CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import numpy as np

from llm_jax import compile_cache, models
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.scheduler import Sequence
from llm_jax.models import Decoder, Execution, ModelConfig

MODELS = {
    "9m": ModelConfig(vocab_size=8192, num_layers=6, embed_dim=256, num_heads=8, num_kv_heads=8, head_dim=32,
                      mlp_dim=768, max_context=4096),
    "88m": ModelConfig(vocab_size=8192, num_layers=12, embed_dim=768, num_heads=12, num_kv_heads=4, head_dim=64,
                       mlp_dim=2048, max_context=4096),
    "llama3_1b": ModelConfig(vocab_size=128256, num_layers=16, embed_dim=2048, num_heads=32, num_kv_heads=8,
                             head_dim=64, mlp_dim=8192, max_context=4096, rope_theta=500000.0, tie_embeddings=True),
}


def decode(engine: Engine, rows: int, context: int, steps: int) -> tuple[float, float, float]:
    """(prompt tokens/s, decoded tokens/s, CPU seconds per second) of `rows` sequences of about `context` tokens."""
    scheduler = engine.make_scheduler(max_queue=rows)
    rng = np.random.default_rng(0)
    for i in range(rows):
        prompt = rng.integers(0, engine.config.vocab_size, context - steps).tolist()
        scheduler.add(Sequence(i, prompt, len(prompt), steps))
    times = {True: [0.0, 0], False: [0.0, 0]}
    cpu, began = time.process_time(), time.perf_counter()
    while plan := scheduler.schedule():
        at = time.perf_counter()
        step = engine.prepare(plan, {})
        scheduler.dispatched(plan)
        drawn = engine.execute(step).drawn
        bucket = times[bool(plan.prefill)]
        bucket[0] += time.perf_counter() - at
        bucket[1] += sum(c.count for c in plan)
        scheduler.resolve(plan, {i: list(d.tokens) for i, d in drawn.items()})
    share = (time.process_time() - cpu) / (time.perf_counter() - began)
    return times[True][1] / times[True][0], times[False][1] / times[False][0], share


def main() -> None:
    """Measures and prints a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="9m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded a sequence")
    parser.add_argument("--deterministic", action="store_true", help="beside the usual engine, one in that mode")
    arguments = parser.parse_args()
    compile_cache.enable_compile_cache()
    config = MODELS[arguments.model]
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    make = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype), models.init_params(
        Decoder(config, Execution()), key)))
    device = jax.devices()[0].device_kind
    params, engines = make(jax.random.key(0)), {}
    for mode in ("usual", "deterministic")[:1 + arguments.deterministic]:
        engines[mode] = Engine(config, params, EngineConfig(num_pages=32 * 1024 // 16 + 4096 // 16, dtype=dtype,
                                                            deterministic=mode == "deterministic"))
        print(f"{config.num_params() / 1e6:.1f} M parameters, {engines[mode].dtype}, {device}, jax {jax.__version__}; "
              f"{mode}: compiled in {engines[mode].compile():.1f} s", flush=True)
    cases = [(mode, *case) for case in ((1, 128), (1, 1024), (1, 4096), (8, 128), (8, 1024), (32, 128), (32, 1024))
             for mode in engines]
    results: dict[tuple[str, int, int], list] = {case: [] for case in cases}
    for _ in range(arguments.rounds):
        for mode, rows, context in cases:
            results[mode, rows, context].append(decode(engines[mode], rows, context, arguments.steps))
    print(f"{'engine':>13} {'rows':>5} {'context':>8} {'prompt tok/s':>13} {'decode tok/s':>13} "
          f"{'spread':>8} {'cpu':>5}")
    table: dict[str, dict[str, float]] = {mode: {} for mode in engines}
    for (mode, rows, context), rounds in results.items():
        prompt, decoded, cpu = (statistics.median(r[i] for r in rounds) for i in range(3))
        spread = (max(r[1] for r in rounds) - min(r[1] for r in rounds)) / decoded
        print(f"{mode:>13} {rows:5d} {context:8d} {prompt:13,.0f} {decoded:13,.0f} {spread:8.0%} {cpu:5.1f}")
        table[mode][f"{rows}x{context}"] = round(decoded, 1)
    print(json.dumps({"model": arguments.model, "device": device, "decode_tokens_per_second": table}))


if __name__ == "__main__":
    main()
