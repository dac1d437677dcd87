"""Trains a run for every point of a grid of settings, each in a directory of its own, and ranks them.

The same command goes on where it stopped: finished runs are skipped, unfinished ones continued. A run that fails does
not stop the others. Exit status: 0 if all runs are complete, 1 if any failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402
from llm_jax.errors import UserError  # noqa: E402

HELP = """flags:
  --grid "NAME=VALUE,VALUE"  a setting and its values; may be repeated, for their product
  --out DIR                  where the runs are written, a directory each
  --parallel N               runs at a time [1]
  --json                     print the table as one line of JSON at the end

common flags, handed to each run (see python -m experiments.train --help):
  --gin_file PATH      settings from a file; may be repeated, later files win
  --gin.NAME=VALUE     one setting of all runs
  --print_config       print the command of each run, and stop
  --help               print this and stop

examples:
  python -m experiments.sweep --out=runs/rates --grid "LEARNING_RATE=5e-4,1e-3,2e-3"
  python -m experiments.sweep --out=runs/grid --gin_file=gin/runs/debug.gin --grid "SEED=0,1" --grid "BATCH_SIZE=4,8"
  python -m experiments.compare_runs --run_dirs=runs/rates/LEARNING_RATE=1e-3,runs/rates/LEARNING_RATE=2e-3"""
PLAN = "sweep.json"


class Point(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its directory, made of its settings.
      values: (setting, value as it is written), in the order of the grid.
    """

    name: str
    values: tuple[tuple[str, str], ...]


class Sweep:
    """A grid, and what is done for each of its points."""

    def __init__(self, out: str, points: Sequence[Point], common: Sequence[str]):
        """Nothing is written yet.

        Args:
          out: the sweep's directory, local.
          points: what to run.
          common: flags that all runs get.
        """
        self.out = pathlib.Path(os.path.expanduser(out)).absolute()
        self.points, self.common = list(points), list(common)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._is_ending = False

    def command(self, point: Point) -> list[str]:
        """What trains a point."""
        settings = [f"--gin.{name}={value}" for name, value in point.values]
        return [sys.executable, "-m", "experiments.train", *self.common, *settings,
                f"--gin.RUN_DIR={str(self.out / point.name)!r}"]

    def check(self) -> None:
        """Notes what the sweep is made of; a UserError if the directory holds another one's runs."""
        plan = self.out / PLAN
        if plan.exists():
            before = json.loads(plan.read_text())["common"]
            if before != self.common:
                raise UserError(f"{self.out} holds a sweep with other settings ({' '.join(before) or 'none'}); choose "
                                "another --out, or remove it")
        elif self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"{self.out} is not empty, and holds no sweep")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            plan.write_text(json.dumps({"common": self.common}) + "\n")
        except OSError as error:
            raise UserError(f"can't write to {self.out}: {error.strerror or error}") from error

    def run(self, parallel: int) -> list[dict[str, Any]]:
        """Runs what is not finished; the rows of the table."""
        with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
            futures = [pool.submit(self._run_one, point) for point in self.points]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._end(futures)
                raise

    def _run_one(self, point: Point) -> dict[str, Any]:
        done = result(self.out / point.name)
        if done["status"] == "finished":
            with self._lock:
                print(f"{point.name}: finished before", flush=True)
            return row(point, done)
        log = self.out / f"{point.name}.log"
        with log.open("ab") as file, self._lock:
            if self._is_ending:
                return row(point, {"status": "not run"})
            print(f"{point.name}: training; see {log}", flush=True)
            # In a session of its own: Ctrl-C reaches it through `_end` alone, once, and it saves.
            process = subprocess.Popen(self.command(point), stdout=file, stderr=subprocess.STDOUT, env=_environment(),
                                       stdin=subprocess.DEVNULL, start_new_session=True)
            self._running.add(process)
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        done = result(self.out / point.name)
        if status:
            done |= {"status": "failed", "error": _error(log.read_text(errors="replace"))}
            said = f"failed with status {status}: {done['error']}"
        else:
            said = f"{done['status']}, validation loss {_number(done.get('validation_loss'))}"
        with self._lock:  # lines of runs that end together would mix
            print(f"{point.name}: {said}", flush=True)
        return row(point, done)

    def _end(self, futures: Sequence[concurrent.futures.Future[Any]]) -> None:
        """Asks what is running to save and stop, and waits for it."""
        with self._lock:
            self._is_ending = True
            running = list(self._running)
        for future in futures:
            future.cancel()
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()


def _error(log: str) -> str:
    """The last line that says that it is one, for warnings may follow it; the last of all if none does."""
    lines = log.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])[:300]


def result(run_dir: pathlib.Path) -> dict[str, Any]:
    """What a run directory says of its run; status is "finished", "unfinished" or "not run"."""
    try:
        manifest = json.loads((run_dir / "manifest.json").read_text())
    except (OSError, ValueError):
        return {"status": "not run"}
    metrics = manifest.get("metrics", {})
    evaluations = [e["loss"] for e in manifest.get("evaluations", []) if e["step"] > 0]
    steps = manifest.get("finished_steps", 0)
    is_over = steps > 0 and (steps >= manifest.get("num_steps", 0) or bool(manifest.get("stopped_early")))
    return {"status": "finished" if is_over else "unfinished", "steps": steps,
            "validation_loss": metrics.get("end", {}).get("loss"), "best": min(evaluations, default=None),
            "bits_per_byte": metrics.get("end", {}).get("bits_per_byte"),
            "tokens_per_second": metrics.get("tokens_per_second")}


