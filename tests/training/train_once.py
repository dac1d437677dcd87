"""Runs `train` in a process of its own: python -m tests.training.train_once RUN_DIR DATA_DIR [name=value ...].

`batches=FILE` writes down a hash of every row as it is handed to the loop; `kill_at=N` kills the process, as
`kill -9` would, when batch N is asked for and the checkpoints begun before are complete;
`hang_at=N` lets the loader hang there instead.
"""

from __future__ import annotations

import ast
import hashlib
import os
import pathlib
import signal
import sys
import time
from typing import Any

from llm_jax.parallel.mesh import MeshConfig
from llm_jax.training import loop, trainer
from llm_jax.training.optimizer import OptimizerConfig
from llm_jax.training.watch import WatchConfig
from tests.training.common import settings


def recording(path: pathlib.Path, kill_at: int | None = None, complete: pathlib.Path | None = None,
              hang_at: int | None = None) -> type:
    """A TrainLoader that appends a line a batch to `path` (its number, and a hash of each row).

    It may kill the process, once `complete` exists, or hang.
    """

    class Recording(trainer.TrainLoader):
        def __next__(self) -> Any:
            if self.state == hang_at:
                time.sleep(1e6)
            if self.state == kill_at:
                while not complete.exists():
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGKILL)
            number, batch = self.state, super().__next__()
            rows = zip(*(batch[name] for name in sorted(batch)), strict=True)
            digests = [hashlib.sha256(b"".join(part.tobytes() for part in row)).hexdigest()[:16] for row in rows]
            with path.open("a") as file:
                file.write(f"{number} {' '.join(digests)}\n")
            return batch

    return Recording


def main() -> None:
    run_dir, data_dir, *rest = sys.argv[1:]
    options = {name: ast.literal_eval(value) for name, value in (argument.split("=", 1) for argument in rest)}
    for name, make in (("optimizer", OptimizerConfig), ("mesh", MeshConfig), ("watch", WatchConfig)):
        if name in options:
            options[name] = make(**options[name])
    batches, kill_at, hang_at = (options.pop(name, None) for name in ("batches", "kill_at", "hang_at"))
    if batches:
        every = settings("", data_dir, **options)["checkpoint_every"]
        complete = pathlib.Path(run_dir, "checkpoints", str((kill_at or 0) // every * every))
        trainer.TrainLoader = recording(pathlib.Path(batches), kill_at, complete, hang_at)
    loop.train(**settings(run_dir, data_dir, **options))


if __name__ == "__main__":
    main()
