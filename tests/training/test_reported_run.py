"""A run that reports all there is to report: what TensorBoard and xprof are given, and what goes on after a stop."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from jax.profiler import ProfileData

from llm_jax.checkpoints import Checkpoints
from llm_jax.training import loop, trainer
from llm_jax.training.gates import GateConfig
from llm_jax.training.metric_log import read_rows
from llm_jax.training.reporter import ReportConfig
from llm_jax.training.signals import TrainingStopped
from tests.training.common import settings
from tests.training.test_gates import OPTIMIZER
from tests.training.test_reporter import events, scalars

STEPS = 12


class StopsAt(trainer.TrainLoader):
    """Asks the process to stop when the batch of step 7 is made."""

    def __next__(self):
        if self.state == 6:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return super().__next__()


@pytest.fixture(scope="module")
def reported(data_dir, tmp_path_factory):
    """Twelve steps, stopped in the middle: (logs, rows, said before the stop)."""
    run_dir = tmp_path_factory.mktemp("reported") / "run"
    report = ReportConfig(histograms_every=5, attention_maps_every=5, layers=(-1,), profile_steps=(9, 10))
    arguments = settings(run_dir, data_dir, optimizer=OPTIMIZER, num_steps=STEPS, log_every=2, eval_every=6,
                         checkpoint_every=6, report=report, gates=GateConfig(keep_best=True))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingStopped):
        patch.setattr(trainer, "TrainLoader", StopsAt)
        loop.train(**arguments)
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        saved = json.loads((run_dir / "checkpoints" / str(step) / "extra" / "metadata").read_text())
    metrics = loop.train(**arguments)
    return pathlib.Path(run_dir) / "logs", read_rows(pathlib.Path(run_dir) / "logs"), saved, metrics


def test_goodput_sums_to_one_and_goes_on_after_a_stop(reported):
    _, rows, saved, metrics = reported
    train = [row for row in rows if row["kind"] == "train"]
    for row in train:
        np.testing.assert_allclose(sum(row["goodput"].values()), 1)
    walls = [row["wall_seconds"] for row in train]
    assert walls == sorted(walls)
    before, after = train[2], train[-1]  # of steps 6 and 12, by the two processes
    for category in ("compile", "step", "other"):
        assert (after["goodput"][category] * after["wall_seconds"] >=
                before["goodput"][category] * before["wall_seconds"] - 1e-9)
    assert after["goodput"]["lost"] == 0 and after["goodput"]["evaluation"] > 0 and after["goodput"]["checkpoint"] > 0
    assert sum(saved["goodput_seconds"].values()) <= after["wall_seconds"]
    np.testing.assert_allclose(sum(metrics["goodput"].values()), 1)
    assert metrics["wall_seconds"] >= after["wall_seconds"]


def test_tensorboard_has_every_figure(reported):
    logs, rows, _, _ = reported
    tags = scalars(logs)
    for tag in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "data_wait", "memory_host_gib",
                "goodput/step", "goodput/compile", "goodput/data", "goodput/checkpoint", "goodput/evaluation",
                "gradient_norm/attention/00", "gradient_norm/mlp/01", "gradient_norm/embed", "update_ratio/mlp/01"):
        assert [step for step, _ in tags[f"train/{tag}"]][-1] == STEPS, tag
    row = next(row for row in rows if row["kind"] == "train" and row["step"] == STEPS)
    assert tags["train/update_ratio/mlp/01"][-1][1] == pytest.approx(row["update_ratio"]["mlp"][1], rel=1e-5)
    assert 1e-4 < row["update_ratio"]["attention"][0] < 1e-1
    parts = [value for part in row["gradient_norm"].values() for value in (part if isinstance(part, list) else [part])]
    np.testing.assert_allclose(np.sqrt(np.sum(np.square(parts))), row["grad_norm"], rtol=1e-4)


def test_histograms_and_pictures_are_of_the_chosen_layer_and_steps(reported):
    logs = reported[0]
    found: dict[str, list[int]] = {}
    for event in events(logs):
        for value in event.summary.value:
            if value.HasField("histo") or value.HasField("image"):
                found.setdefault(value.tag, []).append(event.step)
    assert found["gradients/01/attention/q"] == found["parameters/unembed"] == found["attention/01"] == [5, 10]
    assert not any("/00" in tag for tag in found)
    pictures = sorted(path.name for path in (logs / "attention").glob("*.png"))
    assert pictures == ["step_05_layer_01.png", "step_10_layer_01.png"]
    tokens = json.loads((logs / "attention" / "tokens.json").read_text())["token_ids"]
    assert len(tokens) == 48


def test_a_profile_has_the_steps_that_were_asked_for(reported):
    [path] = (reported[0] / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert path.stat().st_size > 1000
    names = [(event.name, dict(event.stats)) for plane in ProfileData.from_file(str(path)).planes
             for line in plane.lines for event in line.events]
    assert sorted(stats["step_num"] for name, stats in names if name == "train") == [9, 10]
