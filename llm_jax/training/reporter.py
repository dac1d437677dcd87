"""What a run says while it trains: a progress bar, a line an interval, TensorBoard, `logs/metrics.jsonl`, pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.models import ModelConfig
from llm_jax.training import pictures
from llm_jax.training.goodput import Goodput, shares
from llm_jax.training.layer_norms import by_layer
from llm_jax.training.metric_log import METRICS, JsonLines, TensorBoard
from llm_jax.training.metrics import clock, memory_in_use, model_flops_utilisation
from llm_jax.training.profiling import check_steps

_ROUTER = ("balance_loss", "router_most", "router_least", "router_dropped")
_DROPPED = ("loss_scale", "overflow_steps", "skipped_steps", "rollbacks")  # where the run's settings give any
_SLOW_DATA = 0.02  # share of an interval from which on the line says it


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What is reported beside the figures of every interval; nothing here changes what is trained.

    Attributes:
      histograms_every: steps between two histograms of parameters and gradients; 0 is never. Each takes the gradient
        of a batch once more.
      attention_maps_every: steps between two pictures of attention to the first tokens of the validation text; 0 is
        never.
      layers: which layers' histograms and pictures; negative ones count from the last.
      profile_steps: the first and the last step of a trace for xprof, in `logs/profile`; None is none.
    """

    histograms_every: int = 0
    attention_maps_every: int = 0
    layers: tuple[int, ...] = (0, -1)
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("histograms_every", "attention_maps_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UserError(f"ReportConfig.{name} must be a whole number of at least 0, not {value!r}")
        check_steps(self.profile_steps)


class Reporter:
    """Writes a run's metrics to every place at once. On processes other than the lead it writes nothing.

    Attributes:
      goodput: where the wall time goes.
    """

    def __init__(self, logs: epath.PathLike, num_steps: int, first_step: int, *, flops_per_token: float,
                 num_devices: int, is_lead: bool = True, config: ModelConfig | None = None,
                 goodput: Goodput | None = None, so_far: Mapping[str, Any] | None = None):
        """Opens the places.

        Args:
          logs: the run's `logs` folder.
          num_steps: steps of the whole run.
          first_step: updates already applied, where this process starts.
          flops_per_token: from `ModelConfig.flops_per_token`.
          num_devices: devices of the mesh.
          is_lead: whether this process reports.
          config: the model's, which names the layers; None reports nothing layer by layer.
          goodput: the clock that has been running since the process began its work; None starts one.
          so_far: `totals` of the run until `first_step`.
        """
        self._is_lead, self._config = is_lead, config
        so_far = so_far or {}
        self._tokens, self._seconds = so_far.get("trained_tokens", 0.0), so_far.get("seconds", 0.0)
        self._timed_tokens = so_far.get("tokens_per_second", 0.0) * self._seconds
        self._num_steps, self._num_devices = num_steps, num_devices
        self._flops_per_token = flops_per_token
        self._device_kind = jax.devices()[0].device_kind
        self._logs = epath.Path(logs)
        self._bar = self._board = self._lines = None
        self._is_first = True
        self._speed: float | None = None
        self.goodput = goodput or Goodput()
        last = None
        if is_lead:
            last = self._open(first_step)
        self.goodput.carry_on(so_far.get("goodput_seconds", {}), last)
        self._begin_interval(first_step)

    def _open(self, first_step: int) -> dict[str, float] | None:
        """Opens the places; returns where the process before last said its time went."""
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            self._board = TensorBoard(self._logs, first_step)
        except ImportError:
            self.say("note: tensorboardX is not installed, so metrics go to logs/metrics.jsonl and not to TensorBoard")
        lines = self._lines = JsonLines(self._logs / METRICS, first_step)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._num_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1)
        row = lines.last_row or {}
        if not isinstance(row.get("goodput"), Mapping):
            return None
        return {name: share * row.get("wall_seconds", 0.0) for name, share in row["goodput"].items()}

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

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is neither step nor evaluation nor save: no part of the speed, and "other" in goodput."""
        began = time.perf_counter()
        with self.goodput.spend("other"):
            yield
        self.pause(time.perf_counter() - began)

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

    def interval(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Reports the interval that ends with `step` (updates applied), and begins the next.

        Returns:
          What was written: the step's metrics with perplexity, speed, utilisation, memory, norms by layer, goodput (of
          the run until now), `data_wait` (share of the interval), `compiles` (in it). The first step of a process has
          no speed.
        """
        loss = float(metrics["loss"])
        row: dict[str, Any] = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "learning_rate": float(metrics["learning_rate"]),
            "grad_norm": float(metrics["grad_norm"]),
            "param_norm": float(metrics["param_norm"]),
        }
        if float(metrics.get("z_loss", 0.0)):
            row["z_loss"] = float(metrics["z_loss"])
        router = {name: float(metrics[name]) for name in _ROUTER if name in metrics}
        row |= router | {name: float(metrics[name]) for name in _DROPPED if name in metrics}
        speed, left = self._speeds(step, row)
        memory = memory_in_use()
        row |= {f"memory_{where}_gib": gib for where, gib in memory.items()}
        waiting = self._times(row)
        if self._config is not None and "layers" in metrics:
            row |= by_layer(metrics["layers"], self._config)
        self.write("train", step, row, metrics.get("router_load"))
        used = "".join(f"  {where} {gib:.1f} GiB" for where, gib in memory.items())
        self.say(f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  loss {loss:.4f}  "
                 f"ppl {_short(row['perplexity'])}  lr {row['learning_rate']:.2e}  grad {row['grad_norm']:.3f}"
                 f"{_load(router)}{speed}{waiting}{used}  left {clock(left)}")
        self._begin_interval(step)
        return row

    def _speeds(self, step: int, row: dict[str, Any]) -> tuple[str, float]:
        """Adds the interval's speeds to the row; returns them as the line says them, and the seconds left."""
        steps = step - self._interval_step
        if not steps:  # the process's first step alone
            return "", math.inf
        elapsed = max(time.perf_counter() - self._interval_start - self._paused, 1e-9)
        self._timed_tokens += self._interval_tokens
        self._seconds += elapsed
        self._speed = self._interval_tokens / elapsed
        row |= {"tokens_per_second": self._speed, "seconds_per_step": elapsed / steps}
        said = f"  {self._speed:,.0f} tokens/s"
        utilisation = model_flops_utilisation(self._speed, self._flops_per_token, self._device_kind, self._num_devices)
        if utilisation is not None:
            row["model_flops_utilisation"] = utilisation
            said += f"  mfu {utilisation:.1%}"
        return said, (self._num_steps - step) * elapsed / steps

    def _times(self, row: dict[str, Any]) -> str:
        """Adds where the time went to the row; returns what the line says of it."""
        seconds = self.goodput.seconds()
        before, whole = self._interval_goodput, sum(seconds.values())
        passed = whole - sum(before.values())
        row["goodput"], row["wall_seconds"] = shares(seconds), whole
        row["data_wait"] = max(seconds["data"] - before["data"], 0.0) / passed if passed > 0 else 0.0
        row["compiles"] = self.goodput.compiles - self._interval_compiles
        return f"  data wait {row['data_wait']:.0%}" if row["data_wait"] >= _SLOW_DATA else ""

    def _begin_interval(self, step: int) -> None:
        self._interval_start, self._interval_tokens, self._interval_step = time.perf_counter(), 0.0, step
        self._interval_goodput, self._interval_compiles = self.goodput.seconds(), self.goodput.compiles
        self._paused = 0.0

    def totals(self) -> dict[str, Any]:
        """What a checkpoint keeps for the process that goes on: `trained_tokens`; `seconds` and `tokens_per_second`
        without compiling, evaluating and saving; `goodput_seconds` by category."""
        return {"trained_tokens": self._tokens, "seconds": self._seconds,
                "tokens_per_second": self._timed_tokens / self._seconds if self._seconds else 0.0,
                "goodput_seconds": self.goodput.seconds()}

    def summary(self) -> dict[str, Any]:
        """`totals` as a manifest says them: `goodput` in shares, of `wall_seconds`."""
        totals = self.totals()
        seconds = totals.pop("goodput_seconds")
        return totals | {"goodput": shares(seconds), "wall_seconds": sum(seconds.values())}

    def write(self, kind: str, step: int, row: Mapping[str, Any], router_load: np.ndarray | None = None) -> None:
        """Adds `row` to TensorBoard under `kind/` and to `metrics.jsonl` as one line.

        Args:
          kind: "train" or "validation".
          step: updates applied.
          row: name → number, or a dict or list of such.
          router_load: [L, E], from `objectives.balance.load`: a histogram a layer in TensorBoard, a table in the line.
        """
        if not self._is_lead:
            return
        table = {} if router_load is None else {"router_load": np.asarray(router_load, np.float64).round(4).tolist()}
        if self._board is not None:
            self._board.add(kind, row, step)
            for layer, load in enumerate([] if router_load is None else router_load):
                self._board.add_values(f"{kind}/router_load/{layer:02d}", np.asarray(load), step)
        if self._lines is not None:
            self._lines.add({"kind": kind, "step": step, "time": round(time.time(), 3), **row, **table})

    def histograms(self, step: int, counted: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds what `pictures.Pictures.histograms` gave to TensorBoard, as `parameters/…` and `gradients/…`."""
        for kind, by_name in counted.items() if self._board is not None else ():
            for name, each in by_name.items():
                self._board.add_histogram(f"{kind}/{name}", each, step)

    def maps(self, step: int, tokens: Sequence[int], drawn: Mapping[int, np.ndarray]) -> None:
        """Adds pictures of attention to TensorBoard and writes them to `logs/attention`, with the row's tokens."""
        if not self._is_lead or not drawn:
            return
        folder = self._logs / "attention"
        storage.write_atomically(folder / "tokens.json", storage.to_json({"token_ids": list(tokens)}))
        for layer, pixels in drawn.items():
            if self._board is not None:
                self._board.add_picture(f"attention/{layer:02d}", pixels, step)
            name = f"step_{step:0{len(str(self._num_steps))}d}_layer_{layer:02d}.png"
            storage.write_atomically(folder / name, pictures.to_png(pixels))

    def flush(self) -> None:
        """Brings everything to disk; what a checkpoint has seen should not be lost in a crash after it."""
        for place in (self._board, self._lines):
            if place is not None:
                place.flush()

    def close(self) -> None:
        """Flushes everything and takes the bar away; the clock goes on."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._lines is not None:
            self._lines.flush()


def _short(perplexity: float) -> str:
    """As people read it, also where a run has gone astray."""
    return f"{perplexity:,.1f}" if perplexity < 1e7 else f"{perplexity:.1e}"


def _load(router: Mapping[str, float]) -> str:
    """The experts' load for the line that people read: its range relative to even, and what was dropped."""
    if not router:
        return ""
    dropped = f" dropped {router['router_dropped']:.1%}" if router["router_dropped"] else ""
    return f"  experts {router['router_least']:.2f}–{router['router_most']:.2f}{dropped}"
