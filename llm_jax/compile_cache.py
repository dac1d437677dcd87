"""JAX's persistent compile cache, in the user's cache directory and never in a run directory."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
from typing import Any

import jax

from llm_jax import storage


def enable_compile_cache() -> pathlib.Path | None:
    """Keeps compiled programs across processes, so that a second start of the same thing takes no compile.

    A cache that the user set up (`JAX_COMPILATION_CACHE_DIR`) is left as it is. The directory's name holds the kind of
    processor, because XLA's CPU programs don't run on every machine that may share a home directory.

    Returns:
      The cache's directory, or None where none can be written; that costs time and nothing else.
    """
    config: Any = jax.config  # its options are attributes that type checkers don't see
    if chosen := config.jax_compilation_cache_dir:
        return pathlib.Path(chosen)
    try:
        directory = storage.cache_dir() / "xla" / _processor()
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError:  # a read-only or missing home
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return directory


def _processor() -> str:
    facts = platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        facts += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        facts += platform.processor()
    return hashlib.sha256(facts.encode()).hexdigest()[:12]
