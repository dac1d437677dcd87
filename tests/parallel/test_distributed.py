"""Two and four processes that talk over the loopback interface train what one process trains."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.parallel import distributed
from llm_jax.training import loop, trainer
from llm_jax.training.optimizer import OptimizerConfig
from tests import peers
from tests.parallel.test_elastic import rows_of
from tests.training.common import prepare_tiny, settings
from tests.training.launch import Launched
from tests.training.test_loop import saved_arrays
from tests.training.train_once import recording

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


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process: (the folder of its data, its run directory, what `train` returned)."""
    folder = tmp_path_factory.mktemp("one")
    data_dir = prepare_tiny(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "TrainLoader", recording(folder / "batches"))
        metrics = loop.train(**settings(folder / "run", data_dir, optimizer=OptimizerConfig(**OPTIMIZER), **STEPS))
    return data_dir, folder / "run", metrics


def check_same(run_dir, processes, one):
    """Of a run that ended: it is that of one process."""
    _, one_dir, metrics = one
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["processes"] == processes and manifest["finished_steps"] == 4
    np.testing.assert_allclose(manifest["metrics"]["end"]["loss"], metrics["end"]["loss"], rtol=1e-5)
    assert manifest["metrics"]["trained_tokens"] == metrics["trained_tokens"]
    found, expected = saved_arrays(run_dir), saved_arrays(one_dir)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-5 * np.abs(array).max(), rtol=0, err_msg=name)


def test_two_processes_train_what_one_does(one, tmp_path):
    command = [sys.executable, "-m", "tests.training.train_once", str(tmp_path / "two"), one[0], "mesh={'data': 2}",
               f"optimizer={OPTIMIZER!r}", *(f"{name}={value}" for name, value in STEPS.items())]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
                 for environment in peers.environments(2)]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "validation loss" in said[0] and "validation loss" not in said[1], "one process reports, and one alone"
    check_same(tmp_path / "two", 2, one)


def test_so_do_four_that_share_the_parameters(one, tmp_path):
    """Along one axis, so that all is sent among all four, who meet once at the start: gloo waits 30 s for the others
    wherever a group of devices is a new one, and one that has to compile may come later than that."""
    four = [Launched(tmp_path / f"log{index}", tmp_path / "four", one[0], environment, optimizer=OPTIMIZER,
                     mesh={"fsdp": 4}, batches=str(tmp_path / f"of-{index}"), **STEPS)
            for index, environment in enumerate(peers.environments(4))]
    assert [process.join(300) for process in four] == [0] * 4, [process.said for process in four]
    assert ["validation loss" in process.said for process in four] == [True, False, False, False]
    check_same(tmp_path / "four", 4, one)
    assert rows_of(*(tmp_path / f"of-{index}" for index in range(4))) == rows_of(one[1].parent / "batches")
