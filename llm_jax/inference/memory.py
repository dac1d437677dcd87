"""How much memory there is, and how many pages fit in it."""

from __future__ import annotations

import pathlib
import sys

import jax
import psutil

from llm_jax.errors import UserError
from llm_jax.kernels.backends import make_pool
from llm_jax.models import ModelConfig

# Of what is free: the rest is for activations, the runtime's own buffers and, on a CPU, for everybody else.
CPU_SHARE = 0.5
DEVICE_SHARE = 0.9


def free_bytes(device: jax.Device | None = None) -> int:
    """Bytes that may be given to weights and pages on `device` (default: the first)."""
    device = device or jax.local_devices()[0]
    if device.platform == "cpu":
        return int(CPU_SHARE * min(psutil.virtual_memory().available, _container_bytes()))
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return sys.maxsize  # the backend does not say: what does not fit fails when it is allocated
    return int(DEVICE_SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))


def _container_bytes(folder: pathlib.Path = pathlib.Path("/sys/fs/cgroup")) -> int:
    """What the container's limit leaves (cgroup v2); unlimited where there is none."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return sys.maxsize
    return max(int(limit) - used, 0) if limit.isdigit() else sys.maxsize


def page_bytes(config: ModelConfig, page_size: int, dtype: str, backend: str = "xla") -> int:
    """Bytes of one page: what every layer keeps of `page_size` tokens, scales and padding included."""
    pools = jax.eval_shape(lambda: make_pool(1, page_size, config.cache_widths(), dtype, backend))
    one = sum(pool.size * pool.dtype.itemsize for pool in pools) // 2  # beside it is the spare one
    return config.num_layers * one


def check_weights_fit(config: ModelConfig, itemsize: int, available: int) -> None:
    """UserError if the weights alone exceed `available` bytes; asked before they are read."""
    need = config.num_params() * itemsize
    if need > available:
        raise UserError(f"the model does not fit: its {config.num_params():,} weights need {_gib(need)}, "
                        f"{_gib(available)} are free for it")


def plan_pages(config: ModelConfig, *, page_size: int, dtype: str, max_context: int, max_rows: int, available: int,
               requested: int | None = None, backend: str = "xla", devices: int = 1, beside: int = 0) -> int:
    """Pages to allocate.

    Args:
      config: the model.
      page_size: tokens of a page.
      dtype: of the cache.
      max_context: longest context served, tokens; a pool always holds one such sequence.
      max_rows: rows of a step; more pages than all of them at full length need are never allocated.
      available: bytes for pages.
      requested: the user's number, if there is one.
      backend: see `PagedContext.backend`.
      devices: how many share each page; `available` is of one of them.
      beside: bytes that a draft model's cache takes for each page.
    Returns:
      the number of pages.
    Raises:
      UserError: one sequence of `max_context` tokens does not fit, or `requested` does not.
    """
    size = -(-page_bytes(config, page_size, dtype, backend) // devices) + beside
    least = -(-max_context // page_size)
    fit = available // size
    if requested is not None and requested < least:
        raise UserError(f"num_pages={requested} holds {requested * page_size} tokens; a context of {max_context} "
                        f"needs {least} pages of {page_size}")
    wanted = requested if requested is not None else least
    if fit < wanted:
        raise UserError(f"the cache does not fit: {wanted} pages of {page_size} tokens need {_gib(wanted * size)}, "
                        f"{_gib(available)} are free for it; lower max_context, num_pages or page_size")
    return requested if requested is not None else min(fit, least * max_rows)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
