"""Replays an arrival trace against this engine and against what else would serve the same weights on a CPU.

    make benchmark-serve                                              # all of it, under 30 minutes on two cores
    python -m benchmarks.serve_trace --trace=AzureLLMInferenceTrace_conv.csv
    python -m benchmarks.serve_trace --models=9m --contenders=engine,static_batching --rounds=5
    python -m benchmarks.serve_trace --models=9m --requests=8 --rounds=1 --most_others=1   # does it run at all?

Contenders: this engine through its gRPC server, with continuous (engine) and static batching (static_batching: the same
kernels, slots and unpadded prompts); transformers' generate on padded batches in order of arrival (hf_generate_N); its
continuous batching (hf_continuous_batching). All get the same requests, weights (random, float32) and cores. Only the
tokens that a request asked for count. By default all requests are there from the start, so that every contender
is saturated; then the engine is replayed once more at a share of that load, which is what latencies are for.

Contenders take turns; medians over rounds are reported. A run during which other processes took more than a tenth of
the CPU is discarded and repeated. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import report
from benchmarks.serve_trace import noise, results, trace
from benchmarks.serve_trace.results import CONTINUOUS, ENGINE, STATIC, Served
from benchmarks.serve_trace.workers import ROOT, Worker

SHARES = {"9m": 0.35, "88m": 0.65}  # of the time
REQUESTS = {"9m": 128, "88m": 96}
VOCAB_SIZE, MAX_CONTEXT = 8192, 1024
GENERATE = "hf_generate_"
CONTENDERS = (ENGINE, STATIC, f"{GENERATE}1", f"{GENERATE}8", f"{GENERATE}32", CONTINUOUS)
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "grpcio", "torch", "transformers")
WARM_UP = [(0.0, 40, 4), (0.0, 150, 3), (0.0, 7, 5)]

Run = Callable[[Sequence[trace.Request]], list[Served]]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_trace", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def some(known: Sequence[str]) -> Callable[[str], list[str]]:
        def names(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := set(chosen) - set(known):
                raise argparse.ArgumentTypeError(f"{sorted(unknown)[0]!r} is not one of {', '.join(known)}")
            return chosen
        return names

    add = parser.add_argument
    add("--trace", help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens; by default a synthetic one is drawn")
    add("--models", type=some(list(SHARES)), default=list(SHARES), help=",".join(SHARES))
    add("--contenders", type=some(CONTENDERS), default=list(CONTENDERS), help=",".join(CONTENDERS))
    add("--requests", type=int, help="how many, evenly spaced over the trace (default "
        f"{', '.join(f'{count} for {model}' for model, count in REQUESTS.items())})")
    add("--scale", type=float, default=1 / 8, help="of prompt and output lengths (default 1/8: the trace's usual 4,096 "
        "tokens become 512, half of the model's context, and what is longer still mostly fits)")
    add("--load", type=float, default=math.inf, help="output tokens asked for in a second, as a multiple of what the "
        "engine makes; by default everything is asked at once")
    add("--latency_load", type=float, default=0.7, help="the same for the replay that latencies are read from; 0: none")
    add("--rounds", type=int, default=3, help="most rounds (default 3)")
    add("--repeats", type=int, default=2, help="most repetitions of a run that others disturbed (default 2)")
    add("--most_others", type=float, default=0.1, help="CPU share of other processes that discards a run")
    add("--minutes", type=float, default=21.0, help="no round begins that would end later (default 21)")
    add("--threads", type=int, default=2, help="cores for everything (default 2)")
    add("--seed", type=int, default=0)
    add("--options", default="{}", help='of the engine, e.g. \'{"chunk": 128}\'')
    add("--dir", type=pathlib.Path, help="where to make and keep the weights; by default they are thrown away")
    return parser.parse_args(argv)


def arrivals_of(args: argparse.Namespace, count: int) -> tuple[list[trace.Arrival], str]:
    """That many scaled requests, and what is to be said about where they come from."""
    if args.trace:
        whole = trace.read(args.trace)
        source, law = pathlib.Path(args.trace).name, trace.fit(whole)
        said = f"trace: {source}, {len(whole):,} requests"
    else:
        law = trace.AZURE_CONVERSATION
        whole = trace.synthetic(law, count, args.seed)
        said = "trace: synthetic, fitted to the Azure conversation trace of 2023 (no --trace)"
    said += (f"; prompts of median {law.prompt_median:.0f} (sigma {law.prompt_sigma:.2f}), outputs of median "
             f"{law.output_median:.0f} ({law.output_sigma:.2f}), {law.rate:.2f} requests/s")
    made = trace.scaled(trace.thinned(whole, count), args.scale, MAX_CONTEXT)
    prompts, outputs = [a.prompt for a in made], [a.output for a in made]
    return made, (f"{said}\nreplayed: {len(made)} requests, lengths × {args.scale:g}: prompts {sum(prompts):,} tokens "
                  f"(longest {max(prompts)}), outputs {sum(outputs):,} tokens (longest {max(outputs)})")


def engine_options(args: argparse.Namespace) -> str:
    """Fields of EngineConfig, as JSON."""
    return json.dumps({"max_context": MAX_CONTEXT} | json.loads(args.options))


def contenders(names: Sequence[str], run_dir: str, hf_dir: str, args: argparse.Namespace, logs: pathlib.Path,
               stack: contextlib.ExitStack) -> dict[str, Run]:
    """Starts the processes of the contenders; each is then a function that replays requests."""
    def worker(name: str, *arguments: str, ready: str = "ready") -> Worker:
        made = Worker(f"benchmarks.serve_trace.{name}", list(arguments), logs / f"{len(list(logs.iterdir()))}.log",
                      ready)
        stack.callback(made.close)
        return made

    def asked(to: Worker, command: str, requests: Sequence[trace.Request], **values: Any) -> list[Served]:
        found = to.ask(command, requests=[dataclasses.asdict(r) for r in requests], **values)
        return [Served(s["at"], s["first"], s["last"], s["output"]) for s in found]

    made: dict[str, Run] = {}
    load: Worker | None = None
    generate: Worker | None = None
    for name in names:
        if name in (ENGINE, STATIC):
            load = load or worker("load")
            server = worker("engine", f"--run_dir={run_dir}", f"--options={engine_options(args)}",
                            f"--batching={'static' if name == STATIC else 'continuous'}", ready="ready: ")
            made[name] = functools.partial(asked, load, "replay", address=server.ready_line.split()[1])
        elif name == CONTINUOUS:
            hf = worker("huggingface", f"--hf_dir={hf_dir}", f"--threads={args.threads}")
            made[name] = functools.partial(asked, hf, "continuous")
        else:
            generate = generate or worker("huggingface", f"--hf_dir={hf_dir}", f"--threads={args.threads}")
            made[name] = functools.partial(asked, generate, "generate", batch=int(name.removeprefix(GENERATE)))
    return made


def measure(model: str, arrivals: Sequence[trace.Arrival], args: argparse.Namespace, seconds: float,
            directory: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
    """One model: rounds of all contenders, a table on stdout; returns summaries by contender, and the bound."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "benchmarks.serve_trace.weights", model, str(directory)], check=True,
                   cwd=ROOT, stdout=sys.stderr)
    run_dir, hf_dir = str(directory / model / "run"), str(directory / model / "huggingface")
    with contextlib.ExitStack() as stack:
        logs = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-trace-logs-")))
        bound = static_bound(run_dir, arrivals, args, logs) if {ENGINE, STATIC} <= set(args.contenders) else None
        replays = contenders(args.contenders, run_dir, hf_dir, args, logs, stack)
        warm = trace.requests([trace.Arrival(*w) for w in WARM_UP], VOCAB_SIZE, args.seed)
        for replay in replays.values():
            replay(warm)
        say(f"{model}: started in {time.perf_counter() - began:.0f} s")

        def at_load(load: float, capacity: float, seed: int) -> list[trace.Request]:
            return trace.requests(trace.timed(arrivals, load * capacity), VOCAB_SIZE, args.seed + seed)

        capacity = 1.0
        if not math.isinf(args.load):
            capacity = results.throughput(replays[args.contenders[0]](at_load(math.inf, 1.0, 1)))
        # Of one round all contenders get the same prompts; of the next, or if a run is repeated, others of the same
        # lengths: nothing is left in a prefix cache.
        kept = noise.interleaved(
            {name: lambda number, attempt, replay=replay: replay(
                at_load(args.load, capacity, 1000 * (attempt + 1) + number)) for name, replay in replays.items()},
            rounds=args.rounds, most_others=args.most_others, repeats=args.repeats,
            seconds=seconds - (time.perf_counter() - began), say=lambda line: say(f"{model}: {line}"))
        found = {name: results.summary([m.result for m in k.good]) for name, k in kept.items()}
        found_counts = {name: (len(k.good), len(k.discarded)) for name, k in kept.items()}
        print(f"\n{model}, {'everything at once' if math.isinf(args.load) else f'load {args.load:g}'}:\n"
              f"{results.table(found, found_counts)}", flush=True)
        calm = {}
        if ENGINE in replays and args.latency_load:
            rate = found[ENGINE]["tokens_per_second"]
            alone = noise.interleaved(
                {ENGINE: lambda number, attempt: replays[ENGINE](at_load(args.latency_load, rate, 500 + attempt))},
                rounds=1, most_others=args.most_others, repeats=args.repeats, seconds=120,
                say=lambda line: say(f"{model}, load {args.latency_load:g}: {line}"))[ENGINE]
            calm = results.summary([m.result for m in alone.good])
            print(f"\n{model}, the engine at {args.latency_load:g} of that load:\n"
                  f"{results.table({ENGINE: calm}, {ENGINE: (len(alone.good), len(alone.discarded))})}", flush=True)
    latency = {name: {p: round(s * 1000, 1) for p, s in calm[name].items()} for name in ("ttft", "tpot", "e2e")
               if name in calm}
    return {"found": found, "bound": bound, "noisy": [name for name, k in kept.items() if k.noisy], "latency": latency}


