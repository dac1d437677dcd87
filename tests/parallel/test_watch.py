"""Runs that stand still end themselves, say why in one line, and can be started again."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import time

import pytest

from llm_jax.checkpoints import Checkpoints
from llm_jax.errors import UserError
from llm_jax.training import watch
from llm_jax.training.watch import Watch, WatchConfig
from tests import peers
from tests.training.common import prepare_tiny
from tests.training.launch import Launched

OPTIMIZER = dict(peak_learning_rate=1e-2, warmup_steps=4, decay_steps=20)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    return prepare_tiny(tmp_path_factory.mktemp("tiny"))


def start_two(run_dir, data_dir, **options) -> list[Launched]:
    return [Launched(pathlib.Path(f"{run_dir}.log{index}"), run_dir, data_dir, environment, mesh={"data": 2},
                     optimizer=OPTIMIZER, **options) for index, environment in enumerate(peers.environments(2))]


def wait_for_step(run: Launched) -> None:
    """Returns when a process has reported a step."""
    while not re.search(r"^step +\d+/\d+  loss", run.said, re.MULTILINE):
        assert run.process.is_alive(), run.said
        time.sleep(0.02)


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error:")]


def test_a_loader_that_hangs_ends_the_run_and_its_last_state_is_saved(data_dir, tmp_path):
    run_dir = tmp_path / "run"
    options = dict(num_steps=12, checkpoint_every=10**6, log_every=1, eval_batches=1)
    hung = Launched(tmp_path / "log", run_dir, data_dir, batches=str(tmp_path / "batches"), hang_at=7,
                 watch=dict(timeout_s=4.0, startup_s=120.0), **options)
    assert hung.join() == watch.STATUS == 75, hung.said
    message, = errors(hung.said)
    assert re.search(r"no progress for \d+ s at step 8 \(waiting for its batch\)", message)
    assert "the last checkpoint is that of step 7" in message and "status 75" in message
    stacks = (run_dir / "logs" / "stacks-0.txt").read_text()
    assert "__next__" in stacks and "trainer.py" in stacks
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [7]
    again = Launched(tmp_path / "log", run_dir, data_dir, **options)
    assert again.join() == 0 and "resuming at step 7" in again.said, again.said


def test_a_stopped_and_a_killed_process_are_noticed_by_the_other(data_dir, tmp_path):
    options = dict(num_steps=10**6, checkpoint_every=10**6, log_every=1, eval_batches=1, watch=dict(peer_timeout_s=4.0))
    for victim, signum in ((1, signal.SIGSTOP), (1, signal.SIGKILL), (0, signal.SIGKILL)):
        processes = start_two(tmp_path / f"{victim}-{signum}", data_dir, **options)
        try:
            wait_for_step(processes[0])
            began = time.monotonic()
            os.kill(processes[victim].process.pid, signum)
            survivor = processes[1 - victim]
            status, said = survivor.join(60), survivor.said
            print(victim, signum, status, time.monotonic() - began, said[-3000:])
            assert status != 0, said
            if victim == 1:
                assert status == watch.STATUS
                message, = errors(said)
                assert re.search(r"process 1 was not heard of for \d+ s \(on .*, last at step \d+", message)
        finally:
            for process in processes:
                process.process.kill()


def test_who_was_not_heard_of_for_long_is_lost_and_who_is_done_is_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    last = {index: ("", 0.0) for index in range(3)}
    beat = '{"number": %d, "host": "b", "doing": "step 4 (waiting for its batch)"}'
    for second in range(20):
        now[0] = float(second)
        beats = {"0": beat % second, "1": beat % min(second, 5), "2": "done"}
        found = watch._lost(beats, last, timeout_s=8)
        assert (found is None) == (second <= 13), (second, found)
    assert found == ("process 1 was not heard of for 14 s (on b, last at step 4 (waiting for its batch)): killed, "
                     "stopped or cut off")
    assert "process 2 was not heard of for 9 s (it never said anything)" in watch._lost({}, {2: ("", 10.0)}, 8)


def test_settings_that_make_no_sense_are_refused():
    for changes in (dict(timeout_s=-1), dict(startup_s=0), dict(peer_timeout_s="60"), dict(save_s=True)):
        with pytest.raises(UserError, match=f"WatchConfig.{next(iter(changes))} must be"):
            WatchConfig(**changes)


def test_the_first_of_a_kind_may_take_longer(tmp_path, monkeypatch):
    """It may have to be compiled. Then its time is that of all others."""
    ended = []
    guard = Watch(WatchConfig(timeout_s=0.2, startup_s=60), tmp_path, "logs")
    monkeypatch.setattr(guard, "_end", lambda problem, *_, **__: (ended.append(problem), guard._closed.set()))
    with guard:
        guard.at(1, "waiting for the device")
        time.sleep(0.6)
        assert not ended
        guard.at(2, "waiting for the device")
        time.sleep(0.6)
    assert len(ended) == 1 and "at step 2 (waiting for the device)" in ended[0]
