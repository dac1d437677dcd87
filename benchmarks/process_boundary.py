"""What it costs, or saves, that the engine runs in a process of its own and not in the doors'.

    python -m benchmarks.process_boundary                        # 9.3 M parameters, 1, 8 and 32 streams
    python -m benchmarks.process_boundary --model=none           # no model: the doors and the line alone, at full speed

Two servers of one model, with random weights: the engine in the doors' process, and beside it. Streams over gRPC from
this process, the two taking turns; the idle one costs nothing. Without a model each stream repeats its prompt as fast
as it may, which tells how many tokens a second the doors pass on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import grpc

from benchmarks import report
from serving import messages


def serve_one(run_dir: str, rows: int, apart: bool) -> int:
    """Serves until SIGTERM; without a run directory, a service that repeats the prompt."""
    from serving.engine.child import EngineProcess
    from serving.engine.making import make
    from serving.engine.process import Spec
    from serving.options import ServerOptions
    from serving.server import serve

    def say(line: str) -> None:
        print(line, flush=True)

    arguments: dict[str, Any]
    if run_dir:
        arguments = {"run_dir": run_dir, "hf_dir": None, "layout": {"max_rows": rows, "prefix_cache": False},
                     "options": {}}
        service = (EngineProcess.start(Spec("serving.engine.making:make", arguments)) if apart
                   else make(**arguments, say=say).service)
    else:
        from tests.serving.doubles import CharacterTokenizer
        from tests.serving.engine import fakes

        arguments = {"step_s": 0.0}
        service = (EngineProcess.start(Spec("tests.serving.engine.fakes:make", arguments), CharacterTokenizer())
                   if apart else fakes.make(say, **arguments).service)
    return serve(service, port=0, grace_seconds=0, options=ServerOptions(response_cache_entries=0), on_event=say)


class Contender:
    """A server in a process of its own."""

    def __init__(self, name: str, run_dir: str, rows: int) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "benchmarks.process_boundary", f"--serve={name}",
                                          f"--run_dir={run_dir}", f"--rows={rows}"], text=True, stdout=subprocess.PIPE)
        self.address = ""

    def ready(self) -> None:
        """Waits for it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ready: "):
                self.address = line.split()[1]
                return
        raise SystemExit("the server did not start")

    def cpu(self) -> float:
        """Processor seconds so far, of all its processes."""
        total = 0.0
        for pid in (self._process.pid, *_children(self._process.pid)):
            with contextlib.suppress(OSError):
                fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return total

    def end(self) -> None:
        """Stops it."""
        self._process.terminate()
        self._process.wait()


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(one) for one in file.read().split()]


async def load(address: str, streams: int, tokens: int) -> dict[str, float]:
    """Streams that run together: `tokens_s` of all, `first_ms` to the first token and `gap_ms` between messages."""
    firsts: list[float] = []
    gaps: list[float] = []
    count = 0

    async def one(channel: grpc.aio.Channel, number: int) -> None:
        nonlocal count
        generate = channel.unary_stream(f"/{messages.INFERENCE}/Generate", messages.GenerateRequest.SerializeToString,
                                        messages.GenerateResponse.FromString)
        request = messages.GenerateRequest(text=f"def number_{number}(" + "x, " * 12)
        request.sampling.max_tokens, request.sampling.ignore_eos = tokens, True
        last = time.perf_counter()
        is_first = True
        async for response in generate(request):
            now = time.perf_counter()
            (firsts if is_first else gaps).append(now - last)
            last, is_first = now, False
            count += len(response.token_ids)

    async with grpc.aio.insecure_channel(address) as channel:
        began = time.perf_counter()
        await asyncio.gather(*(one(channel, i) for i in range(streams)))
        wall = time.perf_counter() - began
    return {"tokens_s": count / wall, "first_ms": 1000 * statistics.median(firsts),
            "gap_ms": 1000 * statistics.median(gaps),
            "gap_p99_ms": 1000 * statistics.quantiles(gaps, n=100)[98]}


def compare(contenders: dict[str, Contender], streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of both contenders over the rounds, `cpu_ms` of processor time for a token among them; prints them."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in sorted(contenders, reverse=bool(number % 2)):
            contender = contenders[name]
            cpu = contender.cpu()
            measured = asyncio.run(load(contender.address, streams, tokens))
            measured["cpu_ms"] = 1000 * (contender.cpu() - cpu) / (streams * tokens)
            if number:  # the first round warms up
                found[name].append(measured)
    medians = {name: {key: round(statistics.median(each[key] for each in all_), 3) for key in all_[0]}
               for name, all_ in found.items()}
    for name, values in medians.items():
        print(f"{streams:3d} streams, {name:>8}: " + ", ".join(f"{key} {value:,}" for key, value in values.items()))
    return {"streams": streams, **medians}


def main() -> int:
    """Measures and prints a table, then a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("9m", "88m", "none"), default="9m")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=128, help="of a completion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--serve", choices=("together", "apart"), help=argparse.SUPPRESS)
    parser.add_argument("--run_dir", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve_one(args.run_dir, args.rows, args.serve == "apart")
    report.begin(("jax", "grpcio"), os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = ""
        if args.model != "none":
            subprocess.run([sys.executable, "-m", "benchmarks.serve_trace.weights", args.model, folder], check=True)
            run_dir = os.path.join(folder, args.model, "run")
        contenders = {}
        try:
            for name in ("together", "apart"):  # one after the other: both compile
                contenders[name] = Contender(name, run_dir, args.rows)
                contenders[name].ready()
            found = [compare(contenders, int(streams), args.tokens, args.rounds) for streams in args.streams.split(",")]
        finally:
            for contender in contenders.values():
                contender.end()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
