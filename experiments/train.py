"""Trains a model from a prepared data directory into a run directory; the same command continues a run that stopped.

Exit status: 0 when the run is complete, 143 or 130 after SIGTERM or Ctrl-C (a checkpoint was saved), 2 for an error
that you can put right, such as a loss that is not finite, 75 when the run stood still or lost a process and the same
command should be started again (docs/launching.md).
"""

from __future__ import annotations

import pathlib
import sys

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402

DEFAULT_FILES = ("gin/runs/quickstart.gin",)
EXAMPLES = (
    "python -m experiments.train",
    "python -m experiments.train --gin.NUM_STEPS=2000 --gin.RUN_DIR=\"'runs/longer'\"",
    "python -m experiments.train --gin_file=gin/runs/pretrain_8b.gin --print_config",
)


def main(argv: list[str] | None = None) -> int:
    """Runs `llm_jax.training.loop.train` with what Gin binds."""
    return cli.gin_main("llm_jax.training.loop:train", DEFAULT_FILES, argv, description=__doc__, examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(cli.run(main))