def row(point: Point, done: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    return {"run": point.name, **dict(point.values), **done}


def grid(axes: Sequence[str]) -> list[Point]:
    """The product of the axes.

    Args:
      axes: each "NAME=VALUE,VALUE"; commas within quotes or brackets belong to a value.

    Raises:
      UserError: an axis has no name or no values, or occurs twice.
    """
    found: dict[str, list[str]] = {}
    for axis in axes:
        name, has_values, text = axis.partition("=")
        values = [value for value in split(text) if value]
        if not has_values or not re.fullmatch(r"[\w./@]+", name.strip()) or not values:
            raise UserError(f"--grid {axis!r} must be NAME=VALUE,VALUE, such as LEARNING_RATE=1e-3,3e-3")
        if name.strip() in found:
            raise UserError(f"--grid names {name.strip()} twice")
        found[name.strip()] = list(dict.fromkeys(values))
    points = [tuple(zip(found, values, strict=True)) for values in itertools.product(*found.values())]
    names = [_file_name("__".join(f"{name}={value}" for name, value in values)) for values in points]
    if len(set(names)) < len(names):  # values that differ in what no file name should have
        names = [f"{i:03d}-{name}" for i, name in enumerate(names)]
    return [Point(name, values) for name, values in zip(names, points, strict=True)]


def split(text: str) -> list[str]:
    """`text` cut at the commas that are in no quotes and no brackets."""
    pieces, piece, depth, quote = [], "", 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            pieces.append(piece.strip())
            piece = ""
            continue
        piece += character
    return [*pieces, piece.strip()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, the best first."""
    names = [name for name in rows[0] if name not in ("run", "status", "steps", "validation_loss", "best", "error",
                                                      "bits_per_byte", "tokens_per_second")]
    heads = ["validation loss", "best", "bits per byte", "tokens/s", "steps", "status", *names]
    cells = [[_number(r.get("validation_loss")), _number(r.get("best")), _number(r.get("bits_per_byte")),
              _number(r.get("tokens_per_second"), ",.0f"), _number(r.get("steps"), ",d"), r["status"],
              *(r.get(name, "") for name in names)] for r in rows]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
                     for line in [heads, *cells])


def ranked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By validation loss; those without one, or with one that is no number, last."""
    def order(r: dict[str, Any]) -> tuple[bool, float]:
        loss = r.get("validation_loss")
        if not isinstance(loss, (int, float)) or loss != loss or r["status"] != "finished":
            return True, 0.0
        return False, loss
    return sorted(rows, key=order)


def _number(value: Any, form: str = ".4f") -> str:
    return format(value, form) if isinstance(value, (int, float)) else "—"


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_.")[:150]


def _environment() -> dict[str, str]:
    """Ours, from which a process that starts in any folder finds the scripts."""
    root = str(pathlib.Path(__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def main(argv: list[str] | None = None) -> int:
    """Sweeps; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    axes, out, parallel, as_json, rest = [], None, "1", False, []
    while arguments:
        argument = arguments.pop(0)
        name, has_value, value = argument.partition("=")
        if name in ("--grid", "--out", "--parallel"):
            if not has_value:
                if not arguments:
                    raise UserError(f"{argument} needs a value")
                value = arguments.pop(0)
            axes, out, parallel = ([*axes, value] if name == "--grid" else axes, value if name == "--out" else out,
                                   value if name == "--parallel" else parallel)
        elif argument == "--json":
            as_json = True
        else:
            rest.append(argument)
    flags = cli.parse(rest)
    if flags.help:
        print(f"usage: python -m experiments.sweep --out=DIR --grid NAME=VALUE,VALUE [--grid …]… [--gin_file PATH]… "
              f"[--gin.NAME=VALUE]…\n\n{(__doc__ or '').strip()}\n\n{HELP}")
        return 0
    if out is None or not axes:
        raise UserError("--out=DIR and at least one --grid NAME=VALUE,VALUE must be given")
    if not parallel.isdigit() or int(parallel) < 1:
        raise UserError(f"--parallel={parallel} must be a whole number of at least 1")
    common = [f"--gin_file={file}" for file in flags.files]
    common += [f"--gin.{name}={value}" for name, value in flags.settings]
    sweep = Sweep(out, grid(axes), common)
    if flags.print_config:
        print("\n".join(shlex.join(sweep.command(point)) for point in sweep.points))
        return 0
    sweep.check()
    rows = ranked(sweep.run(int(parallel)))
    print("\n" + (json.dumps(rows, ensure_ascii=False) if as_json else table(rows)), flush=True)
    return int(any(r["status"] != "finished" for r in rows))


if __name__ == "__main__":
    sys.exit(cli.run(main))
