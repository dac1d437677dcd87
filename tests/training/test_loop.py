from __future__ import annotations

import dataclasses
import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llm_jax import runs
from llm_jax.checkpoints import Checkpoints
from llm_jax.data.loader import DataConfig, TrainLoader
from llm_jax.errors import UserError
from llm_jax.training import loop, trainer
from llm_jax.training.optimizer import OptimizerConfig
from llm_jax.training.signals import StopRequest
from tests.training.common import LENGTH, MODEL, ROWS, settings
from tests.training.train_once import recording

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(run_dir, data_dir, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.training.train_once", str(run_dir), data_dir]
    command += [f"{name}={value!r}" for name, value in options.items()]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def saved_arrays(run_dir, step=None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by name, as it lies on disk."""
    import orbax.checkpoint as ocp

    with Checkpoints(pathlib.Path(run_dir) / "checkpoints", read_only=True) as checkpoints:
        step = step or checkpoints.latest_step()
    found = {}
    reader = ocp.PyTreeCheckpointer()
    for item in ("params", "state"):
        path = pathlib.Path(run_dir) / "checkpoints" / str(step) / item
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata)
        tree = reader.restore(path, restore_args=as_numpy)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


@pytest.fixture(scope="module")
def straight(data_dir, tmp_path_factory):
    """Twenty steps without a stop: (run directory, what `train` returned, the batches)."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "TrainLoader", recording(folder / "batches"))
        metrics = loop.train(**settings(folder / "run", data_dir, config_text="# the configuration\n"))
    return folder / "run", metrics, (folder / "batches").read_text().splitlines()


def test_a_run_leaves_everything_that_is_known_about_it(straight):
    run_dir, metrics, _ = straight
    run = runs.load(run_dir)
    assert run.config == MODEL and run.tokenizer.vocab_size <= MODEL.vocab_size
    assert (run_dir / "config.gin").read_text() == "# the configuration\n"
    manifest = run.manifest
    assert manifest["finished_steps"] == 20 and set(manifest["mesh"].values()) == {1}
    assert manifest["metrics"] == metrics and manifest["data_hash"] and manifest["packages"]["jax"] == jax.__version__
    assert metrics["end"]["loss"] < metrics["start"]["loss"] - 0.5
    assert metrics["end"]["bits_per_byte"] < metrics["start"]["bits_per_byte"]
    assert metrics["unigram_bits_per_byte"] > 0 and metrics["trained_tokens"] <= 20 * ROWS * LENGTH
    logits = run.model.apply({"params": run.params}, np.array([run.tokenizer.encode("import json")], np.int32))
    assert logits.dtype == np.float32 and np.isfinite(logits).all()


def test_metrics_are_written_for_every_interval(straight):
    run_dir, _, _ = straight
    rows = [json.loads(line) for line in (run_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [5, 10, 15, 20]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [0, 20]
    row = rows[-2]
    assert {"loss", "perplexity", "learning_rate", "grad_norm", "param_norm", "tokens_per_second"} <= set(row)
    np.testing.assert_allclose(row["perplexity"], np.exp(row["loss"]))
    assert list((run_dir / "logs").glob("events.out.tfevents.*"))


def test_a_finished_run_says_so_without_touching_a_device(straight, data_dir, monkeypatch, capsys):
    run_dir, metrics, _ = straight
    monkeypatch.setattr(loop, "Trainer", None)
    began = time.perf_counter()
    assert loop.train(**settings(run_dir, data_dir)) == metrics
    assert time.perf_counter() - began < 2
    said = capsys.readouterr().err
    assert re.search(r"is complete: 20 steps. validation loss \d+\.\d+ → \d+\.\d+ .* bits per byte", said)


@pytest.mark.parametrize("change, named", [
    (dict(seed=8), "seed was 7 and is 8"),
    (dict(num_steps=30), "optimizer.decay_steps was 20 and is 30"),
    (dict(optimizer=OptimizerConfig(2e-2, warmup_steps=4)), "optimizer.peak_learning_rate was 0.01 and is 0.02"),
    (dict(z_loss=1e-4), "z_loss was 0.0 and is 0.0001"),
])
def test_a_run_is_not_continued_with_other_settings(straight, data_dir, change, named):
    run_dir, _, _ = straight
    with pytest.raises(UserError, match=re.escape(named)):
        loop.train(**settings(run_dir, data_dir, **change))


def test_ten_steps_a_kill_and_a_resume_give_the_same_bits(straight, data_dir, tmp_path, monkeypatch):
    run_dir, batches = tmp_path / "run", tmp_path / "batches"
    process = start(run_dir, data_dir, batches=str(batches), kill_at=12)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    first = batches.read_text().splitlines()
    assert [line.split()[0] for line in first] == [str(n) for n in range(12)]
    assert not json.loads((run_dir / "manifest.json").read_text())["finished_steps"]

    monkeypatch.setattr(trainer, "TrainLoader", recording(batches))
    metrics = loop.train(**settings(run_dir, data_dir))
    resumed = batches.read_text().splitlines()[len(first):]
    assert first[:10] + resumed == straight[2], "the batches after the resume are not those of the run without a stop"
    one, other = saved_arrays(straight[0]), saved_arrays(run_dir)
    assert one.keys() == other.keys() and any("mu" in name for name in one) and "state['rng']" in one
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert metrics["end"] == straight[1]["end"]
    rows = [json.loads(line) for line in (run_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [5, 10, 15, 20]


def test_sigterm_saves_and_stops_and_the_run_goes_on(data_dir, tmp_path):
    """With a decay of its own length, a run's number of steps is not among the settings that decide its result."""
    optimizer = dict(peak_learning_rate=1e-2, warmup_steps=4, decay_steps=20)
    process = start(tmp_path / "run", data_dir, num_steps=10**6, checkpoint_every=10**6, log_every=1,
                    optimizer=optimizer)
    seen = []
    for line in process.stderr:
        seen.append(line)
        if " loss " in line and "validation" not in line:
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, "".join(seen) + errors
    stopped = int(re.search(r"SIGTERM: saved and stopped after step (\d+) of", errors).group(1))
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [stopped]
    loop.train(**settings(tmp_path / "run", data_dir, num_steps=stopped + 2, optimizer=OptimizerConfig(**optimizer),
                          log_every=1))
    assert saved_arrays(tmp_path / "run")["state['step']"] == stopped + 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, stopped + 3)), "the first step of a process is reported too"


def test_a_stop_in_the_last_step_leaves_a_finished_run_with_its_own_evaluation(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "_agree", lambda self, stop, step: step == 6)
    metrics = loop.train(**settings(tmp_path / "run", data_dir, num_steps=6, eval_every=3, eval_batches=1,
                                    optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=4, decay_steps=20)))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [evaluation["step"] for evaluation in manifest["evaluations"]] == [0, 3, 6]
    assert manifest["evaluations"][-1] == {"step": 6} | metrics["end"] and manifest["finished_steps"] == 6


def test_a_loss_that_is_not_finite_names_step_documents_and_the_last_good_checkpoint(data_dir, tmp_path, capsys):
    # The first update is by 1e30 a weight, so that the second step's logits overflow.
    optimizer = OptimizerConfig(peak_learning_rate=1e30, warmup_steps=0)
    with pytest.raises(UserError) as caught:
        loop.train(**settings(tmp_path / "run", data_dir, optimizer=optimizer, checkpoint_every=1))
    message = str(caught.value)
    loader = TrainLoader(DataConfig(data_dir, LENGTH, ROWS))
    documents = loader.documents(1)
    loader.close()
    assert "not finite at step 2 (batch 1)" in message and documents[0] in message
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '1'} (step 1)" in message
    details = json.loads((tmp_path / "run" / "logs" / "not_finite_step_2.json").read_text())
    assert details["documents"] == documents and len(details["sources"]) == len(documents)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [1], "a state that is not good was saved"


def test_a_run_directory_that_cannot_be_written_is_said_before_anything_else(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Trainer", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write to the run directory .*/file/run"):
        loop.train(**settings(tmp_path / "file" / "run", data_dir))
    if os.geteuid() == 0:  # whom permissions don't stop
        with pytest.raises(UserError, match="can't write to the run directory /proc/run"):
            loop.train(**settings("/proc/run", data_dir))
    else:
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(UserError, match="can't write to the run directory .*/locked: Permission denied"):
            loop.train(**settings(tmp_path / "locked", data_dir))


@pytest.mark.parametrize("changes, message", [
    (lambda data_dir: dict(data=DataConfig(data_dir, 128, ROWS)), "row_length=128 is more than .*max_context=64"),
    (lambda data_dir: dict(gradient_accumulation=3), "8 rows .* 3 microbatches"),
    (lambda data_dir: dict(num_steps=0), "num_steps must be a whole number"),
    (lambda data_dir: dict(data=DataConfig(data_dir + "/nowhere", LENGTH, ROWS)), "no prepared data"),
])
def test_parts_that_do_not_fit_are_named(data_dir, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        loop.train(**settings(tmp_path / "run", data_dir, **changes(data_dir)))
    assert not (tmp_path / "run" / "model.json").exists()


def test_a_vocabulary_that_does_not_fit_says_what_to_do(data_dir, tmp_path):
    with pytest.raises(UserError, match=r"300 is smaller .* 320 tokens .*\.vocab_size=320.*VOCAB_SIZE=300"):
        loop.train(**settings(tmp_path / "run", data_dir, model=dataclasses.replace(MODEL, vocab_size=300)))


def test_paths_below_home_and_from_elsewhere(data_dir, tmp_path, monkeypatch):
    """`~` is expanded, and the manifest says where the data are whatever folder it is read from."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").symlink_to(data_dir)
    loop.train(**settings("~/run", "~/corpus", num_steps=4, eval_batches=1))
    assert not (tmp_path / "~").exists()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(
        ["checkpoints", "config.gin", "logs", "manifest.json", "model.json", "tokenizer.model"])
    run = runs.load("~/run")
    assert run.manifest["data_dir"] == str(tmp_path / "corpus") and run.params
    loop.train(**settings("run", "corpus", num_steps=4, eval_batches=1))  # finished: the same run by another name
    with pytest.raises(UserError, match="holds no prepared data"):
        loop.train(**settings("~/other", "~/nowhere"))


def test_a_full_disk_is_one_message(data_dir, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(UserError, match="can't write a checkpoint to .*: No space left on device; there is none"):
            loop.train(**settings(tmp_path / "run", data_dir, num_steps=5, eval_batches=1))
    with monkeypatch.context() as patch:
        patch.setattr("llm_jax.training.metric_log.JsonLines.flush", full)
        with pytest.raises(UserError, match="can't write to the run directory .*No space left on device"):
            loop.train(**settings(tmp_path / "run", data_dir, num_steps=5, eval_batches=1))


@pytest.fixture
def interruptible():
    """SIGINT as Python has it; a shell starts what it runs in the background without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_is_a_request_and_the_second_is_not(interruptible):
    with StopRequest() as stop:
        assert stop.signum is None
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
