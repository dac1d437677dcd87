"""One process's part of a training run: batches in, steps sent ahead, metrics, evaluations and checkpoints out.

The loop never waits for the step it has just begun: it looks at metrics two steps late, so the device always has the
next step queued. A bad step is noticed on the device, in the step itself (see `training.step.update`), so looking late
loses nothing.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import signal
import time
from typing import Any

import jax
import numpy as np

from llm_jax import runs, storage
from llm_jax.analysis import preflight
from llm_jax.checkpoints import Checkpoints
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.documents import read_documents
from llm_jax.data.loader import DataConfig, TrainLoader
from llm_jax.errors import UserError
from llm_jax.models import Execution, ModelConfig
from llm_jax.parallel import distributed
from llm_jax.parallel import rules as rules_lib
from llm_jax.parallel.mesh import MeshConfig
from llm_jax.training import origin, resume
from llm_jax.training.assembly import Assembly
from llm_jax.training.evaluator import Evaluator
from llm_jax.training.gates import GateConfig
from llm_jax.training.goodput import Goodput
from llm_jax.training.guard import RecoveryConfig
from llm_jax.training.metrics import clock
from llm_jax.training.optimizer import OptimizerConfig
from llm_jax.training.pictures import Pictures
from llm_jax.training.precision import PrecisionConfig
from llm_jax.training.profiling import Profiler
from llm_jax.training.recovery import Recovery
from llm_jax.training.reporter import ReportConfig, Reporter
from llm_jax.training.signals import StopRequest, TrainingStopped
from llm_jax.training.state import TrainState, init_state
from llm_jax.training.watch import Watch

_LAG = 2  # steps that may be under way before the host looks at their metrics
_STOP_SYNC_STEPS = 10  # how often several processes agree on whether one of them was asked to stop


class Trainer(Assembly):
    """What one process holds while it trains."""

    def __init__(self, run_dir: str, config: ModelConfig, execution: Execution, data: DataConfig,
                 optimizer: OptimizerConfig, mesh: MeshConfig, *, num_steps: int, seed: int, accumulation: int,
                 z_loss: float, eval_batches: int, watch: Watch, init_from: str | None = None,
                 rules: rules_lib.ShardingRules = rules_lib.ShardingRules(),  # noqa: B008 (frozen)
                 precision: PrecisionConfig = PrecisionConfig(),  # noqa: B008 (frozen)
                 recovery: RecoveryConfig = RecoveryConfig(),  # noqa: B008 (frozen)
                 report: ReportConfig = ReportConfig(),  # noqa: B008 (frozen)
                 gates: GateConfig = GateConfig()):  # noqa: B008 (frozen)
        """Checks that the parts fit, in the order of what it costs; nothing is written and nothing compiled."""
        self.run_dir = storage.located(run_dir)
        self.seed, self.init_from = seed, init_from
        super().__init__(config, execution, data, optimizer, mesh, num_steps=num_steps, accumulation=accumulation,
                         z_loss=z_loss, rules=rules, precision=precision, recovery=recovery)
        self.tokenizer = tokenizer_lib.Tokenizer.load(data.data_dir)
        if init_from is not None and resume.read_manifest(run_dir) is None:
            origin.check_tokenizer(init_from, self.tokenizer, data.data_dir)
        needed = self.tokenizer.text_vocab_size
        if needed > config.vocab_size:
            raise UserError(f"ModelConfig.vocab_size={config.vocab_size} is smaller than the tokenizer's "
                            f"{needed} tokens in {data.data_dir}: give the model as many "
                            f"(--gin.ModelConfig.vocab_size={needed}), or prepare the text again "
                            f"with --gin.VOCAB_SIZE={config.vocab_size} and another DATA_DIR")
        index, count = rules_lib.process_rows(self.batch_sharding, data.batch_size)
        self.loader = TrainLoader(data, "train", process_index=index, process_count=count)
        self.checkpoints: Checkpoints | None = None
        self.reporter: Reporter | None = None
        self.profiler: Profiler | None = None
        self.goodput = Goodput()
        self.watch = watch
        self.metrics: dict[str, Any] = {}
        self.evaluator = Evaluator(self, self.tokenizer, eval_batches, gates)
        self.report = report
        self.pictures = Pictures(self, layers=report.layers, histograms_every=report.histograms_every,
                                 attention_maps_every=report.attention_maps_every,
                                 row=lambda: next(iter(read_documents(data.data_dir, "validation")))[1])

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            self.watch.failed(error)
        with contextlib.ExitStack() as stack:  # each is closed whatever another's closing raises
            for part in (self.checkpoints, self.loader, self.reporter, self.profiler, self.goodput):
                if part is not None:
                    stack.callback(part.close)

    def check_memory(self) -> None:
        """Compiles the step, and refuses what can't fit; nothing is written yet."""
        self.watch.at(0, "compiling the step")
        self.prediction = preflight.check(self)

    def create(self, found: dict | None, config_text: str, settings: dict, data_manifest: dict) -> None:
        """Writes the run directory's small files, once, on the lead process; `found` is the manifest that is there."""
        self.metrics = dict((found or {}).get("metrics", {}))
        self.evaluator.open(found)
        self.recovery = Recovery(self.policy, self.run_dir, self.loader, is_lead=distributed.is_lead(), manifest=found)
        if found is None and distributed.is_lead():
            manifest = {
                "settings": settings, "seed": self.seed, "data_dir": str(storage.located(self.data.data_dir)),
                "data_hash": data_manifest["data_hash"], "mesh": dict(self.mesh.shape), "num_steps": self.num_steps,
                "devices": f"{self.mesh.size} × {jax.devices()[0].device_kind}", "processes": jax.process_count(),
                "execution": dataclasses.asdict(self.execution), "steps_per_epoch": self.loader.batches_per_epoch,
                "parameters": self.config.num_params(), "metrics": {}, "finished_steps": 0,
            }
            if self.init_from is not None:
                origin.keep(self.init_from, self.run_dir)
            runs.create(self.run_dir, self.config, self.data.data_dir, config_text, manifest)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("run directory")

    def train(self, stop: StopRequest, *, log_every: int, eval_every: int, checkpoint_every: int, keep: int,
              unigram_bits_per_byte: float | None) -> dict[str, Any]:
        """Runs the steps that are left; see `train`."""
        self.checkpoints = Checkpoints(self.run_dir / runs.CHECKPOINTS, keep=keep, save_every=checkpoint_every)
        self.recovery.finish_return(self.checkpoints)
        state, first, so_far = self._initial_state()
        self.recovery.begin(first)
        self._report_from(first, so_far)
        self._introduce(first)
        if first == 0:
            self._record(start=self._evaluate(state, 0), unigram_bits_per_byte=unigram_bits_per_byte)
        elif first % eval_every == 0 and not self.evaluator.gates.has(first):  # it was stopped before that
            self._evaluate(state, first)
        pending: collections.deque[tuple[int, int, dict]] = collections.deque()
        began = time.perf_counter()

        def settle(most: int) -> bool:
            """Looks at the oldest steps until at most `most` are under way; whether the run has to go back."""
            while len(pending) > most:
                step, number, metrics = pending.popleft()
                self.watch.at(step, "waiting for the device")
                host = jax.device_get(metrics)
                if self.recovery.look(self.checkpoints, step, number, host):
                    pending.clear()
                    return True
                host |= self.recovery.counts
                self.reporter.step(step, host)
                if step == first + 1:
                    took = time.perf_counter() - began + self.compile_seconds
                    self.reporter.say(f"the first step took {took:.1f} s, {self.compile_seconds:.1f} of it compiling")
                if step % log_every == 0 or step == self.num_steps:
                    self.reporter.interval(step, host)
            return False

        last: tuple[TrainState, int, int] | None = None
        self.watch.save = lambda: resume.save_last(self.checkpoints, last, self.reporter.totals())
        evaluated, step = None, first
        self.goodput.enter("step")
        while step < self.num_steps and self.evaluator.gates.verdict.stop is None:
            step += 1
            number = self.recovery.seek(step - 1)
            self.watch.at(step, "waiting for its batch")
            with self.goodput.waiting_for_data():
                batch = self._put(next(self.loader))
            self.watch.at(step, "starting it")
            state, metrics = self._send(step, state, batch)
            last = state, step, self.loader.state
            pending.append((step, number, metrics))
            is_stopping = self._agree(stop, step)
            is_saving = step % checkpoint_every == 0 or step == self.num_steps or is_stopping
            is_evaluating = step == self.num_steps or (step % eval_every == 0 and not is_stopping)
            is_saving |= is_evaluating and not self.evaluator.gates.config.is_idle  # what is best, or good, is kept
            if settle(0 if is_saving or is_evaluating else _LAG):
                state = last = None  # whose memory is needed for the one that is restored
                state, step = self._go_back()
                continue
            paused = time.perf_counter()
            if is_saving:
                self.watch.at(step, "starting to write its checkpoint")
                self.reporter.flush()
                with self.goodput.spend("checkpoint"):
                    self.checkpoints.save(step, state.to_checkpoint(), self.loader.state,
                                          self.reporter.totals() | {"state": state.facts()}, force=True)
            if is_evaluating:
                evaluated = self._evaluate(state, step)
            if is_saving or is_evaluating:
                self.reporter.pause(time.perf_counter() - paused)
            if is_stopping and step < self.num_steps:
                self.watch.at(step, "writing its checkpoint")
                self.checkpoints.wait()
                signum = stop.signum or signal.SIGTERM  # another process may have been the one that was asked
                self.reporter.say(f"{signal.Signals(signum).name}: saved and stopped after step {step} of "
                                  f"{self.num_steps}; the same command goes on from there")
                raise TrainingStopped(signum, step)
        self.profiler.close()
        return self._finish(state, evaluated)

    def _send(self, step: int, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, Any]]:
        """Starts a step; takes the pictures that are due before it changes the state."""
        if self.pictures.is_due(step):
            with self.reporter.aside():
                self.reporter.histograms(step, self.pictures.histograms(step, state, batch))
                self.reporter.maps(step, *self.pictures.maps(step, state))
        with self.profiler.step(step, state):
            state, metrics = self.train_step(state, batch)
        self.goodput.sent(metrics["loss"])
        if self.profiler.is_last(step):
            with self.reporter.aside():
                self.profiler.close(metrics)
        return state, metrics

    def _report_from(self, first: int, so_far: dict[str, Any]) -> None:
        """Begins to report after step `first`, and takes back what was reported of later ones."""
        if self.reporter is not None:
            self.reporter.close()
        self.reporter = Reporter(self.run_dir / runs.LOGS, self.num_steps, first, is_lead=distributed.is_lead(),
                                 flops_per_token=self.config.flops_per_token(self.data.row_length),
                                 num_devices=self.mesh.size, config=self.config, goodput=self.goodput, so_far=so_far)
        self.profiler = self.profiler or Profiler(self.report.profile_steps, self.run_dir / runs.LOGS,
                                                  self.reporter.say, distributed.is_lead())
        self.evaluator.rewind(self.run_dir, first)
        self.checkpoints.hold(self.evaluator.gates.held_steps)
        self.recovery.say = self.reporter.say

    def _go_back(self) -> tuple[TrainState, int]:
        """The state and step of the latest checkpoint; a rollback has removed those it left behind."""
        state, first, so_far = self._initial_state()
        self._report_from(first, so_far)
        return state, first

    def _initial_state(self) -> tuple[TrainState, int, dict[str, float]]:
        """A new state, or the latest checkpoint's; the number of updates in it, and the run's totals until then."""
        like = self.abstract_state()
        with self.goodput.spend("checkpoint"):
            found = resume.restore_newest(self.checkpoints, like.to_checkpoint())
        if found is None:
            params = None if self.init_from is None else origin.restore_params(self.init_from, like.params)
            return init_state(self.model, self.optimizer, self.seed, self.shardings, params, self.precision), 0, {}
        saved, batches, totals = found
        self.loader.set_state(batches)
        state = TrainState.from_checkpoint(saved, totals.pop("state", None), self.precision)
        return state, int(jax.device_get(state.step)), totals

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows as its part of the global batch."""
        return {name: jax.make_array_from_process_local_data(self.batch_sharding, array)
                for name, array in batch.items()}

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        with self.goodput.spend("evaluation"):
            result = self.evaluator.evaluate(state.params,
                                             lambda batches: self.watch.during(step, "evaluating", batches))
        self.reporter.write("validation", step, result)
        self.reporter.say(f"step {step}/{self.num_steps}  validation loss {result['loss']:.4f}  ppl "
                          f"{result['perplexity']:,.1f}  bits per byte {result['bits_per_byte']:.4f}  "
                          f"({result['tokens']:,} tokens)")
        for line in self.evaluator.judge(self.run_dir, step, result):
            self.reporter.say(line)
        self.checkpoints.hold(self.evaluator.gates.held_steps)
        return result

    def _agree(self, stop: StopRequest, step: int) -> bool:
        """Whether to stop after `step`; several processes stop after the same one."""
        if jax.process_count() == 1:
            return stop.signum is not None
        if step % _STOP_SYNC_STEPS:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.int32(stop.signum is not None)).any())

    def _introduce(self, first: int) -> None:
        shape = " × ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        place = f"mesh {shape}" if shape else "one device"
        idle = len(jax.devices()) - self.mesh.size
        doing = f"resuming at step {first}" if first else "training"
        self.reporter.say(f"{doing}: {self.config.num_params() / 1e6:,.1f} M parameters, {place}, "
                          f"{self.num_steps - first} steps of {self.data.batch_size} × {self.data.row_length} tokens, "
                          f"{self.loader.batches_per_epoch} steps an epoch")
        if self.pipeline is not None:
            self.reporter.say(str(self.pipeline))
        self.reporter.say(self.prediction)
        if idle:
            self.reporter.say(f"note: {idle} of {len(jax.devices())} devices stay idle; MeshConfig.data=-1 uses all")

    def _record(self, **metrics: Any) -> None:
        self.metrics |= metrics
        if distributed.is_lead():
            runs.update_manifest(self.run_dir, metrics=self.metrics)

    def _finish(self, state: TrainState, evaluated: dict[str, float] | None) -> dict[str, Any]:
        """Waits for the last checkpoint, and only then calls the run finished."""
        step = int(jax.device_get(state.step))
        evaluated = evaluated or self._evaluate(state, step)
        self.watch.at(step, "writing its checkpoint")
        with self.goodput.spend("checkpoint"):
            self.checkpoints.wait()
        self._record(end=evaluated, **self.reporter.summary(), **self.recovery.totals(state))
        if distributed.is_lead():
            runs.update_manifest(self.run_dir, finished_steps=step)
        self.reporter.say(summary(self.metrics))
        return self.metrics


def summary(metrics: dict[str, Any]) -> str:
    """What a run came to, in a line."""
    start, end, unigram = metrics.get("start"), metrics.get("end"), metrics.get("unigram_bits_per_byte")
    if not start or not end:
        return "no metrics"
    line = (f"validation loss {start['loss']:.4f} → {end['loss']:.4f} nats per token, bits per byte "
            f"{start['bits_per_byte']:.4f} → {end['bits_per_byte']:.4f}")
    if unigram and math.isfinite(unigram):
        line += f" (a unigram model: {unigram:.4f}, ratio {end['bits_per_byte'] / unigram:.2f})"
    if metrics.get("seconds"):
        line += f"; {metrics['tokens_per_second']:,.0f} tokens/s, {clock(metrics['seconds'])} of training"
    if metrics.get("goodput"):
        line += f", goodput {metrics['goodput']['step']:.0%}"
    return line
