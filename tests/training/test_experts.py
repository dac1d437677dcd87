"""A mixture of experts trains as any other model does, and says how its routers spread the tokens."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from llm_jax import models, runs
from llm_jax.errors import UserError
from llm_jax.models import Execution, Experts
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.training import loop
from llm_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
from llm_jax.training.reporter import Reporter
from llm_jax.training.state import state_shardings
from llm_jax.training.step import make_train_step
from tests.training.common import MODEL, settings
from tests.training.test_loop import saved_arrays
from tests.training.test_reporter import STEP

MIXTURE = dataclasses.replace(MODEL, mlp_pattern=("dense", "experts"), experts=Experts(
    8, 2, 16, scoring="sigmoid", selection_bias=True, shared_dim=8, balance_weight=0.1))
OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=2, selection_bias_rate=0.01)


def run_settings(run_dir, data_dir, **changes):
    usual = {"model": MIXTURE, "optimizer": OPTIMIZER, "num_steps": 12, "log_every": 3, "checkpoint_every": 6,
             "execution": Execution(expert_capacity=1.5)}
    return settings(run_dir, data_dir, **{**usual, **changes})


@pytest.fixture(scope="module")
def straight(data_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("mixture") / "run"
    return run_dir, loop.train(**run_settings(run_dir, data_dir))


def lines(run_dir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_logs_the_load(straight):
    run_dir, metrics = straight
    assert metrics["end"]["loss"] < metrics["start"]["loss"] - 0.3
    rows = [row for row in lines(run_dir) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    for row in rows:
        load = np.array(row["router_load"])
        assert load.shape == (1, 8), "the layers of experts, and theirs"
        np.testing.assert_allclose(load.mean(), 1.0, atol=1e-3)
        np.testing.assert_allclose([row["router_most"], row["router_least"]], [load.max(), load.min()], atol=1e-3)
        assert row["router_least"] < 1 < row["router_most"] and row["balance_loss"] > 1.9
        assert 0 < row["router_dropped"] < 1
    run = runs.load(run_dir)
    logits = run.model.apply({"params": run.params}, np.array([run.tokenizer.encode("import json")], np.int32))
    assert np.isfinite(logits).all()


def test_selection_biases_move_by_the_rate_each_step_and_by_nothing_else(straight):
    bias = models.unstack(runs.load(straight[0]).params, MIXTURE)["layers_1"]["experts"]["selection_bias"]
    assert np.any(bias)
    np.testing.assert_allclose(bias / 0.01, np.round(bias / 0.01), atol=1e-3)
    assert np.abs(bias).max() <= 12 * 0.01 + 1e-6


def test_a_run_resumes_with_the_same_bits(straight, data_dir, tmp_path):
    """From its checkpoint of step 6, as if it had been killed after it."""
    run_dir = tmp_path / "run"
    shutil.copytree(straight[0], run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "12")
    runs.update_manifest(run_dir, finished_steps=0)
    assert loop.train(**run_settings(run_dir, data_dir))["end"] == straight[1]["end"]
    one, other = saved_arrays(straight[0]), saved_arrays(run_dir)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_run_is_not_continued_with_another_capacity(straight, data_dir):
    with pytest.raises(UserError, match=re.escape("expert_capacity was 1.5 and is None")):
        loop.train(**run_settings(straight[0], data_dir, execution=Execution()))


def test_matrices_of_experts_decay_and_their_bias_does_not():
    mask = decay_mask(models.logical_axes(models.Decoder(MIXTURE)))
    found = [tree["experts"] for tree in jax.tree.leaves(mask, is_leaf=lambda t: isinstance(t, dict) and "experts" in t)
             if isinstance(tree, dict)]
    assert found
    for experts in found:
        assert experts.pop("selection_bias") is False
        assert all(jax.tree.leaves(experts))


def test_the_rate_needs_a_bias_to_move():
    model, optimizer, mesh = models.Decoder(MODEL), make_optimizer(OPTIMIZER, 4), make_mesh(MeshConfig())
    with pytest.raises(UserError, match=r"selection_bias_rate=0.01 moves the selection biases .* the model has none"):
        make_train_step(model, optimizer, learning_rate_schedule(OPTIMIZER, 4), mesh,
                        state_shardings(model, optimizer, mesh), selection_bias_rate=0.01)


def test_biases_move_towards_an_even_load_in_every_layout():
    c = dataclasses.replace(MIXTURE, num_layers=5, mlp_pattern=("dense", "experts", "experts", "dense", "experts"))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), models.abstract_params(models.build(c)))
    assigned = np.array([[8, 0, 4, 4, 4, 4, 4, 4], [4] * 8, [0, 8, 4, 4, 4, 4, 4, 4]], np.float32)
    moved = models.unstack(models.move_selection_biases(params, assigned, c, 0.5), c)
    expected = [[-0.5, 0.5] + [0] * 6, [0] * 8, [0.5, -0.5] + [0] * 6]
    got = [moved[f"layers_{i}"]["experts"].pop("selection_bias") for i in (1, 2, 4)]
    np.testing.assert_array_equal(got, expected)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(moved)), "nothing else is moved"


def test_the_line_shows_the_range_of_loads_and_what_was_dropped(tmp_path, capsys):
    reporter = Reporter(tmp_path, 2, 0, flops_per_token=1.0, num_devices=1)
    router = {"balance_loss": 2.1, "router_most": 1.75, "router_least": 0.25, "router_dropped": 0.0}
    table = np.array([[0.25, 1.75, 1.0, 1.0]])
    reporter.step(1, STEP)
    reporter.interval(1, STEP | router | {"router_load": table})
    reporter.interval(2, STEP | router | {"router_load": table, "router_dropped": 0.031})
    reporter.close()
    first, second = capsys.readouterr().err.splitlines()
    assert "experts 0.25–1.75  " in first and "experts 0.25–1.75 dropped 3.1%" in second
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["router_load"] == table.tolist() and row["router_most"] == 1.75
