"""Tokens a second of this trainer, and of transformers with torch, on the same model, batches and optimizer.

    make benchmark-train                                   # all of it, under 20 minutes on two cores
    python -m benchmarks.train_speed --rounds=15           # more rounds; in an environment with torch and transformers
    python -m benchmarks.train_speed --shape=tiny --rounds=1 --most_others=1   # does it run at all?

Contenders: this trainer's real step (llm_jax), and torch with transformers' Llama, eager (torch_eager) and through
torch.compile (torch_compile). All begin with the same weights and see the same batches; the losses they come to are
printed, and differ only by rounding (and by what torch.autocast rounds, on a GPU). Each has the setting
that was fastest of those tried (docs/performance.md), and the same threads and memory allocator.

On the CPU they take turns, round by round; medians over rounds are reported, ratios are medians of each round's own. A
run during which other processes took more than a tenth of the CPU is discarded and repeated. Where there is an NVIDIA
GPU, one-billion-parameter models in bfloat16 follow, one process after the other, since they fill its memory. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.serve_trace import noise
from benchmarks.serve_trace.workers import Worker
from benchmarks.train_contenders import SHAPES

OURS, EAGER, COMPILED = "llm_jax", "torch_eager", "torch_compile"
CONTENDERS = (OURS, EAGER, COMPILED)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
WARM_UP_STEPS = 10
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}

def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_speed", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="9m", help="what is trained on the CPU (default 9m: vocabulary 8,192, "
        "width 256, 6 layers, 8 heads, mlp 768, 8 × 256 tokens, float32)")
    add("--contenders", default=",".join(CONTENDERS), help=f"some of {', '.join(CONTENDERS)}")
    add("--rounds", type=int, default=9, help="most rounds (default 9)")
    add("--steps", type=int, default=8, help="steps of a contender in a round (default 8)")
    add("--repeats", type=int, default=2, help="most repetitions of a run that others disturbed (default 2)")
    add("--most_others", type=float, default=0.1, help="CPU share of other processes that discards a run")
    add("--minutes", type=float, default=10.0, help="no round on the CPU begins that would end later (default 10)")
    add("--threads", type=int, default=2, help="cores for everything (default 2)")
    add("--options", default="{}", help='of `Execution`, e.g. \'{"loss_chunk": 512}\'')
    add("--gpu_shape", default="1b", help="what is trained on a GPU, or none (default 1b)")
    add("--gpu_options", default="{}", help="of `Execution` there")
    args = parser.parse_args(argv)
    args.contenders = args.contenders.split(",")
    if unknown := set(args.contenders) - set(CONTENDERS):
        parser.error(f"{sorted(unknown)[0]!r} is not one of {', '.join(CONTENDERS)}")
    return args


def started(name: str, shape: str, device: str, hf_dir: str, args: argparse.Namespace, log: pathlib.Path) -> Worker:
    """A contender's process."""
    if name == OURS:
        kind, options = "jax", json.loads(args.options if device == "cpu" else args.gpu_options)
    else:
        kind, options = "torch", {"compiled": name == COMPILED, "threads": args.threads, "device": device}
    return Worker("benchmarks.train_contenders", [f"--contender={kind}", f"--shape={shape}", f"--hf_dir={hf_dir}",
                                                  f"--options={json.dumps(options)}"], log)


