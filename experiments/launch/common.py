"""The command line of a launcher: its own flags, then `--` and what experiments.train gets."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import cli


def main(root: str, argv: Sequence[str] | None, description: str, examples: Sequence[str]) -> int:
    """Runs a launcher's root function, "module:function", whose parameter `train` gets what follows `--`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return cli.gin_main(root, (), [*arguments[:at], *(f"--train={word}" for word in arguments[at + 1:])],
                        description=description, examples=examples, flags=True)
