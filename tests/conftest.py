"""What every test needs: JAX on the CPU with eight virtual devices, and one compile cache for all runs of the suite."""

from __future__ import annotations

import os
import pathlib

from absl import flags

# Before anything imports JAX. Scripts that tests start inherit these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Tests compile much and compute little: without LLVM's optimisation they take a quarter less processor time.
# What XLA itself does to a program, its fusions and layouts, stays.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "llm_jax" / "test-compiles"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# Grain's worker processes read absl's flags, which pytest does not parse.
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
