"""A grid of runs: what its points are, what happens when some fail, and that it goes on where it stopped."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

from experiments import sweep, train
from llm_jax.errors import UserError

# Stands for experiments.train: fails for SEED=1, else leaves a manifest and counts how often it ran.
TRAIN = """
import json, pathlib, sys
flags = dict(a.removeprefix("--gin.").split("=", 1) for a in sys.argv[1:])
run = pathlib.Path(eval(flags["RUN_DIR"]))
run.mkdir(exist_ok=True)
(run / "runs").open("a").write("x")
if flags["SEED"] == "1":
    print("noise")
    print("error: a loss that is not finite\\na warning of something else", file=sys.stderr)
    sys.exit(1)
loss = float(flags["RATE"]) * 100
(run / "manifest.json").write_text(json.dumps({
    "num_steps": 10, "finished_steps": 10, "metrics": {"end": {"loss": loss, "bits_per_byte": 2.0}},
    "evaluations": [{"step": 0, "loss": 1e-9}, {"step": 5, "loss": loss - 0.5}]}))
"""


@pytest.fixture
def fake(monkeypatch):
    real = sweep.Sweep.command
    monkeypatch.setattr(sweep.Sweep, "command",
                        lambda self, point: [sys.executable, "-c", TRAIN, *real(self, point)[3:]])


def test_the_points_are_the_product_of_the_values():
    points = sweep.grid(["RATE=1e-3, 3e-3", "betas=(0.9, 0.95),(0.9, 0.99)"])
    assert [point.values for point in points] == [
        (("RATE", rate), ("betas", betas)) for rate in ("1e-3", "3e-3") for betas in ("(0.9, 0.95)", "(0.9, 0.99)")]
    assert points[0].name == "RATE=1e-3__betas=_0.9_0.95" and len({point.name for point in points}) == 4
    assert sweep.split("1,'a,b',[2, (3, 4)],{'x': 5, 'y': 6}") == ["1", "'a,b'", "[2, (3, 4)]", "{'x': 5, 'y': 6}"]
    assert [point.name for point in sweep.grid(["T='a b','a/b'"])] == ["000-T=_a_b", "001-T=_a_b"]


@pytest.mark.parametrize("axes", [["RATE"], ["=1,2"], ["RATE="], ["SEED=1", "SEED=2"]])
def test_a_grid_that_says_nothing_is_refused(axes):
    with pytest.raises(UserError, match="--grid"):
        sweep.grid(axes)


def test_failures_stop_nothing_and_finished_runs_are_not_repeated(fake, tmp_path, capsys):
    arguments = [f"--out={tmp_path / 'out'}", "--grid", "RATE=0.03,0.01", "--grid=SEED=0,1", "--parallel=2"]
    assert sweep.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[lines.index("") + 1:]]
    assert [row[:2] for row in table[1:3]] == [["1.0000", "0.5000"], ["3.0000", "2.5000"]], "not sorted by loss"
    assert [row[5] for row in table[1:]] == ["finished"] * 2 + ["failed"] * 2
    assert sum("SEED=1: failed with status 1: error: a loss that is not finite" in line for line in lines) == 2, lines
    assert sweep.main([*arguments, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert rows[0] == {"run": "RATE=0.01__SEED=0", "RATE": "0.01", "SEED": "0", "status": "finished", "steps": 10,
                       "validation_loss": 1.0, "best": 0.5, "bits_per_byte": 2.0, "tokens_per_second": None}
    ran = {path.parent.name: len(path.read_text()) for path in (tmp_path / "out").glob("*/runs")}
    assert ran == {"RATE=0.03__SEED=0": 1, "RATE=0.01__SEED=0": 1, "RATE=0.03__SEED=1": 2, "RATE=0.01__SEED=1": 2}
    assert sweep.main([f"--out={tmp_path / 'out'}", "--grid=RATE=0.03,0.01", "--grid=SEED=0"]) == 0


def test_another_sweep_in_the_same_directory_is_refused(fake, tmp_path):
    arguments = [f"--out={tmp_path / 'out'}", "--grid=RATE=0.01", "--grid=SEED=0"]
    assert sweep.main(arguments) == 0
    with pytest.raises(UserError, match="holds a sweep with other settings"):
        sweep.main([*arguments, "--gin.NUM_STEPS=7"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="is not empty, and holds no sweep"):
        sweep.main([f"--out={tmp_path / 'full'}", *arguments[1:]])


def test_each_command_is_one_that_training_takes(tmp_path, capsys):
    assert sweep.main([f"--out={tmp_path}", "--grid=LEARNING_RATE=1e-3", "--gin_file=gin/runs/debug.gin",
                       "--print_config"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    import shlex

    command = shlex.split(line)
    assert command[:3] == [sys.executable, "-m", "experiments.train"]
    assert train.main([*command[3:], "--print_config"]) == 0
    text = capsys.readouterr().out
    assert f"RUN_DIR = '{tmp_path}/LEARNING_RATE=1e-3'" in text and "LEARNING_RATE = 0.001" in text
    assert not list(pathlib.Path(tmp_path).iterdir())


@pytest.mark.parametrize("arguments", [["--out=x"], ["--grid=A=1"], ["--out=x", "--grid=A=1", "--parallel=0"]])
def test_what_is_missing_is_named(arguments):
    with pytest.raises(UserError, match="must be"):
        sweep.main(arguments)
