"""Attention on this machine's own device against float64 NumPy: dense and paged, float32 and bfloat16.

    python -m benchmarks.attention_check

Exits with 1 if an error is larger than its dtype allows.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.attention import DenseContext, attention
from llm_jax.kernels.paged import PagedContext, WorkList, make_pool

ALLOWED = {"float32": 5e-3, "bfloat16": 2e-2}  # relative, whole tensor; float32 products may be tf32 on a GPU
T, H, G, K, PAGE = 256, 8, 2, 64, 16


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention in float64; [T, H, K]."""
    k, v = (np.repeat(a, H // G, axis=1) for a in (k, v))
    scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(K)
    scores = np.where(np.tril(np.ones((len(q), len(q)), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shk->thk", p / p.sum(-1, keepdims=True), v)


def paged(q: jax.Array, k: jax.Array, v: jax.Array, dtype: str) -> np.ndarray:
    """The last position, read from scattered pages; pages of nobody hold NaN."""
    pages = np.random.default_rng(1).permutation(2 * T // PAGE)[:T // PAGE].astype(np.int32)
    pools = [jnp.full_like(pool, jnp.nan) for pool in make_pool(2 * T // PAGE, PAGE, G, K, dtype)]
    slots = (pages[np.arange(T) // PAGE] * PAGE + np.arange(T) % PAGE).astype(np.int32)
    pools = tuple(pool.at[:, slots // PAGE, slots % PAGE].set(jnp.swapaxes(new, 0, 1))
                  for pool, new in zip(pools, (k, v), strict=True))
    zeros = np.zeros(len(pages), np.int32)
    work = WorkList(zeros, pages, (np.arange(len(pages)) * PAGE).astype(np.int32), np.int32(len(pages)))
    none = WorkList(zeros[:1], zeros[:1], zeros[:1], np.int32(0))
    context = PagedContext(np.array([T - 1], np.int32), slots[-1:], work, none, 1, 8)
    out, _ = jax.jit(attention)(q[None, -1:], k[None, -1:], v[None, -1:], context, pools)
    return np.asarray(out[0], np.float64)


def main() -> int:
    """Prints a table; returns the exit status."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n{'path':>8} {'dtype':>9} {'relative error':>15}")
    worst = True
    for dtype, allowed in ALLOWED.items():
        arrays = [jnp.asarray(np.random.default_rng(i).normal(size=(T, h, K)), dtype) for i, h in enumerate((H, G, G))]
        expected = reference(*(np.asarray(a, np.float64) for a in arrays))
        dense = np.asarray(jax.jit(attention)(*(a[None] for a in arrays), DenseContext())[0][0], np.float64)
        for path, got, want in (("dense", dense, expected), ("paged", paged(*arrays, dtype), expected[-1:])):
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            worst &= bool(error <= allowed)
            print(f"{path:>8} {dtype:>9} {error:15.2e}{'' if error <= allowed else f'  over {allowed}'}")
    return 0 if worst else 1


if __name__ == "__main__":
    sys.exit(main())
