"""Damaged or missing input, through the real scripts: one line that says what is wrong, and nothing half-written."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARD = "train-00000-of-00001.array_record"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}


def run(script: str, *flags: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", f"experiments.{script}", *flags], text=True, encoding="utf-8",
                          capture_output=True, check=False, timeout=120, **{"env": ENVIRONMENT, **options})


def train_flags(data: pathlib.Path, run_dir: pathlib.Path, steps: int = 2) -> list[str]:
    return ["--gin_file=gin/runs/debug.gin", f"--data_dir={data}", f"--run_dir={run_dir}", f"--num_steps={steps}",
            "--gin.ModelConfig.vocab_size=320"]


def one_error(done: subprocess.CompletedProcess) -> str:
    """The one line that a failed script may print on stderr."""
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout
    return done.stderr


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("data")
    done = run("prepare", f"--corpus={pathlib.Path(json.__file__).parent}", f"--data_dir={folder}",
               "--gin.VOCAB_SIZE=320", "--gin.WORKERS=1")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = run("train", *train_flags(data, folder))
    assert done.returncode == 0, done.stderr
    return folder


def _truncate(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "damage", "words"), [
    (SHARD, _truncate, ("is truncated or altered", "FORCE=True")),
    (SHARD, _flip, ("is damaged: its SHA-256", "FORCE=True")),
    ("tokenizer.model", pathlib.Path.unlink, ("no tokenizer at", "prepare.py")),
    ("manifest.json", _truncate, ("manifest.json is damaged", "FORCE=True")),
], ids=["truncated-shard", "flipped-shard", "no-tokenizer", "truncated-manifest"])
def test_training_on_damaged_data(data, tmp_path, name, damage, words):
    broken = shutil.copytree(data, tmp_path / "data")
    damage(broken / name)
    message = one_error(run("train", *train_flags(broken, tmp_path / "run")))
    assert all(word in message for word in (str(broken), *words)), message
    assert not files(tmp_path / "run")


def test_training_into_a_run_directory_that_cannot_be_written(data, tmp_path):
    """A folder below a file can be made by nobody; permissions stop everyone but root, whom /proc stops."""
    (tmp_path / "file").write_text("")
    locked = pathlib.Path("/proc/run")
    if os.geteuid():
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o555)
    for folder in (tmp_path / "file" / "run", locked):
        assert f"can't write to the run directory {folder}" in one_error(run("train", *train_flags(data, folder)))
    assert (tmp_path / "file").read_text() == "" and not files(locked)


@pytest.mark.parametrize(("corpus", "words"), [
    ("empty", "is empty: it holds no document"), ("missing", "does not exist"), ("zeros", "holds no document")])
def test_preparing_a_corpus_without_text(tmp_path, corpus, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "zeros").mkdir()
    (tmp_path / "zeros" / "a.bin").write_bytes(bytes(1000))
    message = one_error(run("prepare", f"--corpus={tmp_path / corpus}", f"--data_dir={tmp_path / 'data'}"))
    assert str(tmp_path / corpus) in message and words in message
    assert not files(tmp_path / "data")


def _other_shape(run_dir: pathlib.Path) -> None:
    path = run_dir / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_dim": 96}))


def _truncated_checkpoint(run_dir: pathlib.Path) -> None:
    step = run_dir / "checkpoints" / "2" / "params"
    _truncate(max(files(step), key=lambda path: path.stat().st_size))


def _no_checkpoint(run_dir: pathlib.Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")


def _no_tokenizer(run_dir: pathlib.Path) -> None:
    (run_dir / "tokenizer.model").unlink()


def _no_model(run_dir: pathlib.Path) -> None:
    (run_dir / "model.json").write_text('{"vocab_size": 320')


@pytest.mark.parametrize("script", ["serve", "evaluate"])
@pytest.mark.parametrize(("damage", "words"), [
    (_other_shape, ("layers/mlp/down has shape (2, 64, 32), expected (2, 96, 32)",)),
    (_truncated_checkpoint, ("checkpoints/2 can't be read, it is damaged or incomplete", "there is no other")),
    (_no_checkpoint, ("no checkpoints at",)), (_no_tokenizer, ("no tokenizer at",)),
    (_no_model, ("model.json cannot be read",)),
], ids=["other-shape", "truncated-checkpoint", "no-checkpoint", "no-tokenizer", "truncated-model"])
def test_reading_a_damaged_run(trained, tmp_path, script, damage, words):
    broken = shutil.copytree(trained, tmp_path / "run")
    damage(broken)
    before = sorted(files(broken))
    message = one_error(run(script, f"--run_dir={broken}", *(["--port=0"] if script == "serve" else [])))
    assert all(word in message for word in (str(broken), *words)), message
    assert sorted(files(broken)) == before


def test_evaluating_where_the_data_are_elsewhere_or_gone(data, trained, tmp_path):
    done = run("evaluate", f"--run_dir={trained}", "--max_batches=1", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["tokens"] > 0, done.stderr
    moved = shutil.copytree(trained, tmp_path / "run")
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps(manifest | {"data_dir": str(tmp_path / "gone")}))
    message = one_error(run("evaluate", f"--run_dir={moved}"))
    assert all(word in message for word in (str(tmp_path / "gone"), "--data_dir", "--text"))
