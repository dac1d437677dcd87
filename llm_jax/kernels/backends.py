"""Which implementation of paged attention runs: XLA's everywhere, Pallas kernels on GPUs and TPUs."""

from __future__ import annotations

from typing import Any

import jax

from llm_jax.kernels import paged, paged_xla
from llm_jax.kernels.paged import PagedContext

Array = jax.Array


def choose_backend(widths: tuple[int, int, int], num_heads: int, dtype: str, rows: int, pages_per_row: int) -> str:
    """The `PagedContext.backend` for this machine's devices.

    Args:
      widths: as of `ModelConfig.cache_widths`.
      num_heads: of the queries.
      dtype: of the cache.
      rows, pages_per_row: the size of a step's table of pages.
    """
    # Imported where they are chosen: Pallas takes a second, which a laptop need not wait.
    platform = jax.default_backend()
    if platform == "tpu":
        from llm_jax.kernels import paged_tpu

        return "xla" if paged_tpu.supports(
            widths, num_heads, dtype, rows=rows, pages_per_row=pages_per_row) else "tpu"
    if platform == "gpu" and "NVIDIA" in jax.devices()[0].device_kind:
        from llm_jax.kernels import paged_triton

        return "xla" if paged_triton.supports(widths, num_heads, dtype) else "triton"
    return "xla"


def make_pool(num_pages: int, page_size: int, widths: tuple[int, int, int], dtype: str,
              backend: str = "xla") -> tuple[Array, ...]:
    """Empty pools of one layer, in a backend's layout: see `paged.make_pool` and `paged_tpu.make_pool_tpu`."""
    if backend == "tpu":
        from llm_jax.kernels import paged_tpu

        return paged_tpu.make_pool_tpu(num_pages, page_size, widths, dtype)
    return paged.make_pool(num_pages, page_size, widths, dtype, backend)


def make_pools(num_layers: int, *layer: Any) -> list[tuple[Array, ...]]:
    """The pools of all layers; other arguments as of `make_pool`."""
    return [make_pool(*layer) for _ in range(num_layers)]


def paged_attention(q_BTHK: Array, k_BTGK: Array, v_BTGV: Array | None, context: PagedContext,
                    cache: tuple[Array, ...], **options: Any) -> tuple[Array, tuple[Array, ...]]:
    """Writes the step's keys and values to their slots, then attends; see `attention.attention` (B = 1, T = S = N)."""
    if context.backend == "tpu":
        from llm_jax.kernels import paged_tpu

        return paged_tpu.attend(q_BTHK, k_BTGK, v_BTGV, context, cache, **options)
    if context.backend == "triton":
        from llm_jax.kernels import paged_triton

        return paged_triton.attend(q_BTHK, k_BTGK, v_BTGV, context, cache, **options)
    return paged_xla.attend(q_BTHK, k_BTGK, v_BTGV, context, cache, **options)
