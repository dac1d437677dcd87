"""Seconds from the command to the first step's line, of the quickstart's model, with a cold and a warm compile cache.

    python -m benchmarks.startup                                   # prepares text, then one cold and three warm starts
    python -m benchmarks.startup --data_dir=data/quickstart --runs=5 --imports

Every start is a new process with a new run directory, ended when it has said what its first step took. Printed is when
each line of the run came, and with --imports the packages whose import took longest. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIRST_STEP = "the first step took"
SLOWEST = 20  # imports that are listed


def start(run_dir: pathlib.Path, data_dir: str, cache: pathlib.Path, python: tuple[str, ...] = ()) -> list[
        tuple[float, str]]:
    """One start: when, in seconds since the command, each line came, up to the first step's.

    Args:
      run_dir: a new one.
      data_dir: what `experiments.prepare` made.
      cache: of compiled programs.
      python: options of the interpreter.
    Raises:
      SystemExit: the run ended before its first step.
    """
    command = [sys.executable, *python, "-m", "experiments.train", "--gin_file=gin/runs/quickstart.gin",
               f"--gin.RUN_DIR={str(run_dir)!r}", f"--gin.DATA_DIR={data_dir!r}"]
    lines = []
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                          env=os.environ | {"XDG_CACHE_HOME": str(cache)}) as process:
        for line in process.stderr or ():
            lines.append((time.perf_counter() - began, line.rstrip()))
            if FIRST_STEP in line:
                process.kill()
                return lines
    raise SystemExit("\n".join(text for _, text in lines[-15:]))


def slow_imports(lines: list[tuple[float, str]]) -> list[str]:
    """The packages with the most time of their own, all their modules together, from `-X importtime`."""
    own: dict[str, int] = {}
    for _, line in lines:
        if found := re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", line):
            package = ".".join(found.group(2).split(".")[:2])
            own[package] = own.get(package, 0) + int(found.group(1))
    slowest = sorted(own.items(), key=lambda item: -item[1])[:SLOWEST]
    return [f"{microseconds / 1e6:6.2f} s  {package}" for package, microseconds in slowest]


def main() -> int:
    """Measures; the last line of its output is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="what experiments.prepare made; by default made anew and thrown away")
    parser.add_argument("--runs", type=int, default=3, help="warm starts (default 3)")
    parser.add_argument("--imports", action="store_true", help="say what importing takes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as directory:
        scratch = pathlib.Path(directory)
        cache = scratch / "cache"
        data_dir = arguments.data_dir or str(scratch / "data")
        if not arguments.data_dir:
            subprocess.run([sys.executable, "-m", "experiments.prepare", f"--gin.DATA_DIR={data_dir!r}"], cwd=ROOT,
                           check=True, stdout=sys.stderr)
        cold = start(scratch / "cold", data_dir, cache)
        print(f"cold: {cold[-1][0]:.1f} s", flush=True)
        warm = []
        for number in range(arguments.runs):
            lines = start(scratch / f"warm{number}", data_dir, cache)
            warm.append(lines[-1][0])
            print(f"warm: {warm[-1]:.1f} s\n" + "\n".join(f"  {at:6.2f} s  {line}" for at, line in lines), flush=True)
        if arguments.imports:
            print("\n".join(slow_imports(start(scratch / "imports", data_dir, cache, ("-X", "importtime")))))
    print(json.dumps({"cold_s": round(cold[-1][0], 2), "warm_s": [round(seconds, 2) for seconds in warm],
                      "warm_median_s": round(statistics.median(warm), 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