def static_bound(run_dir: str, arrivals: Sequence[trace.Arrival], args: argparse.Namespace,
                 logs: pathlib.Path) -> float:
    """See `bound`; measured and computed in a process of its own."""
    worker = Worker("benchmarks.serve_trace.bound", [f"--run_dir={run_dir}", f"--options={engine_options(args)}"],
                    logs / "bound.log")
    try:
        found = worker.ask("bound", lengths=[(a.prompt, a.output) for a in arrivals])
    finally:
        worker.close()
    print("steps, ms: " + ", ".join(f"{name} {cost * 1000:.1f}" for name, cost in found["costs"].items()))
    print(f"bound: by these costs static batching takes {found['static_s']:.1f} s, the engine's own schedule "
          f"{found['continuous_s']:.1f} s, and none less than {found['least_s']:.1f} s: at most {found['bound']:.2f} × "
          f"(were all steps alike and prompts free, {found['by_steps']:.2f} ×)", flush=True)
    return found["bound"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures; the last line of its output is JSON."""
    args = parse(argv)
    say = report.begin(PACKAGES, args.threads)
    measured = {}
    whole = sum(SHARES[m] for m in args.models)
    with tempfile.TemporaryDirectory(prefix="serve-trace-") as scratch:
        for model in args.models:
            arrivals, said = arrivals_of(args, args.requests or REQUESTS[model])
            print(f"\n{model}\n{said}", flush=True)
            measured[model] = measure(model, arrivals, args, args.minutes * 60 * SHARES[model] / whole,
                                      args.dir or pathlib.Path(scratch), say)
    made = results.line(
        {m: {name: s["tokens_per_second"] for name, s in found["found"].items()} for m, found in measured.items()},
        {m: found["bound"] for m, found in measured.items() if found["bound"] is not None})
    noisy = [f"{m}/{name}" for m, found in measured.items() for name in found["noisy"]]
    made["engine_latency_ms"] = {m: found["latency"] for m, found in measured.items() if found["latency"]}
    print(json.dumps(made | {"trace": pathlib.Path(args.trace).name if args.trace else "synthetic", "noisy": noisy}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
