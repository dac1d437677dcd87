"""Makes a Hugging Face checkpoint of a run directory: a folder that `transformers` loads."""

from __future__ import annotations

import pathlib
import sys

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402

EXAMPLES = (
    "python -m experiments.export_hf --run_dir=runs/quickstart --hf_dir=exports/quickstart",
    "python -m experiments.export_hf --run_dir=runs/qwen --hf_dir=exports/qwen --dtype=bfloat16",
)


def export_hf(run_dir: str, hf_dir: str, dtype: str | None = None, step: int | None = None) -> None:
    """Exports a run's parameters, config.json, tokenizer and chat template.

    Args:
      run_dir: run directory of the model, on a local disk; it may be read-only
      hf_dir: folder to make; must not be there yet
      dtype: of the weights: float32, bfloat16 or float16; by default as they were imported, float32 if they were not
      step: of the checkpoint; by default the latest
    """
    from llm_jax.interop.exporting import export_run

    print(export_run(run_dir, hf_dir, dtype, step, progress=True))


def main(argv=None) -> int:
    """Exports; returns the exit status."""
    return cli.gin_main("experiments.export_hf:export_hf", (), argv, description=__doc__, examples=EXAMPLES, flags=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
