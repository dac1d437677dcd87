"""Settings on which trained parameters depend, and those that a run's older manifest does not know yet."""

from __future__ import annotations

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import pytest

from llm_jax.checkpoints import Checkpoints, UnreadableCheckpoint
from llm_jax.data.loader import DataConfig
from llm_jax.errors import UserError
from llm_jax.models import RopeScaling
from llm_jax.training.optimizer import OptimizerConfig
from llm_jax.training.resume import check_same, decisive_settings, remove_leftovers, restore_newest
from tests.training.common import MODEL


def settings(**changes):
    return decisive_settings(**{"model": MODEL, "data": DataConfig("data", 32, 8), "data_hash": "h", "seed": 7,
                                "optimizer": OptimizerConfig(), "num_steps": 20, "z_loss": 0.0, **changes})


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default():
    old = settings()
    for name in ("architecture", "rope_scaling", "attention_pattern", "norm_offset"):
        del old["model"][name]
    del old["optimizer"]["selection_bias_rate"], old["rope_context"]
    check_same("run", old, settings())
    with pytest.raises(UserError, match="model.norm_offset was 0.0 and is 1.0"):
        check_same("run", old, settings(model=dataclasses.replace(MODEL, norm_offset=1.0)))


def test_what_changes_the_result_is_named():
    stretched = dataclasses.replace(MODEL, rope_scaling=RopeScaling("dynamic", 2.0))
    check_same("run", settings(model=stretched, rope_context=32), settings(model=stretched, rope_context=32))
    with pytest.raises(UserError, match="rope_context was 32 and is 64"):
        check_same("run", settings(model=stretched, rope_context=32), settings(model=stretched, rope_context=64))
    with pytest.raises(UserError, match="model.rope_scaling.factor was 2.0 and is 3.0"):
        check_same("run", settings(model=stretched), settings(
            model=dataclasses.replace(MODEL, rope_scaling=RopeScaling("dynamic", 3.0))))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), step * 10)
    return directory


def state(step):
    return {"params": {"w": jnp.full((4, 4), step, jnp.float32)}, "step": jnp.int32(step)}


def shapes():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def flip(directory, step):
    """Changes what a number of the checkpoint is, or says that it can't be read."""
    path = next((directory / str(step) / "params").rglob("d/*"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(two_checkpoints, tmp_path, capsys):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, directory)
    flip(directory, 2)
    with Checkpoints(directory) as checkpoints:
        restored, batches, _ = restore_newest(checkpoints, shapes())
        assert (int(restored["step"]), batches, checkpoints.steps()) == (1, 10, [1])
        said = capsys.readouterr().err
        assert re.search(r"warning: checkpoint .*/2 is damaged \(params/.*checksum differs\)\); it is now damaged-2, "
                         r"and the run goes on from step 1\n", said)
        flip(directory, 1)
        with pytest.raises(UserError, match="/1 is damaged .* there is no other to go on from"):
            restore_newest(checkpoints, shapes())
        assert checkpoints.steps() == [1], "the only one was taken away"


def test_what_cannot_be_read_is_damaged_only_without_checksums(two_checkpoints, tmp_path, monkeypatch):
    """If the files are what was written, it is this machine that can't read them: going back would lose good steps."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, directory)

    def unreadable(self, like, step=None):
        if step == 2:
            raise UnreadableCheckpoint("checkpoint 2 can't be read (no memory)", "no memory")
        return real(self, like, step)

    real = Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", unreadable)
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(UserError, match="no memory"):
            restore_newest(checkpoints, shapes())
        assert checkpoints.steps() == [1, 2]
        (directory / "2" / "checksums.json").unlink()
        assert restore_newest(checkpoints, shapes())[1] == 10 and checkpoints.steps() == [1]


def test_no_checkpoint_is_none(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert restore_newest(checkpoints, shapes()) is None


def test_what_a_killed_trainer_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "logs").mkdir()
    left = [".manifest.json.0123abcd.tmp", "logs/.metrics.jsonl.ffffffff.tmp", ".writable-0123"]
    kept = ["manifest.json", ".gitignore", "notes.tmp", "logs/metrics.jsonl", ".hidden.0123abcd.txt"]
    for name in left + kept:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)
