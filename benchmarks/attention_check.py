"""Attention on this machine's own device against float64 NumPy: dense, paged in plain XLA, and paged by the Triton
kernel (interpreted where there is no GPU); float32 and bfloat16, with a window, a soft cap and a latent cache. Then
attention of training, output and gradients, by every backend that the device takes, against dense in float32.

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

from llm_jax.errors import UserError
from llm_jax.kernels import paged_triton
from llm_jax.kernels.attention import BACKENDS, DenseContext, attention, choose, dense_attention
from llm_jax.kernels.attention_call import Call
from llm_jax.kernels.paged import PagedContext, WorkList, make_pool, put_pages
from llm_jax.kernels.quantized_cache import to_bits, worst_like

ALLOWED = {"float32": 5e-3, "bfloat16": 2e-2}  # relative, whole tensor; float32 products may be tf32 on a GPU
T, H, PAGE = 256, 8, 16
CHUNK = 72  # tokens of the prefilling row; more queries than one program of the kernel takes
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {  # (heads, width of keys, of values), options
    "plain": ((2, 64, 64), {}),
    "window": ((2, 64, 64), {"window": 100, "soft_cap": 5.0}),
    "80 wide": ((4, 80, 80), {}),
    "latent": ((1, 80, 0), {"value_dim": 64}),
}
# Of training: (heads of keys, width of keys, of values), documents a row, options; rows of 1,100 tokens.
TRAIN_T = 1100
TRAIN: dict[str, tuple[tuple[int, int, int], int, dict[str, Any]]] = {
    "one document": ((2, 64, 64), 0, {}),
    "window": ((8, 128, 128), 0, {"window": 300}),
    "packed": ((2, 128, 128), 5, {}),
    "packed, all": ((4, 80, 48), 5, {"window": 300, "soft_cap": 5.0}),
    "both ways": ((2, 64, 64), 5, {"causal": False}),
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


def scattered(k: jax.Array, v: jax.Array | None, widths: tuple[int, int, int], dtype: str,
              backend: str) -> tuple[np.ndarray, np.ndarray, tuple[jax.Array, ...]]:
    """Pages of a sequence's T tokens, the slot of each token, and pools that hold them; pages of nobody hold NaN."""
    pages = np.random.default_rng(1).permutation(2 * T // PAGE)[:T // PAGE].astype(np.int32)
    slots = (pages[np.arange(T) // PAGE] * PAGE + np.arange(T) % PAGE).astype(np.int32)
    pools = tuple(worst_like(pool) for pool in make_pool(2 * T // PAGE, PAGE, widths, dtype, backend))
    contents = tuple(jnp.swapaxes(new.reshape(T // PAGE, PAGE, *new.shape[1:]), 1, 2)
                     for new in ((k,) if v is None else (k, v)))
    contents = contents if backend == "triton" else tuple(map(to_bits, contents))  # as `make_pool` says
    return pages, slots, put_pages(pools, pages, contents, backend)


def xla(q: jax.Array, k: jax.Array, v: jax.Array | None, widths: tuple[int, int, int], options: dict[str, Any],
        dtype: str) -> np.ndarray:
    """The last position, by work lists."""
    pages, slots, pools = scattered(k, v, widths, dtype, "xla")
    first = max(0, T - options.get("window", T)) // PAGE
    read = np.arange(first, T // PAGE, dtype=np.int32)
    work = WorkList(np.zeros_like(read), pages[first:], read * PAGE, np.int32(len(read)))
    lists = {"decode_local" if "window" in options else "decode": work}
    context = PagedContext(np.array([T - 1], np.int32), slots[-1:], 1, 8, **lists)
    out, _ = jax.jit(functools.partial(attention, **options))(
        q[None, -1:], k[None, -1:], None if v is None else v[None, -1:], context, pools)
    return np.asarray(out[0], np.float64)


def triton(q: jax.Array, k: jax.Array, v: jax.Array, widths: tuple[int, int, int], options: dict[str, Any],
           dtype: str) -> np.ndarray:
    """The last position of a decoding row, then the last CHUNK of a prefilling row, of one and the same sequence."""
    pages, slots, pools = scattered(k, v, widths, dtype, "triton")
    at = np.concatenate([[T - 1], np.arange(T - CHUNK, T)]).astype(np.int32)
    context = PagedContext(at, slots[at], 1, CHUNK, table_RP=np.stack([pages, pages]),
                           length_R=np.full(2, T, np.int32), backend="triton")
    interpret = jax.default_backend() != "gpu"
    out, _ = jax.jit(functools.partial(paged_triton.attend, interpret=interpret, **options))(
        q[None, at], k[None, at], v[None, at], context, pools)
    return np.asarray(out[0], np.float64)


def train() -> bool:
    """Prints a table of the largest error of outputs and gradients; whether all are small enough."""
    right = True
    print(f"\n{'training':>12} {'path':>8} {'dtype':>9} {'output':>9} {'dq':>9} {'dk':>9} {'dv':>9}")
    for case, ((heads, width, value_width), documents, options) in TRAIN.items():
        options = {"scale": width**-0.5, **options}
        causal = options.pop("causal", True)
        ids = jnp.tile(1 + jnp.arange(TRAIN_T) * documents // TRAIN_T, (2, 1)) if documents else None
        shapes = (H, width), (heads, width), (heads, value_width), (H, value_width)
        for dtype, allowed in ALLOWED.items():
            arrays = tuple(jnp.asarray(np.random.default_rng(i).normal(size=(2, TRAIN_T, *s)), dtype)
                           for i, s in enumerate(shapes))

            def results(backend: str, arrays: tuple, causal: bool = causal, ids: Any = ids,
                        options: Any = options) -> list[np.ndarray]:
                def both(q: Any, k: Any, v: Any, dout: Any) -> Any:
                    context = DenseContext(ids, causal=causal, backend=backend)
                    out, transpose = jax.vjp(functools.partial(dense_attention, context=context, **options), q, k, v)
                    return out, *transpose(dout)

                return [np.asarray(x, np.float64) for x in jax.jit(both)(*arrays)]

            call = Call(TRAIN_T, TRAIN_T, H, heads, width, value_width, dtype, causal, options.get("window"),
                        options.get("soft_cap"), segments=ids is not None)
            with jax.default_matmul_precision("highest"):
                expected = results("dense", tuple(x.astype(jnp.float32) for x in arrays))
            for backend in BACKENDS[1:]:
                try:
                    choose(call, backend)
                except UserError:
                    continue
                errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b))
                          for a, b in zip(results(backend, arrays), expected, strict=True)]
                right &= max(errors) <= allowed
                print(f"{case:>12} {backend:>8} {dtype:>9} {' '.join(f'{error:9.2e}' for error in errors)}"
                      f"{'' if max(errors) <= allowed else f'  over {allowed}'}")
    return right


def main() -> int:
    """Prints tables; returns the exit status."""
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
            widths = heads, key_width, value_width
            results = {"dense": (out, expected), "xla": (xla(q, k, v, widths, options, dtype), expected[-1:])}
            if v is not None and paged_triton.supports(widths, H, dtype) is None:
                results["triton"] = (triton(q, k, v, widths, options, dtype),
                                     np.concatenate([expected[-1:], expected[-CHUNK:]]))
            for path, (got, want) in results.items():
                error = np.linalg.norm(got - want) / np.linalg.norm(want)
                right &= bool(error <= allowed)
                print(f"{case:>8} {path:>6} {dtype:>9} {error:15.2e}{'' if error <= allowed else f'  over {allowed}'}")
    return 0 if train() and right else 1


if __name__ == "__main__":
    sys.exit(main())
