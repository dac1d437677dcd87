"""Tells the story of a run in the terminal: its loss, where its time went, and what is wrong with it, if anything.

Each diagnosis comes with the figures that say so and with what to change. Exit status: 0, whatever was found; 2 if
there is no such run.
"""

from __future__ import annotations

import json as json_lib
import pathlib
import shutil
import sys

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402

EXAMPLES = (
    "python -m experiments.inspect_run --run_dir=runs/quickstart",
    "python -m experiments.inspect_run --run_dir=runs/quickstart --json | python -m json.tool",
)


def inspect_run(run_dir: str, json: bool = False) -> None:
    """Prints the page, or with `json` an object: the figures, and `findings` with kind, says, evidence, advice.

    Args:
      run_dir: run directory; the run may still be under way
      json: print one JSON object instead
    """
    from llm_jax import diagnosis
    from llm_jax.diagnosis.page import page, summary

    record = diagnosis.read(run_dir)
    findings = diagnosis.diagnose(record)
    if json:
        print(json_lib.dumps(summary(record) | {"findings": [f.to_dict() for f in findings]}, ensure_ascii=False))
        return
    width = min(max(shutil.get_terminal_size((100, 30)).columns - 2, 60), 120)
    print(page(record, findings, width=width, color=sys.stdout.isatty()))


def main(argv=None) -> int:
    """Inspects; returns the exit status."""
    return cli.gin_main("experiments.inspect_run:inspect_run", (), argv, description=__doc__, examples=EXAMPLES,
                        flags=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
