"""What a run says while it trains: a progress bar, one line per interval, TensorBoard, and `logs/metrics.jsonl`."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from llm_jax import storage

# Dense bfloat16 peak of one JAX device, FLOP/s, by the first words of `jax.Device.device_kind` (longest match wins). A
# device is a chip, but for TPU v2 and v3 (one of a chip's two cores) and TPU7x (one of its two chiplets). Sources: the
# Google Cloud TPU system pages and NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
}


_ROUTER = ("balance_loss", "router_most", "router_least", "router_dropped")


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device in bfloat16, or None where it isn't known (every CPU)."""
    matches = [name for name in PEAK_FLOPS if re.match(rf"{re.escape(name)}\b", device_kind)]  # \b: an L40 is no L4
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def model_flops_utilisation(tokens_per_second: float, flops_per_token: float, device_kind: str,
                            num_devices: int) -> float | None:
    """The share of the devices' peak that the model's own arithmetic uses (Chowdhery et al. 2022, appendix B).

    What remat computes a second time doesn't count. None where the peak isn't known.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * num_devices)


def memory_in_use() -> dict[str, float]:
    """GiB in use: `device` (the process's fullest, where the backend says) and `host` (the process's resident set)."""
    result = {}
    used = [stats.get("bytes_in_use", 0) for d in jax.local_devices() if (stats := d.memory_stats())]
    if used:
        result["device"] = max(used) / 2**30
    try:
        import psutil

        result["host"] = psutil.Process().memory_info().rss / 2**30
    except ImportError:
        pass
    return result


def clock(seconds: float) -> str:
    """A duration as a person reads it: 42s, 3m05s, 2h07m."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(int(round(seconds)), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Reporter:
    """Writes a run's metrics to every place at once. On processes other than the lead it writes nothing."""

    def __init__(self, logs: epath.PathLike, num_steps: int, first_step: int, *, flops_per_token: float,
                 num_devices: int, is_lead: bool = True, tokens: float = 0.0, seconds: float = 0.0,
                 speed: float = 0.0):
        """Opens the places.

        Args:
          logs: the run's `logs` folder.
          num_steps: steps of the whole run.
          first_step: updates already applied, where this process starts.
          flops_per_token: from `ModelConfig.flops_per_token`.
          num_devices: devices of the mesh.
          is_lead: whether this process reports.
          tokens: tokens trained on by earlier processes of the run.
          seconds: time they took.
          speed: tokens per second of that time (compiling takes tokens too, and no part of the time).
        """
        self._is_lead = is_lead
        self._tokens, self._seconds = tokens, seconds
        self._timed_tokens = speed * seconds
        self._num_steps = num_steps
        self._flops_per_token = flops_per_token
        self._num_devices = num_devices
        self._device_kind = jax.devices()[0].device_kind
        self._logs = epath.Path(logs)
        self._bar = self._writer = self._lines = None
        self._is_first = True
        self._begin_interval(first_step)
        self._speed: float | None = None
        if not is_lead:
            return
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            # It imports torch where torch is installed, which takes seconds: only a run that trains pays for it.
            import tensorboardX

            purge_step = first_step + 1 if first_step else None
            self._writer = tensorboardX.SummaryWriter(str(self._logs), purge_step=purge_step, flush_secs=10)
        except ImportError:
            self.say("note: tensorboardX is not installed, so metrics go to logs/metrics.jsonl and not to TensorBoard")
        self._lines = _JsonLines(self._logs / "metrics.jsonl", first_step)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1)

    def say(self, line: str) -> None:
        """Prints a line on stderr, above the progress bar if there is one."""
        if not self._is_lead:
            return
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def pause(self, seconds: float) -> None:
        """Takes time that was spent on something else (an evaluation, a save) out of this interval's speed."""
        self._paused += seconds

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Notes one finished step; `metrics` are host numbers of `training.step.update`.

        Speeds leave out the process's first step, which had to be compiled.
        """
        self._interval_tokens += float(metrics["tokens"])
        self._tokens += float(metrics["tokens"])
        if self._bar is not None:
            fields = {"loss": f"{float(metrics['loss']):.3f}"}
            if self._speed:
                fields |= {"tok/s": f"{self._speed:,.0f}"}
            self._bar.set_postfix(fields, refresh=False)
            if self._is_first:
                self._bar.unpause()
            self._bar.update(step - self._bar.n)
        if self._is_first:
            self._is_first = False
            self._begin_interval(step)

    def interval(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Reports the interval that ends with `step` (updates applied), and begins the next.

        Returns:
          What was written: the step's metrics with perplexity, speed, utilisation, memory. The first step of a process
          has no speed.
        """
        loss = float(metrics["loss"])
        row = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "learning_rate": float(metrics["learning_rate"]),
            "grad_norm": float(metrics["grad_norm"]),
            "param_norm": float(metrics["param_norm"]),
        }
        if float(metrics.get("z_loss", 0.0)):
            row["z_loss"] = float(metrics["z_loss"])
        router = {name: float(metrics[name]) for name in _ROUTER if name in metrics}
        row |= router
        speed, left = "", math.inf
        if steps := step - self._interval_step:  # not after the process's first step alone
            elapsed = max(time.perf_counter() - self._interval_start - self._paused, 1e-9)
            left = (self._num_steps - step) * elapsed / steps
            self._timed_tokens += self._interval_tokens
            self._seconds += elapsed
            self._speed = self._interval_tokens / elapsed
            row |= {"tokens_per_second": self._speed, "seconds_per_step": elapsed / steps}
            speed = f"  {self._speed:,.0f} tokens/s"
            utilisation = model_flops_utilisation(self._speed, self._flops_per_token, self._device_kind,
                                                  self._num_devices)
            if utilisation is not None:
                row["model_flops_utilisation"] = utilisation
                speed += f"  mfu {utilisation:.1%}"
        memory = memory_in_use()
        row |= {f"memory_{where}_gib": gib for where, gib in memory.items()}
        self.write("train", step, row, metrics.get("router_load"))
        used = "".join(f"  {where} {gib:.1f} GiB" for where, gib in memory.items())
        self.say(f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  loss {loss:.4f}  "
                 f"ppl {row['perplexity']:,.1f}  lr {row['learning_rate']:.2e}  grad {row['grad_norm']:.3f}"
                 f"{_load(router)}{speed}{used}  left {clock(left)}")
        self._begin_interval(step)
        return row

    def _begin_interval(self, step: int) -> None:
        self._interval_start, self._interval_tokens, self._interval_step = time.perf_counter(), 0.0, step
        self._paused = 0.0

    def totals(self) -> dict[str, float]:
        """Of the run without compiling, evaluating and saving: `trained_tokens`, `seconds`, `tokens_per_second`."""
        return {"trained_tokens": self._tokens, "seconds": self._seconds,
                "tokens_per_second": self._timed_tokens / self._seconds if self._seconds else 0.0}

    def write(self, kind: str, step: int, row: Mapping[str, float], router_load: np.ndarray | None = None) -> None:
        """Adds `row` to TensorBoard under `kind/` and to `metrics.jsonl` as one line.

        Args:
          kind: "train" or "validation".
          step: updates applied.
          row: name → number.
          router_load: [L, E], from `objectives.balance.load`: a histogram a layer in TensorBoard, a table in the line.
        """
        if not self._is_lead:
            return
        table = {} if router_load is None else {"router_load": np.asarray(router_load, np.float64).round(4).tolist()}
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)
            for layer, load in enumerate([] if router_load is None else router_load):
                self._writer.add_histogram(f"{kind}/router_load/{layer:02d}", np.asarray(load), step)
        if self._lines is not None:
            self._lines.add({"kind": kind, "step": step, "time": round(time.time(), 3), **row, **table})

    def flush(self) -> None:
        """Brings everything to disk; what a checkpoint has seen should not be lost in a crash after it."""
        if self._writer is not None:
            self._writer.flush()
        if self._lines is not None:
            self._lines.flush()

    def close(self) -> None:
        """Flushes everything and takes the bar away."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        if self._lines is not None:
            self._lines.flush()


def _load(router: Mapping[str, float]) -> str:
    """The experts' load for the line that people read: its range relative to even, and what was dropped."""
    if not router:
        return ""
    dropped = f" dropped {router['router_dropped']:.1%}" if router["router_dropped"] else ""
    return f"  experts {router['router_least']:.2f}–{router['router_most']:.2f}{dropped}"


class _JsonLines:
    """A growing file of JSON lines that is only ever replaced whole, so that it works in a bucket and is never torn."""

    def __init__(self, path: epath.Path, first_step: int):
        self._path = path
        self._lines: list[str] = []
        self._write_after = 0.0
        if path.exists():
            # What was reported after the checkpoint that this process starts from will be reported again.
            self._lines = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]

    def add(self, row: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps({name: _plain(value) for name, value in row.items()}))
        if time.monotonic() > self._write_after:
            self.flush()

    def flush(self) -> None:
        began = time.monotonic()
        storage.write_atomically(self._path, "".join(line + "\n" for line in self._lines).encode())
        # The longer a run's file, the more seldom it is written: never more than a twentieth of the time.
        self._write_after = time.monotonic() + max(5.0, 20 * (time.monotonic() - began))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
