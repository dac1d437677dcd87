"""Attention on this machine's own device against float64 NumPy: dense and paged, float32 and bfloat16, with a window,
a soft cap and a latent cache.

    python -m benchmarks.attention_check

Exits with 1 if an error is larger than its dtype allows.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.attention import DenseContext, attention
from llm_jax.kernels.paged import PagedContext, WorkList, make_pool

ALLOWED = {"float32": 5e-3, "bfloat16": 2e-2}  # relative, whole tensor; float32 products may be tf32 on a GPU
T, H, PAGE = 256, 8, 16
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {  # (heads, width of keys, of values), options
    "plain": ((2, 64, 64), {}),
    "window": ((2, 64, 64), {"window": 100, "soft_cap": 5.0}),
    "latent": ((1, 80, 0), {"value_dim": 64}),
}


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int | None = None,
              soft_cap: float | None = None) -> np.ndarray:
    """Causal attention in float64; [T, H, V]."""
    k, v = (np.repeat(a, H // a.shape[1], axis=1) for a in (k, v))
    scores = np.einsum("thk,shk->hts", q, k) * scale
    scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
    ones = np.ones((len(q), len(q)), bool)
    scores = np.where(np.tril(ones) & np.triu(ones, 1 - (window or T)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shv->thv", p / p.sum(-1, keepdims=True), v)


def paged(q: jax.Array, k: jax.Array, v: jax.Array | None, widths: tuple[int, int, int], options: dict[str, Any],
          dtype: str) -> np.ndarray:
    """The last position, read from scattered pages; pages of nobody hold NaN."""
    pages = np.random.default_rng(1).permutation(2 * T // PAGE)[:T // PAGE].astype(np.int32)
    slots = (pages[np.arange(T) // PAGE] * PAGE + np.arange(T) % PAGE).astype(np.int32)
    entries = (k,) if v is None else (k, v)
    pools = tuple(jnp.full_like(pool, jnp.nan).at[:, slots // PAGE, slots % PAGE].set(jnp.swapaxes(new, 0, 1))
                  for pool, new in zip(make_pool(2 * T // PAGE, PAGE, widths, dtype), entries, strict=True))
    first = max(0, T - options.get("window", T)) // PAGE
    read = np.arange(first, T // PAGE, dtype=np.int32)
    work = WorkList(np.zeros_like(read), pages[first:], read * PAGE, np.int32(len(read)))
    lists = {"decode_local" if "window" in options else "decode": work}
    context = PagedContext(np.array([T - 1], np.int32), slots[-1:], 1, 8, **lists)
    out, _ = jax.jit(functools.partial(attention, **options))(
        q[None, -1:], k[None, -1:], None if v is None else v[None, -1:], context, pools)
    return np.asarray(out[0], np.float64)


def main() -> int:
    """Prints a table; returns the exit status."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n"
          f"{'case':>8} {'path':>6} {'dtype':>9} {'relative error':>15}")
    right = True
    for case, ((heads, key_width, value_width), given) in CASES.items():
        for dtype, allowed in ALLOWED.items():
            shapes = (H, key_width), (heads, key_width), (heads, value_width)
            q, k, v = (jnp.asarray(np.random.default_rng(i).normal(size=(T, *s)), dtype) for i, s in enumerate(shapes))
            options = {"scale": key_width**-0.5, **given}
            values = v if value_width else k[..., :given["value_dim"]]
            expected = reference(*(np.asarray(a, np.float64) for a in (q, k, values)),
                                 **{name: value for name, value in options.items() if name != "value_dim"})
            v = v if value_width else None
            dense = jax.jit(functools.partial(attention, **options))
            out = np.asarray(dense(q[None], k[None], None if v is None else v[None], DenseContext())[0][0], np.float64)
            last = paged(q, k, v, (heads, key_width, value_width), options, dtype)
            for path, got, want in (("dense", out, expected), ("paged", last, expected[-1:])):
                error = np.linalg.norm(got - want) / np.linalg.norm(want)
                right &= bool(error <= allowed)
                print(f"{case:>8} {path:>6} {dtype:>9} {error:15.2e}{'' if error <= allowed else f'  over {allowed}'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
