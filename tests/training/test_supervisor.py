"""A run that is killed ten times, some of them inside a checkpoint write, ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import time

import numpy as np

from llm_jax.training import loop
from tests.training.common import settings
from tests.training.launch import Launched
from tests.training.test_loop import saved_arrays

KILLS = 10
OPTIONS = dict(num_steps=48, checkpoint_every=2, keep=2, eval_batches=1, log_every=8)


def temporaries(run_dir: pathlib.Path) -> set[str]:
    folder = run_dir / "checkpoints"
    return {path.name for path in folder.iterdir() if "tmp" in path.name} if folder.exists() else set()


def saved_steps(run_dir: pathlib.Path) -> list[int]:
    folder = run_dir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def kill_somewhere(run: Launched, run_dir: pathlib.Path, longest: float, draw: random.Random,
                   in_a_write: bool) -> bool:
    """Kills a run at a random moment, or a random moment after it began to write some checkpoint.

    A run that got on by three checkpoints is killed in any case, so that it is not done before the last kill.

    Returns:
      Whether it was killed inside a write.
    """
    deadline, before = time.monotonic() + draw.uniform(0, longest), saved_steps(run_dir)[-1:] or [0]
    writes, seen, patience = draw.randint(1, 2), set(temporaries(run_dir)), draw.uniform(0, 0.05)
    while run.process.is_alive():
        new = temporaries(run_dir) - seen
        if in_a_write and new:
            seen |= new
            writes -= 1
            if writes == 0:
                time.sleep(patience)
                break
        far = (saved_steps(run_dir)[-1:] or [0])[0] >= before[0] + 3 * OPTIONS["checkpoint_every"]
        if far or not in_a_write and time.monotonic() > deadline:
            break
        time.sleep(0.002)
    run.process.kill()
    assert run.join() == -signal.SIGKILL, f"it ended before it was killed\n{run.said}"
    return bool(temporaries(run_dir))


def test_ten_kills_and_a_damaged_checkpoint_change_no_bit_of_the_result(data_dir, tmp_path):
    seed = int(os.environ.get("SUPERVISOR_SEED") or random.SystemRandom().randrange(10**6))
    print(f"SUPERVISOR_SEED={seed} repeats this")
    draw = random.Random(seed)
    began = time.monotonic()
    straight = loop.train(**settings(tmp_path / "straight", data_dir, **OPTIONS))
    longest = time.monotonic() - began  # a start in a process of its own takes longer than this one did

    run_dir, log = tmp_path / "run", tmp_path / "log"
    inside = 0
    for number in range(KILLS):
        run = Launched(log, run_dir, data_dir, **OPTIONS)
        inside += kill_somewhere(run, run_dir, longest, draw, in_a_write=number % 2 == 1)
    assert inside, "no kill fell inside a write"

    newest = saved_steps(run_dir)[-1]
    victim = draw.choice([path for path in (run_dir / "checkpoints" / str(newest) / "params").rglob("d/*")])
    content = bytearray(victim.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    victim.write_bytes(content)
    last = Launched(log, run_dir, data_dir, **OPTIONS)
    assert last.join() == 0, last.said
    said = last.said
    assert f"warning: checkpoint {run_dir / 'checkpoints' / str(newest)} is damaged" in said
    assert f"the run goes on from step {newest - OPTIONS['checkpoint_every']}" in said
    assert (run_dir / "checkpoints" / f"damaged-{newest}").is_dir()

    one, other = saved_arrays(tmp_path / "straight"), saved_arrays(run_dir)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["metrics"]["end"] == straight["end"] and manifest["finished_steps"] == OPTIONS["num_steps"]
    rows = [json.loads(line) for line in (run_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(8, 49, 8))
    left = [str(path) for path in run_dir.rglob("*") if "tmp" in path.name or path.name.startswith(".")]
    assert not left and not (run_dir / "trainer.lock").exists()
