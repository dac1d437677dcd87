"""Two processes that talk over the loopback interface train what one process trains."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.parallel import distributed
from llm_jax.training import loop
from llm_jax.training.optimizer import OptimizerConfig
from tests import peers
from tests.training.common import prepare_tiny, settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = dict(num_steps=4, log_every=2, eval_batches=1)
# The optimizer of the other runs of these tests, so that this process has its programs in the compile cache.
OPTIMIZER = dict(peak_learning_rate=1e-2, warmup_steps=4, decay_steps=20)


def test_alone_nothing_is_started(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "LLM_JAX_DISTRIBUTED"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.initialize() is False and distributed.is_lead()


@pytest.mark.parametrize("rest", [{}, {"JAX_NUM_PROCESSES": "2"}, {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}])
def test_half_an_address_is_refused(monkeypatch, rest):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for name, value in rest.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="needs JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        distributed.initialize()


def test_two_processes_train_what_one_does(tmp_path):
    data_dir = prepare_tiny(tmp_path)
    command = [sys.executable, "-m", "tests.training.train_once", str(tmp_path / "two"), data_dir, "mesh={'data': 2}",
               f"optimizer={OPTIMIZER!r}", *(f"{name}={value}" for name, value in STEPS.items())]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
                 for environment in peers.environments(2)]
    one = loop.train(**settings(tmp_path / "one", data_dir, optimizer=OptimizerConfig(**OPTIMIZER), **STEPS))
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "validation loss" in said[0] and "validation loss" not in said[1], "one process reports, and one alone"
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["processes"] == 2 and manifest["finished_steps"] == 4
    np.testing.assert_allclose(manifest["metrics"]["end"]["loss"], one["end"]["loss"], rtol=1e-5)
    assert manifest["metrics"]["trained_tokens"] == one["trained_tokens"]
