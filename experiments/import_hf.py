"""Makes a run directory of a Hugging Face checkpoint: one that evaluates, generates, serves and is trained further."""

from __future__ import annotations

import pathlib
import sys

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402

EXAMPLES = (
    "python -m experiments.import_hf --hf_dir=Qwen3-0.6B --run_dir=runs/qwen",
    "python -m experiments.import_hf --hf_dir=Llama-3.1-70B --run_dir=runs/llama --fsdp=16 --tensor=4",
    "python -m experiments.generate --run_dir=runs/qwen --prompt='The first thing to do is'",
)


def import_hf(hf_dir: str, run_dir: str, dtype: str | None = None, fsdp: int = 1, tensor: int = 1,
              expert: int = 1) -> None:
    """Imports a checkpoint, tensor by tensor; prints what it was.

    Args:
      hf_dir: folder with config.json, safetensors and a tokenizer, on a local disk
      run_dir: run directory to make; must not be there yet
      dtype: of the parameters: float32, bfloat16 or float16; by default as they are stored
      fsdp: devices of the mesh axis fsdp that are meant to read it; others can too, with a few reads more
      tensor: likewise of the axis tensor
      expert: likewise of the axis expert
    """
    from llm_jax.interop.importing import import_run
    from llm_jax.parallel.mesh import MeshConfig

    config = import_run(hf_dir, run_dir, MeshConfig(fsdp=fsdp, tensor=tensor, expert=expert), dtype, progress=True)
    print(f"{run_dir}: {config.family}, {config.num_params():,} parameters, {config.num_layers} layers, context "
          f"{config.max_context:,}")


def main(argv=None) -> int:
    """Imports; returns the exit status."""
    return cli.gin_main("experiments.import_hf:import_hf", (), argv, description=__doc__, examples=EXAMPLES, flags=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
