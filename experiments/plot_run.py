"""Draws the loss curve of a run from its logs, as a picture (PNG, SVG or PDF by the file's name). Needs matplotlib."""

from __future__ import annotations

import pathlib
import sys

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402

EXAMPLES = ("python -m experiments.plot_run --run_dir=runs/quickstart --out=loss.png",)


def plot(run_dir: str, out: str) -> None:
    """Draws training and validation loss over tokens, with the unigram model's loss to compare.

    Args:
      run_dir: run directory
      out: picture to write
    """
    from llm_jax import runs
    from llm_jax.errors import UserError
    from llm_jax.training.metric_log import METRICS, read_rows

    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plot_run needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    run = runs.load(run_dir)
    logs = run.directory / runs.LOGS
    if not (logs / METRICS).exists():
        raise UserError(f"{run_dir} has no readable logs/{METRICS}")
    records = read_rows(logs)
    train, validation = ([r for r in records if r["kind"] == kind] for kind in ("train", "validation"))
    if not train:
        raise UserError(f"{run_dir} has no training steps in its log yet")
    figure, axes = plt.subplots(figsize=(7, 4), dpi=150)
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], color="#7aa6d8", lw=1, label="training")
    axes.plot([r["step"] for r in validation], [r["loss"] for r in validation], "o-", color="#1f3b5c", ms=4, lw=1.5,
              label="validation")
    unigram, last = run.manifest.get("metrics", {}).get("unigram_bits_per_byte"), validation[-1] if validation else {}
    if unigram and last.get("bits_per_byte"):
        level = unigram * last["loss"] / last["bits_per_byte"]  # bits per byte → nats per token of the same text
        axes.axhline(level, color="#b04a4a", ls="--", lw=1, label="unigram model")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None),
             title=f"{run.directory.name}: {run.config.num_params() / 1e6:.1f} M parameters")
    if last.get("bits_per_byte"):
        axes.annotate(f"{last['bits_per_byte']:.2f} bits per byte", (last["step"], last["loss"]), xytext=(0, 10),
                      textcoords="offset points", ha="right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out)
    print(f"wrote {out}")


def main(argv=None) -> int:
    """Draws; returns the exit status."""
    return cli.gin_main("experiments.plot_run:plot", (), argv, description=__doc__, examples=EXAMPLES, flags=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
