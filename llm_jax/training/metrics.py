"""Figures of a run: the share of the hardware's peak that it uses, memory, durations as people read them."""

from __future__ import annotations

import math
import re

import jax

# Dense bfloat16 peak of one JAX device, FLOP/s, by the first words of `jax.Device.device_kind` (longest match wins). A
# device is a chip, but for TPU v2 and v3 (one of a chip's two cores) and TPU7x (one of its two chiplets). Sources: the
# Google Cloud TPU system pages and NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device in bfloat16, or None where it isn't known (every CPU)."""
    matches = [name for name in PEAK_FLOPS if re.match(rf"{re.escape(name)}\b", device_kind)]  # \b: an L40 is no L4
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def model_flops_utilisation(tokens_per_second: float, flops_per_token: float, device_kind: str,
                            num_devices: int) -> float | None:
    """The share of the devices' peak that the model's own arithmetic uses (Chowdhery et al. 2022, appendix B).

    What remat computes a second time doesn't count. None where the peak isn't known.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * num_devices)


def memory_in_use() -> dict[str, float]:
    """GiB in use: `device` (the process's fullest, where the backend says) and `host` (the process's resident set)."""
    result = {}
    used = [stats.get("bytes_in_use", 0) for d in jax.local_devices() if (stats := d.memory_stats())]
    if used:
        result["device"] = max(used) / 2**30
    try:
        import psutil

        result["host"] = psutil.Process().memory_info().rss / 2**30
    except ImportError:
        pass
    return result


def clock(seconds: float) -> str:
    """A duration as a person reads it: 42s, 3m05s, 2h07m."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(int(round(seconds)), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
