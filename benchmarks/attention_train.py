"""Attention of whole rows, forward and backward, by every backend this machine has: time and memory by length of row.

    python -m benchmarks.attention_train [--lengths=128,256,512,1024,2048] [--tokens=2048] [--heads=8] [--width=32]

Backends take turns, and times are medians over the rounds. Memory is what the compiled program needs beside its inputs
and outputs. "ratio" is dense's time over the backend's. On a GPU of known speed the last column is the share of it that
goes into the products that attention needs (Dao 2023, arXiv:2307.08691, section 4.1: 3.5 × the forward pass, half of it
under a causal mask).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.kernels.attention import BACKENDS, DenseContext, choose, dense_attention
from llm_jax.kernels.attention_call import Call

PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # dense bf16, by the data sheet


def compiled(backend: str, arrays: tuple[jax.Array, ...], segment_ids_BT: jax.Array | None,
             window: int | None) -> Any:
    """Output and gradients as one program."""
    def step(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, segment_ids: jax.Array | None) -> Any:
        context = DenseContext(segment_ids, backend=backend)
        attend = functools.partial(dense_attention, context=context, scale=q.shape[3]**-0.5, window=window)
        out, transpose = jax.vjp(attend, q, k, v)
        return out, transpose(dout)

    return jax.jit(step).lower(*arrays, segment_ids_BT).compile()


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="128,256,512,1024,2048")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch; at least one row")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=0, help="0: as many as heads")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--window", type=int, default=None)
    parser.add_argument("--documents", type=int, default=2, help="of a row; 0 gives no segment ids, which cuDNN needs")
    parser.add_argument("--backends", default="dense,chunked,splash,cudnn,triton")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    kind = jax.devices()[0].device_kind
    H, G, K = given.heads, given.kv_heads or given.heads, given.width
    print(f"{kind}, jax {jax.__version__}: {H} heads, {G} of keys, {K} wide, {given.dtype}, window {given.window}, "
          f"{given.documents} documents a row\n"
          f"{'length':>6} {'rows':>4} {'backend':>8} {'ms':>9} {'ratio':>6} {'MB':>8} {'of peak':>8}")
    for T in map(int, given.lengths.split(",")):
        B = max(1, given.tokens // T)
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = tuple(jax.random.normal(key, (B, T, heads, K), given.dtype)
                       for key, heads in zip(keys, (H, G, G, H), strict=True))
        ids = jnp.broadcast_to(1 + jnp.arange(T) * given.documents // T, (B, T)) if given.documents else None
        call = Call(T, T, H, G, K, K, given.dtype, True, given.window, segments=ids is not None)
        programs = {}
        for backend in given.backends.split(","):
            try:
                programs[backend] = compiled(choose(call, backend), arrays, ids, given.window)
            except UserError as error:
                if backend not in BACKENDS:
                    raise SystemExit(str(error)) from None
        times: dict[str, list[float]] = {backend: [] for backend in programs}
        for repeat in range(given.rounds + 2):
            for backend, program in programs.items():
                seconds = timed(functools.partial(program, *arrays, ids))
                if repeat >= 2:
                    times[backend].append(seconds)
        best = choose(call)
        for backend, program in programs.items():
            median = statistics.median(times[backend])
            ratio = statistics.median(times["dense"]) / median if "dense" in times else float("nan")
            flops = 3.5 * 4 * B * H * T * T * K / 2
            share = f"{flops / median / PEAK_FLOPS[kind]:8.1%}" if kind in PEAK_FLOPS else ""
            memory = program.memory_analysis()
            megabytes = memory.temp_size_in_bytes / 1e6 if memory else float("nan")
            print(f"{T:6} {B:4} {backend:>8} {1e3 * median:9.3f} {ratio:6.2f} {megabytes:8.1f} {share}"
                  f"{'  auto' if backend == best else ''}")


if __name__ == "__main__":
    main()
