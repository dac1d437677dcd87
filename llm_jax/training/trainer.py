"""One process's part of a training run: batches in, steps sent ahead, metrics, evaluations and checkpoints out.

The loop never waits for the step it has just begun: it looks at metrics two steps late, so the device always has the
next step queued. A non-finite loss is noticed on the device in its own step (see `training.step.update`), so looking
late loses nothing.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from llm_jax import runs, storage
from llm_jax.checkpoints import Checkpoints
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.documents import read_documents
from llm_jax.data.loader import DataConfig, TrainLoader
from llm_jax.data.windows import evaluation_windows
from llm_jax.errors import UserError
from llm_jax.models import Execution, ModelConfig, activation_rules, build_language_model, logical_axes
from llm_jax.objectives.evaluation import evaluate_loss
from llm_jax.parallel import distributed
from llm_jax.parallel import rules as rules_lib
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.training import origin, resume
from llm_jax.training.metrics import Reporter, clock
from llm_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
from llm_jax.training.signals import StopRequest, TrainingStopped
from llm_jax.training.state import TrainState, abstract_state, init_state, state_shardings
from llm_jax.training.step import ACTIVATION_RULES, check_batch_divides, make_train_step

_LAG = 2  # steps that may be under way before the host looks at their metrics
_STOP_SYNC_STEPS = 10  # how often several processes agree on whether one of them was asked to stop
_NAMED_DOCUMENTS = 16  # how many documents of a bad batch the error message names


class Trainer:
    """What one process holds while it trains."""

    def __init__(self, run_dir: str, config: ModelConfig, execution: Execution, data: DataConfig,
                 optimizer: OptimizerConfig, mesh: MeshConfig, *, num_steps: int, seed: int, accumulation: int,
                 z_loss: float, eval_batches: int, init_from: str | None = None):
        """Checks that the parts fit, in the order of what it costs; nothing is written and nothing compiled."""
        self.run_dir = storage.located(run_dir)
        self.config, self.data, self.num_steps, self.seed = config, data, num_steps, seed
        self.init_from = init_from
        self.model = build_language_model(config, execution)
        self.mesh = make_mesh(mesh)
        check_batch_divides(data.batch_size, self.mesh, accumulation)
        self.eval_rows, self.eval_batches = data.batch_size // accumulation, eval_batches
        self.tokenizer = tokenizer_lib.Tokenizer.load(data.data_dir)
        if init_from is not None and resume.read_manifest(run_dir) is None:
            origin.check_tokenizer(init_from, self.tokenizer, data.data_dir)
        needed = self.tokenizer.text_vocab_size
        if needed > config.vocab_size:
            raise UserError(f"ModelConfig.vocab_size={config.vocab_size} is smaller than the tokenizer's "
                            f"{needed} tokens in {data.data_dir}: give the model as many "
                            f"(--gin.ModelConfig.vocab_size={needed}), or prepare the text again "
                            f"with --gin.VOCAB_SIZE={config.vocab_size} and another DATA_DIR")
        if data.row_length > config.longest_context:
            raise UserError(f"DataConfig.row_length={data.row_length} is more than ModelConfig.max_context="
                            f"{config.longest_context}")
        self.schedule = learning_rate_schedule(optimizer, num_steps)
        self.optimizer = make_optimizer(optimizer, num_steps, decay_mask(logical_axes(self.model)))
        self.shardings = state_shardings(self.model, self.optimizer, self.mesh)
        self.batch_sharding = rules_lib.batch_sharding(self.mesh)
        index, count = rules_lib.process_rows(self.batch_sharding, data.batch_size)
        self.loader = TrainLoader(data, "train", process_index=index, process_count=count)
        self.train_step = make_train_step(self.model, self.optimizer, self.schedule, self.mesh, self.shardings,
                                          z_loss=z_loss, selection_bias_rate=optimizer.selection_bias_rate,
                                          accumulation=accumulation)
        self.checkpoints: Checkpoints | None = None
        self.reporter: Reporter | None = None
        self.metrics: dict[str, Any] = {}
        self._eval_cache: list[dict] = []

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:  # each is closed whatever another's closing raises
            for part in (self.checkpoints, self.loader, self.reporter):
                if part is not None:
                    stack.callback(part.close)

    def create(self, found: dict | None, config_text: str, settings: dict, data_manifest: dict) -> None:
        """Writes the run directory's small files, once, on the lead process; `found` is the manifest that is there."""
        self.metrics = dict((found or {}).get("metrics", {}))
        if found is None and distributed.is_lead():
            manifest = {
                "settings": settings, "seed": self.seed, "data_dir": str(storage.located(self.data.data_dir)),
                "data_hash": data_manifest["data_hash"], "mesh": dict(self.mesh.shape), "num_steps": self.num_steps,
                "devices": f"{self.mesh.size} × {jax.devices()[0].device_kind}", "processes": jax.process_count(),
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
        state, first, so_far = self._initial_state()
        self.reporter = Reporter(self.run_dir / runs.LOGS, self.num_steps, first, is_lead=distributed.is_lead(),
                                 flops_per_token=self.config.flops_per_token(self.data.row_length),
                                 num_devices=self.mesh.size, tokens=so_far.get("trained_tokens", 0.0),
                                 seconds=so_far.get("seconds", 0.0), speed=so_far.get("tokens_per_second", 0.0))
        self._introduce(first)
        if first == 0:
            self._record(start=self._evaluate(state, 0), unigram_bits_per_byte=unigram_bits_per_byte)
        pending: collections.deque[tuple[int, dict]] = collections.deque()
        began = time.perf_counter()

        def settle(most: int) -> None:
            """Looks at the oldest steps until at most `most` are under way."""
            while len(pending) > most:
                step, metrics = pending.popleft()
                host = jax.device_get(metrics)
                if host["first_bad_step"] >= 0:
                    self._stop_not_finite(int(host["first_bad_step"]), host)
                self.reporter.step(step, host)
                if step == first + 1:
                    self.reporter.say(f"the first step took {time.perf_counter() - began:.1f} s, most of it compiling")
                if step % log_every == 0 or step == self.num_steps:
                    self.reporter.interval(step, host)

        evaluated = None
        for step in range(first + 1, self.num_steps + 1):
            state, metrics = self.train_step(state, self._put(next(self.loader)))
            pending.append((step, metrics))
            is_stopping = self._agree(stop, step)
            is_saving = step % checkpoint_every == 0 or step == self.num_steps or is_stopping
            is_evaluating = (step % eval_every == 0 or step == self.num_steps) and not is_stopping
            settle(0 if is_saving or is_evaluating else _LAG)
            paused = time.perf_counter()
            if is_saving:
                self.reporter.flush()
                self.checkpoints.save(step, state.to_checkpoint(), self.loader.state, self.reporter.totals(),
                                      force=True)
            if is_evaluating:
                evaluated = self._evaluate(state, step)
            if is_saving or is_evaluating:
                self.reporter.pause(time.perf_counter() - paused)
            if is_stopping and step < self.num_steps:
                self.checkpoints.wait()
                signum = stop.signum or signal.SIGTERM  # another process may have been the one that was asked
                self.reporter.say(f"{signal.Signals(signum).name}: saved and stopped after step {step} of "
                                  f"{self.num_steps}; the same command goes on from there")
                raise TrainingStopped(signum, step)
        return self._finish(state, evaluated)

    def _initial_state(self) -> tuple[TrainState, int, dict[str, float]]:
        """A new state, or the latest checkpoint's; the number of updates in it, and the run's totals until then."""
        like = abstract_state(self.model, self.optimizer, self.shardings)
        if self.checkpoints.latest_step() is None:
            params = None if self.init_from is None else origin.restore_params(self.init_from, like.params)
            return init_state(self.model, self.optimizer, self.seed, self.shardings, params), 0, {}
        saved, batches, totals = self.checkpoints.restore(like.to_checkpoint())
        self.loader.set_state(batches)
        state = TrainState.from_checkpoint(saved)
        return state, int(jax.device_get(state.step)), totals

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows as its part of the global batch."""
        return {name: jax.make_array_from_process_local_data(self.batch_sharding, array)
                for name, array in batch.items()}

    def _put_whole(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch that every process has whole."""
        return {name: jax.make_array_from_callback(array.shape, self.batch_sharding, array.__getitem__)
                for name, array in batch.items()}

    def _validation(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches of an evaluation, the same each time; kept if they are few."""
        if self._eval_cache:
            yield from self._eval_cache
            return
        documents = read_documents(self.data.data_dir, "validation")
        windows = evaluation_windows(documents, self.data.row_length, self.eval_rows)
        for number, batch in enumerate(windows, start=1):
            if self.eval_batches:
                self._eval_cache.append(batch)
            yield batch
            if number == self.eval_batches:
                return

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        with jax.set_mesh(self.mesh), activation_rules(ACTIVATION_RULES):
            result = evaluate_loss(self.model, state.params, self._validation(), put=self._put_whole,
                                   byte_lengths=self.tokenizer.byte_lengths)
        self.reporter.write("validation", step, result)
        self.reporter.say(f"step {step}/{self.num_steps}  validation loss {result['loss']:.4f}  ppl "
                          f"{result['perplexity']:,.1f}  bits per byte {result['bits_per_byte']:.4f}  "
                          f"({result['tokens']:,} tokens)")
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
        shape = " × ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        idle = len(jax.devices()) - self.mesh.size
        doing = f"resuming at step {first}" if first else "training"
        self.reporter.say(f"{doing}: {self.config.num_params() / 1e6:,.1f} M parameters, mesh {shape}, "
                          f"{self.num_steps - first} steps of {self.data.batch_size} × {self.data.row_length} tokens, "
                          f"{self.loader.batches_per_epoch} steps an epoch")
        if idle:
            self.reporter.say(f"note: {idle} of {len(jax.devices())} devices stay idle; MeshConfig.data=-1 uses all")

    def _record(self, **metrics: Any) -> None:
        self.metrics |= metrics
        if distributed.is_lead():
            runs.update_manifest(self.run_dir, metrics=self.metrics)

    def _stop_not_finite(self, index: int, metrics: dict[str, Any]) -> None:
        """Names the step, its documents and what to go back to."""
        self.checkpoints.wait()
        documents = self.loader.documents(index)
        last = self.checkpoints.latest_step()
        good = "there is no checkpoint yet"
        if last is not None:
            good = f"the last good checkpoint is {self.run_dir / runs.CHECKPOINTS / str(last)} (step {last})"
        details = self.run_dir / runs.LOGS / f"not_finite_step_{index + 1}.json"
        if distributed.is_lead():
            facts = {"step": index + 1, "batch": index, "documents": documents, "sources": self.loader.sources(index)}
            storage.write_atomically(details, json.dumps(facts, indent=1).encode())
        named = " ".join(documents[:_NAMED_DOCUMENTS])
        more = f" and {len(documents) - _NAMED_DOCUMENTS} more" if len(documents) > _NAMED_DOCUMENTS else ""
        raise UserError(f"the loss or its gradient is not finite at step {index + 1} (batch {index}): loss "
                        f"{float(metrics['loss']):g}, gradient norm {float(metrics['grad_norm']):g}; its documents are "
                        f"{named}{more} (all in {details}); {good}. The step was not applied")

    def _finish(self, state: TrainState, evaluated: dict[str, float] | None) -> dict[str, Any]:
        """Waits for the last checkpoint, and only then calls the run finished."""
        step = int(jax.device_get(state.step))
        evaluated = evaluated or self._evaluate(state, step)
        self.checkpoints.wait()
        self._record(end=evaluated, **self.reporter.totals())
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
    return line