def on_cpu(args: argparse.Namespace, scratch: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Interleaved rounds of all contenders; see `summary`."""
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        losses: dict[str, float] = {}
        for name in sorted(args.contenders, key=lambda name: name != OURS):  # ours writes the weights
            workers[name] = started(name, args.shape, "cpu", str(scratch / "cpu"), args, scratch / f"{name}.log")
            stack.callback(workers[name].close)
            first = workers[name].ask("train", count=WARM_UP_STEPS)
            losses[name] = first["loss"]
            say(f"{name}: {first['seconds']:.0f} s for the first {WARM_UP_STEPS} steps, compiling included")

        def measured(worker: Worker, number: int, attempt: int) -> float:
            del number, attempt
            return worker.ask("train", count=args.steps)["seconds"]

        kept = noise.interleaved({name: functools.partial(measured, worker) for name, worker in workers.items()},
                                 rounds=args.rounds, most_others=args.most_others, repeats=args.repeats,
                                 seconds=args.minutes * 60, say=say)
        peak = max(worker.ask("peak", size=PEAK_SIZE["cpu"], seconds=2.0) for worker in workers.values())
        flops = workers[OURS].ask("flops_per_token") if OURS in workers else None
    found = {name: {m.round: m.result for m in k.good} for name, k in kept.items()}
    return summary(found, losses, SHAPES[args.shape].tokens * args.steps, peak, flops) | {
        "noisy": [name for name, k in kept.items() if k.noisy]}


def on_gpu(args: argparse.Namespace, scratch: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
    """One contender after the other, each in a process of its own that has the GPU's memory to itself."""
    found: dict[str, dict[int, float]] = {}
    losses: dict[str, float] = {}
    peaks, flops = [], None
    for name in sorted(args.contenders, key=lambda name: name != OURS):
        worker = started(name, args.gpu_shape, "cuda", str(scratch / "gpu"), args, scratch / f"gpu-{name}.log")
        try:
            losses[name] = worker.ask("train", count=WARM_UP_STEPS)["loss"]
            peaks.append(worker.ask("peak", size=PEAK_SIZE["cuda"], seconds=2.0))
            flops = worker.ask("flops_per_token") if name == OURS else flops
            found[name] = {number: worker.ask("train", count=args.steps)["seconds"] for number in range(args.rounds)}
        finally:
            worker.close()
        say(f"GPU, {name}: {args.rounds} rounds of {args.steps} steps")
    return summary(found, losses, SHAPES[args.gpu_shape].tokens * args.steps, max(peaks), flops)


def summary(found: Mapping[str, Mapping[int, float]], losses: Mapping[str, float], tokens: int, peak: float,
            flops_per_token: float | None) -> dict[str, Any]:
    """What is printed last.

    Args:
      found: seconds by contender and round.
      losses: by contender, after the same steps.
      tokens: of a contender's part of a round.
      peak: FLOP/s of a large matrix product, the best that any contender's library reached.
      flops_per_token: of the model.
    Returns:
      `tokens_per_second` and `loss` by contender, `spread` ((most − least) / median), `matmul_peak_gflops`, and where
      they were measured `ratio_to_torch_eager`, `ratio_to_torch_compile` and `mfu` by contender: the share of that
      peak that the model's own arithmetic takes.
    """
    speeds = {name: {number: tokens / seconds for number, seconds in rounds.items()}
              for name, rounds in found.items()}
    median = {name: statistics.median(rounds.values()) for name, rounds in speeds.items()}
    made: dict[str, Any] = {
        "tokens_per_second": {name: round(value, 1) for name, value in median.items()},
        "spread": {name: round((max(rounds.values()) - min(rounds.values())) / median[name], 3)
                   for name, rounds in speeds.items()},
        "loss": {name: round(loss, 4) for name, loss in losses.items()},
        "matmul_peak_gflops": round(peak / 1e9, 1)}
    for name in (EAGER, COMPILED):
        if OURS in speeds and name in speeds:
            both = sorted(set(speeds[OURS]) & set(speeds[name]))
            ratios = [speeds[OURS][i] / speeds[name][i] for i in both] or [median[OURS] / median[name]]
            made[f"ratio_to_{name}"] = round(statistics.median(ratios), 3)
    if flops_per_token:
        made["mfu"] = {name: round(value * flops_per_token / peak, 3) for name, value in median.items()}
    return made


def table(made: Mapping[str, Any]) -> str:
    """A row a contender."""
    lines = [f"{'contender':<16}{'tokens/s':>12}{'spread':>9}{'of peak':>9}{'loss':>9}"]
    for name, speed in made["tokens_per_second"].items():
        share = f"{made['mfu'][name]:.0%}" if "mfu" in made else "-"
        lines.append(f"{name:<16}{speed:>12,.1f}{made['spread'][name]:>9.0%}{share:>9}{made['loss'][name]:>9.4f}")
    return "\n".join([*lines, f"a large matrix product: {made['matmul_peak_gflops']:,.0f} GFLOP/s"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures; the last line of its output is JSON."""
    args = parse(argv)
    say = report.begin(PACKAGES, args.threads)
    with tempfile.TemporaryDirectory(prefix="train-speed-") as directory:
        scratch = pathlib.Path(directory)
        platforms = os.environ.pop("JAX_PLATFORMS", None)
        os.environ["JAX_PLATFORMS"] = "cpu"
        made = on_cpu(args, scratch, say)
        print(f"\nCPU, {args.shape}, float32\n{table(made)}", flush=True)
        os.environ.pop("JAX_PLATFORMS")
        if args.gpu_shape != "none" and shutil.which("nvidia-smi") and platforms != "cpu":
            gpu = on_gpu(args, scratch, say)
            print(f"\nGPU, {args.gpu_shape}, {SHAPES[args.gpu_shape].dtype}\n{table(gpu)}", flush=True)
            made["gpu"] = gpu
    print(json.dumps(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
