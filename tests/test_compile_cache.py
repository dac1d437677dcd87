from __future__ import annotations

import pathlib
import subprocess
import sys

import jax
import pytest

from llm_jax import compile_cache

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = """
import time, jax, jax.monitoring
from llm_jax import compile_cache
print(compile_cache.enable_compile_cache())
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.jit(lambda x: (x * 2 + 1).sum())(jax.numpy.ones(1000)).block_until_ready()
print(sum("cache_hit" in event for event in hits))
"""


@pytest.fixture
def unset(monkeypatch):
    """JAX as a user has it: without the cache that the test suite set up."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
             "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_home_that_cannot_be_written_costs_the_cache_and_nothing_else(unset, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_cache.enable_compile_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_the_user_chose_is_kept(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compile_cache.enable_compile_cache() == tmp_path


def test_a_second_process_compiles_nothing(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    said = [subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True,
                           check=True).stdout.split() for _ in range(2)]
    assert all(pathlib.Path(directory).is_relative_to(tmp_path / ".cache" / "llm_jax" / "xla") for directory, _ in said)
    assert said[0][1] == "0" and int(said[1][1]) > 0
