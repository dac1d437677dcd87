from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from llm_jax.errors import UserError
from llm_jax.training.lock import NAME, RunLock
from tests.fake_bucket import bucket  # noqa: F401 (a fixture)

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOLD = "import sys, time; from llm_jax.training.lock import RunLock\n" \
       "with RunLock(sys.argv[1], renew_s=0.05): print('has it', flush=True); time.sleep(60)"


def hold(run_dir) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    return process


def elsewhere(run_dir: pathlib.Path, path=None, **changes) -> dict:
    """Leaves the lock of a trainer on another machine."""
    owner = {"token": "other", "host": "far", "boot": "of far", "pid_space": 1, "pid": 7, "started": 1.0,
             "renewals": 3, "time": "2026-01-01"} | changes
    (path or run_dir / NAME).write_text(json.dumps(owner))
    return owner


def test_the_second_is_refused_until_the_first_lets_go(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(UserError, match=r"in use: process \d+ on .* trains there"), RunLock(tmp_path):
            pass
        assert (tmp_path / NAME).exists(), "who was refused has left the lock alone"
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path):
        pass


def test_a_killed_trainers_run_is_free_at_once(tmp_path):
    process = hold(tmp_path)
    with pytest.raises(UserError, match=f"process {process.pid} on"), RunLock(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    said = []
    with RunLock(tmp_path, say=said.append, stale_s=1e6):
        assert not said and json.loads((tmp_path / NAME).read_text())["pid"] != process.pid


def test_of_many_at_once_one_has_it(tmp_path):
    start, outcomes, done = threading.Barrier(8), [], threading.Event()

    def contend() -> None:
        start.wait()
        try:
            with RunLock(tmp_path):
                outcomes.append("has it")
                done.wait(10)
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 8:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["has it"] + ["refused"] * 7


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_lease_of_another_machine_is_watched(tmp_path, bucket, place):  # noqa: F811
    """One that moves is somebody's; one that stands still was a dead trainer's. The clock there says nothing."""
    from etils import epath

    directory = tmp_path if place == "disk" else epath.Path(bucket) / "run"
    lock, said = directory / NAME, []
    elsewhere(directory)
    with RunLock(directory, renew_s=0.04, stale_s=0.2, say=said.append):
        assert "in use by process 7 on far" in said[0] and "waiting up to" in said[0]
        assert json.loads(lock.read_text())["token"] != "other"
    assert not lock.exists()

    elsewhere(directory)
    renewal = threading.Timer(0.1, elsewhere, [directory], {"renewals": 4})
    renewal.start()
    with pytest.raises(UserError, match="process 7 on far"):
        RunLock(directory, renew_s=0.04, stale_s=60, say=said.append).__enter__()
    renewal.join()
    assert json.loads(lock.read_text())["renewals"] == 4


def test_in_a_bucket_too_the_second_is_refused_and_a_dead_ones_run_is_free_at_once(bucket):  # noqa: F811
    said = []
    with RunLock(f"{bucket}/run", renew_s=0.05, say=said.append):
        with pytest.raises(UserError, match="in use"), RunLock(f"{bucket}/run", renew_s=0.05, say=said.append):
            pass
    assert len(said) == 1
    first = RunLock(f"{bucket}/run", renew_s=0.05, say=said.append)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    first._path.write_text(json.dumps(first._me | {"pid": dead.pid, "token": "of the dead"}))
    with first:
        assert len(said) == 1, "it waited"


def test_who_stood_still_too_long_hears_that_the_run_was_taken(tmp_path):
    with RunLock(tmp_path, renew_s=0.02) as lock:
        lock.check()
        elsewhere(tmp_path)
        deadline = time.monotonic() + 10
        with pytest.raises(UserError, match="taken over by process 7 on far"):
            while time.monotonic() < deadline:
                lock.check()
                time.sleep(0.01)
    assert json.loads((tmp_path / NAME).read_text())["token"] == "other", "it removed the lock of its successor"
