"""A run whose data and run directory are in a bucket: what a run on disks is, to the bit."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils.epath import backend
from fsspec.registry import _registry

from llm_jax import runs, storage
from llm_jax.checkpoints import Checkpoints
from llm_jax.data.loader import DataConfig, TrainLoader
from llm_jax.errors import UserError
from llm_jax.training import loop
from llm_jax.training.optimizer import OptimizerConfig
from tests.fake_bucket import FakeBucket, bucket, served_bucket  # noqa: F401 (fixtures)
from tests.training.common import LENGTH, ROWS, settings

# That of other tests, whose compiled programs this one finds.
OPTIONS = dict(optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=4, decay_steps=20), log_every=2,
               eval_batches=1, checkpoint_every=2, keep=1)


class S3Bucket(FakeBucket):
    """The same in memory, for `s3://`."""

    protocol = ("s3",)

    @classmethod
    def _strip_protocol(cls, path):
        return [cls._strip_protocol(each) for each in path] if isinstance(path, list) else (
            super()._strip_protocol(str(path).removeprefix("s3://")))


@pytest.fixture
def s3_bucket(bucket, monkeypatch):  # noqa: F811
    """The address of an empty bucket in S3, for what goes through fsspec."""
    monkeypatch.setitem(_registry, "s3", S3Bucket)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield "s3://bucket"
    backend.fsspec_backend._get_filesystem.cache_clear()


def upload(folder: str, address: str) -> None:
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file():
            storage.copy_atomically(path, storage.located(address) / path.relative_to(folder).as_posix())


def test_a_run_in_a_bucket_is_the_run_on_disk(data_dir, tmp_path, served_bucket, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    upload(data_dir, f"{served_bucket}/data")
    run_dir = f"{served_bucket}/runs/one"
    for num_steps in (3, 6):  # the second goes on where the first stopped
        loop.train(**settings(run_dir, f"{served_bucket}/data", num_steps=num_steps, **OPTIONS))
    said = capsys.readouterr().err
    assert "resuming at step 3" in said and said.count("copying gs://bucket/data to ") == 1
    loop.train(**settings(tmp_path / "run", data_dir, num_steps=6, **OPTIONS))

    there, here = runs.load(run_dir), runs.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, there.params, here.params)
    assert there.manifest["finished_steps"] == 6 and there.manifest["data_dir"] == "gs://bucket/data"
    assert there.manifest["metrics"]["end"] == here.manifest["metrics"]["end"]
    assert there.tokenizer.encode("import json") == here.tokenizer.encode("import json")
    with Checkpoints(f"{run_dir}/checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [6] and checkpoints.damage(6) is None
        victim = next(name for name in FakeBucket.store if "/6/params/d/" in name)
        FakeBucket.store[victim].truncate(1)
        assert "has 1 bytes instead of" in checkpoints.damage(6)
    names = [name.removeprefix("/bucket/runs/one/") for name in FakeBucket.store if "/runs/one/" in name]
    assert {"model.json", "manifest.json", "logs/metrics.jsonl"} <= set(names)
    assert not [name for name in names if "tmp" in name or "lock" in name or ".writable" in name]
    assert not pathlib.Path("gs:").exists()


@pytest.mark.parametrize("kind", ["bucket", "s3_bucket"])
def test_data_in_a_bucket_are_copied_once_and_again_when_they_change(kind, data_dir, tmp_path, request, monkeypatch,
                                                                     capsys):
    bucket = request.getfixturevalue(kind)  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    upload(data_dir, f"{bucket}/other")

    def first_batch(where: str) -> dict:
        loader = TrainLoader(DataConfig(where, LENGTH, ROWS))
        try:
            return next(loader)
        finally:
            loader.close()

    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, first_batch(f"{bucket}/other"), first_batch(data_dir))
    assert capsys.readouterr().err.count("copying") == 1
    manifest = storage.located(f"{bucket}/other/manifest.json")
    manifest.write_text(manifest.read_text() + "\n")
    first_batch(f"{bucket}/other")
    assert capsys.readouterr().err.count("copying") == 1


def test_what_cannot_be_reached_is_said(data_dir, tmp_path):
    with pytest.raises(UserError, match=r"may begin with gs://, s3://, not with ftp://"):
        loop.train(**settings("ftp://host/run", data_dir))
    with pytest.raises(UserError, match="s3://bucket/data: s3:// needs the package s3fs: pip install s3fs"):
        loop.train(**settings(tmp_path / "run", "s3://bucket/data"))
    with pytest.raises(UserError, match="not in s3://.*mount the bucket"):
        Checkpoints("s3://bucket/checkpoints")


def test_a_run_in_s3_is_refused_before_anything_is_written(data_dir, s3_bucket):
    with pytest.raises(UserError, match="s3://bucket/run: checkpoints can be on a disk or in gs://.*mount the bucket"):
        loop.train(**settings(f"{s3_bucket}/run", data_dir))
    assert not FakeBucket.store


def test_what_stands_in_the_way_of_runs_in_s3(s3_bucket):
    """Orbax's own words. Where this fails, a release has learnt it, and the refusal can go."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer, pytest.raises(
            ValueError, match="Checkpoint path should be absolute. Got s3:/bucket/one"):
        checkpointer.save(f"{s3_bucket}/one", args=ocp.args.StandardSave({"x": np.ones(3)}))
