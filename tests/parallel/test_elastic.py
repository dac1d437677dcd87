"""One run on three meshes and two numbers of processes: the same state, the same rows in the same order."""

from __future__ import annotations

import pathlib

import numpy as np

from llm_jax.checkpoints import Checkpoints
from llm_jax.parallel.mesh import MeshConfig
from llm_jax.training import loop, trainer
from llm_jax.training.optimizer import OptimizerConfig
from tests import peers
from tests.training.common import ROWS, prepare_tiny, settings
from tests.training.launch import Launched
from tests.training.test_loop import saved_arrays
from tests.training.train_once import recording

OPTIMIZER = dict(peak_learning_rate=1e-2, warmup_steps=4, decay_steps=20)
OPTIONS = dict(checkpoint_every=1, eval_batches=1, log_every=1)


def rows_of(*files: pathlib.Path) -> list[tuple[int, list[str]]]:
    """The batches that processes took, in order: (number, hashes of its rows)."""
    lines = [[line.split() for line in file.read_text().splitlines()] for file in files]
    assert len({tuple(line[0] for line in each) for each in lines}) == 1, "the processes took other batches"
    return [(int(parts[0][0]), [row for part in parts for row in part[1:]]) for parts in zip(*lines, strict=True)]


def test_a_run_goes_on_elsewhere_with_the_same_state_and_the_next_rows(tmp_path, monkeypatch, capsys):
    data_dir, run_dir = prepare_tiny(tmp_path), tmp_path / "run"

    def train(directory: pathlib.Path, num_steps: int, **mesh: int) -> list[tuple[int, list[str]]]:
        batches = tmp_path / f"{directory.name}-{num_steps}"
        monkeypatch.setattr(trainer, "TrainLoader", recording(batches))
        loop.train(**settings(directory, data_dir, num_steps=num_steps, mesh=MeshConfig(**mesh),
                              optimizer=OptimizerConfig(**OPTIMIZER), **OPTIONS))
        return rows_of(batches)

    straight = train(tmp_path / "straight", 7)
    assert [number for number, _ in straight] == list(range(7)) and all(len(rows) == ROWS for _, rows in straight)

    assert train(run_dir, 3, fsdp=8) == straight[:3]
    before = saved_arrays(run_dir)
    assert train(run_dir, 5, fsdp=2, tensor=2) == straight[3:5]
    for name, array in saved_arrays(run_dir, 3).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)

    victim = next((run_dir / "checkpoints" / "5" / "state").rglob("d/*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    capsys.readouterr()
    two = [Launched(tmp_path / f"log{index}", run_dir, data_dir, environment, num_steps=7, mesh={"data": 2},
                    optimizer=OPTIMIZER, batches=str(tmp_path / f"of-{index}"), **OPTIONS)
           for index, environment in enumerate(peers.environments(2))]
    assert [process.join() for process in two] == [0, 0], [process.said for process in two]
    assert "5 is damaged (state/" in two[0].said and "the run goes on from step 4" in two[0].said
    assert rows_of(tmp_path / "of-0", tmp_path / "of-1") == straight[4:]

    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == list(range(1, 8)) and checkpoints.damage(7) is None
    one, other = saved_arrays(tmp_path / "straight"), saved_arrays(run_dir)
    assert one.keys() == other.keys()
    for name in one:  # AdamW divides by gradients that may be as small as what rounding moves them by
        np.testing.assert_allclose(other[name], one[name], atol=5e-5 * np.abs(one[name]).max(), rtol=0, err_msg=name)
