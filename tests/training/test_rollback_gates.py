"""Rollbacks and gates together: what was judged of checkpoints that a rollback gave up decides nothing."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from experiments import promote
from llm_jax import runs
from llm_jax.checkpoints import Checkpoints
from llm_jax.training import evaluator
from llm_jax.training.gates import GateConfig
from tests.training.test_loop import saved_arrays
from tests.training.test_recovery import BACK, poison, train

OPTIONS = dict(num_steps=9, eval_every=2, gates=GateConfig(keep_best=True, patience=3, max_rise=0.5))
JUDGED = ("evaluations", "best", "gate", "stopped_early", "finished_steps")


def judged(run_dir: pathlib.Path) -> dict:
    manifest = json.loads((run_dir / "manifest.json").read_text())
    return {name: manifest[name] for name in JUDGED} | {"end": manifest["metrics"].get("end")}


def kept(run_dir: pathlib.Path) -> list[int]:
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.steps()


@pytest.fixture(scope="module")
def without_4_to_7(data_dir, tmp_path_factory):
    """A run whose data never had the batches 4 to 7."""
    run_dir = tmp_path_factory.mktemp("without") / "run"
    with pytest.MonkeyPatch.context() as patch:
        used = poison(patch, leave_out=(4, 5, 6, 7))
        train(run_dir, data_dir, BACK, **OPTIONS)
    assert used == [0, 1, 2, 3, 8, 9, 10, 11, 12]
    return run_dir


def praised(monkeypatch: pytest.MonkeyPatch, number: int) -> list[float]:
    """The evaluation of this number, from 0, is better than any that can come; returns the list of all losses."""
    real, seen = evaluator.Evaluator.evaluate, []

    def evaluate(self, *arguments, **options):
        figures = real(self, *arguments, **options)
        figures["loss"] -= 3 * (len(seen) == number)
        seen.append(figures["loss"])
        return figures

    monkeypatch.setattr(evaluator.Evaluator, "evaluate", evaluate)
    return seen


def go_on_to_the_end(run_dir: pathlib.Path, data_dir: str, monkeypatch: pytest.MonkeyPatch,
                     without: pathlib.Path) -> None:
    """A new process finishes the run, and all is as if the batches had never been."""
    monkeypatch.undo()
    used = poison(monkeypatch, 7)
    train(run_dir, data_dir, BACK, **OPTIONS)
    assert used[-4:] == [9, 10, 11, 12] and set(used) <= set(range(8, 13))
    found, expected = saved_arrays(run_dir), saved_arrays(without)
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert judged(run_dir) == judged(without) and kept(run_dir) == kept(without)


def test_a_given_up_checkpoint_neither_passes_nor_fails_others(data_dir, tmp_path, monkeypatch, without_4_to_7):
    run_dir, target = tmp_path / "run", tmp_path / "served"
    seen = praised(monkeypatch, 3)  # of steps 0, 2, 4, 6: that of step 6, which is given up
    used = poison(monkeypatch, 7, fail_at=9)
    with pytest.raises(KeyboardInterrupt):
        train(run_dir, data_dir, BACK, **OPTIONS)
    assert used == [*range(8), 8] and len(seen) == 4 and seen[3] < min(seen[:3]) - 1
    assert kept(run_dir) == [2, 3, 4]
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert [evaluation["step"] for evaluation in manifest["evaluations"]] == [0, 2, 4]
    assert manifest["best"]["step"] == 4 and manifest["gate"]["good_step"] == 4
    assert promote.main([f"--run_dir={run_dir}", f"--to={target}"]) == 0
    assert runs.load(target).manifest["promoted"]["step"] == 4

    go_on_to_the_end(run_dir, data_dir, monkeypatch, without_4_to_7)
    assert judged(run_dir)["gate"]["passed_steps"] == [2, 4, 6, 8, 9]
    assert promote.main([f"--run_dir={run_dir}", f"--to={target}"]) == 0
    assert runs.load(target).manifest["promoted"]["step"] == 9


def test_nor_if_the_process_is_killed_in_the_middle_of_going_back(data_dir, tmp_path, monkeypatch, without_4_to_7):
    run_dir = tmp_path / "run"
    praised(monkeypatch, 3)
    poison(monkeypatch, 7)

    def killed(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        train(run_dir, data_dir, BACK, **OPTIONS)
    assert kept(run_dir) == [2, 3, 4, 6], "the one of step 6 is given up"
    go_on_to_the_end(run_dir, data_dir, monkeypatch, without_4_to_7)
