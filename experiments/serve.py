"""Serves the model of a run directory or a Hugging Face folder over gRPC and HTTP, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import pathlib
import sys

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402

EXAMPLES = (
    "python -m experiments.serve --run_dir=runs/quickstart --port=9000 --http_port=8000",
    "python -m experiments.serve --hf_dir=Qwen3-0.6B --http_port=8000 --keys_file=keys.json --host=0.0.0.0",
    "python -m experiments.serve --run_dir=runs/big --draft_run_dir=runs/small --cache_dtype=int8",
    'python -m serving.client --address=127.0.0.1:9000 --prompt="def main("',
)


def main(argv=None) -> int:
    """Loads, compiles, serves; returns 0 after a shutdown that was asked for."""
    return cli.gin_main("serving.launch:launch", (), argv, description=__doc__, examples=EXAMPLES, flags=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
