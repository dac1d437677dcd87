"""Time of paged attention on a GPU, beside the time of reading the keys and values at the bandwidth of a copy.

    python -m benchmarks.gpu_paged
    python -m benchmarks.gpu_paged --sweep    # other sizes of blocks, splits and pipelines

Heads are those of an 8B Llama: 32 of queries, 8 of keys and values, 128 wide, bfloat16. A layer's time holds writing
the step's keys and values and all that attention launches. Layers have pools of their own, and tables move on from
round to round over at least 256 MB: what was read last is not in the cache when it is read again. `--interpret` runs
small shapes on any device, to see that the program itself works.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels import paged_triton
from llm_jax.kernels.paged import PagedContext

H, G, K, PAGE = 32, 8, 128, 16
LAYERS = 8
DECODE = [(rows, context) for rows in (1, 8, 64) for context in (1024, 4096, 16384)]
PREFILL = [(512, 4096), (512, 16384)]  # tokens of one row, context
SWEEP = {"STAGES": (2, 3, 4), "BLOCK_BYTES": (8192, 16384, 32768), "PROGRAMS": (256, 512, 1024)}


def seconds(run, *, least: float) -> float:
    """The best time of five of one call of `run`, from as many calls in a row as take `least` seconds."""
    jax.block_until_ready(run())
    began = time.perf_counter()
    jax.block_until_ready(run())
    calls = max(1, int(least / (time.perf_counter() - began)))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - began) / calls)
    return best


def copy_bandwidth(size: int) -> float:
    """Bytes a second, read and written, of adding 1 to an array of `size` bytes."""
    x = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * size / seconds(lambda: add(x), least=0.05)


def measure(rows: int, chunk: int, context: int, *, spread: int, least: float, interpret: bool) -> float:
    """Seconds a layer of attention takes.

    Args:
      rows: decoding rows; with 0, one prefilling row of `chunk` tokens.
      context: of each row; its last tokens are the queries.
      spread: bytes over which what is read is spread.
      least: seconds to measure.
    """
    R, N = max(rows, 1), rows or chunk
    pages = R * -(-context // PAGE)
    sets = max(1, -(-spread // (2 * LAYERS * pages * PAGE * G * K * 2)))
    rounds = max(4, sets)
    pools = [tuple(jax.random.normal(jax.random.key(2 * layer + i), (G, sets * pages + 1, PAGE, K), jnp.bfloat16)
                   for i in range(2)) for layer in range(LAYERS)]
    table_RP = np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(R, -1)
    position_RT = np.broadcast_to(np.arange(context - N // R, context, dtype=np.int32), (R, N // R))
    page_RT = np.take_along_axis(table_RP, position_RT // PAGE, axis=1)
    slot_N = (page_RT * PAGE + position_RT % PAGE).reshape(-1)
    q, k, v = (jax.random.normal(jax.random.key(i), (1, N, heads, K), jnp.bfloat16)
               for i, heads in enumerate((H, G, G)))

    def one_round(i, carry):
        q, pools = carry
        first = (i % sets) * pages
        at = PagedContext(position_RT.reshape(-1), slot_N + first * PAGE, rows, chunk, table_RP=table_RP + first,
                          length_R=np.full(R, context, np.int32), backend="triton")
        after = []
        for pool in pools:
            q, pool = paged_triton.attend(q, k, v, at, pool, scale=K**-0.5, interpret=interpret)
            after.append(pool)
        return q, after

    @functools.partial(jax.jit, donate_argnums=0)
    def run(pools):
        return jax.lax.fori_loop(0, rounds, one_round, (q, pools))

    def call():
        nonlocal pools
        out, pools = run(pools)
        return out

    return seconds(call, least=least) / (rounds * LAYERS)


def main() -> None:
    """Prints a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--interpret", action="store_true")
    arguments = parser.parse_args()
    small = arguments.interpret
    options = {"spread": 1 << 20 if small else 1 << 28, "least": 0.0 if small else 0.05, "interpret": small}
    bandwidth = copy_bandwidth(1 << 24 if small else 1 << 30)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}; a copy moves {bandwidth / 1e9:,.0f} GB/s")
    decode, prefill = ([(1, 64), (2, 32)], [(32, 64)]) if small else (DECODE, PREFILL)
    result: dict[str, object] = {"device": device, "copy_GB_per_s": round(bandwidth / 1e9, 1)}
    if arguments.sweep:
        for values in itertools.product(*SWEEP.values()):
            for name, value in zip(SWEEP, values, strict=True):
                setattr(paged_triton, name, value)
            times = [measure(rows, 8, context, **options) for rows, context in decode[1::3]]
            print(dict(zip(SWEEP, values, strict=True)), *(f"{t * 1e6:8.1f} us" for t in times), flush=True)
        return
    print(f"{'rows':>5} {'context':>8} {'us/layer':>9} {'floor':>8} {'of floor':>9}")
    for rows, context in decode:
        took = measure(rows, 8, context, **options)
        floor = rows * context * 2 * G * K * 2 / bandwidth
        print(f"{rows:5d} {context:8d} {took * 1e6:9.1f} {floor * 1e6:8.1f} {floor / took:9.0%}", flush=True)
        result[f"decode_{rows}x{context}"] = {"us": round(took * 1e6, 2), "share_of_floor": round(floor / took, 3)}
    print(f"{'chunk':>5} {'context':>8} {'us/layer':>9} {'TFLOP/s':>8}")
    for chunk, context in prefill:
        took = measure(0, chunk, context, **options)
        speed = 4 * H * K * chunk * (context - chunk / 2) / took / 1e12
        print(f"{chunk:5d} {context:8d} {took * 1e6:9.1f} {speed:8.1f}", flush=True)
        result[f"prefill_{chunk}at{context}"] = {"us": round(took * 1e6, 2), "tflops": round(speed, 2)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
