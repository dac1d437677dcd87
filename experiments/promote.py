"""Promotes a run: copies its newest checkpoint that passed the gate to a run directory that a server is pointed at.

What is copied is everything that serving, evaluating and exporting need, and no optimizer state. If the run's latest
checkpoints failed the gate, it is the last good one before them; if none ever passed, nothing is promoted. A directory
that was promoted before is replaced; a server reads it when it is started again.
"""

from __future__ import annotations

import json as json_lib
import pathlib
import sys

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402

EXAMPLES = (
    "python -m experiments.promote --run_dir=runs/quickstart --to=promoted/quickstart",
    "python -m experiments.promote --run_dir=runs/quickstart --to=promoted/quickstart --step=best",
    "python -m experiments.serve --run_dir=promoted/quickstart",
)


def promote(run_dir: str, to: str, step: str = "good", json: bool = False) -> None:
    """Prints what was promoted.

    Args:
      run_dir: run directory of a run that was trained with a gate (GateConfig.at_most or max_rise)
      to: run directory to write; one that was promoted before is replaced
      step: which checkpoint: good (the newest that passed the gate), best (of the evaluations), or a step that passed
      json: print one JSON object instead of a line
    """
    from llm_jax.training import promotion

    promoted = promotion.promote(run_dir, to, step)
    if json:
        print(json_lib.dumps({"to": to, **promoted}, ensure_ascii=False))
    else:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in promoted["evaluation"].items()
                            if name in ("loss", "bits_per_byte"))
        print(f"promoted step {promoted['step']} of {promoted['from']} to {to} ({figures})")


def main(argv=None) -> int:
    """Promotes; returns the exit status."""
    return cli.gin_main("experiments.promote:promote", (), argv, description=__doc__, examples=EXAMPLES, flags=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
