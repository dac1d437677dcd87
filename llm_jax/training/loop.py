"""The training loop: from a prepared corpus to a run directory.

One command starts a run, continues it after it was stopped or killed, and says so when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from typing import Any

from llm_jax import checkpoints, compile_cache, runs, storage
from llm_jax.data.documents import load_manifest
from llm_jax.data.loader import DataConfig
from llm_jax.errors import UserError
from llm_jax.models import Execution, ModelConfig
from llm_jax.parallel import distributed
from llm_jax.parallel.mesh import MeshConfig
from llm_jax.parallel.rules import ShardingRules
from llm_jax.training import origin, resume
from llm_jax.training.assembly import with_fixed_rope
from llm_jax.training.gates import GateConfig, is_over
from llm_jax.training.guard import RecoveryConfig
from llm_jax.training.optimizer import OptimizerConfig
from llm_jax.training.precision import PrecisionConfig
from llm_jax.training.reporter import ReportConfig
from llm_jax.training.signals import StopRequest
from llm_jax.training.trainer import Trainer, summary
from llm_jax.training.watch import Watch, WatchConfig

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(
    run_dir: str,
    model: ModelConfig | None,
    execution: Execution,
    data: DataConfig,
    optimizer: OptimizerConfig,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
    rules: ShardingRules = ShardingRules(),  # noqa: B008 (frozen)
    precision: PrecisionConfig = PrecisionConfig(),  # noqa: B008 (frozen)
    recovery: RecoveryConfig = RecoveryConfig(),  # noqa: B008 (frozen)
    watch: WatchConfig = WatchConfig(),  # noqa: B008 (frozen)
    report: ReportConfig = ReportConfig(),  # noqa: B008 (frozen)
    gates: GateConfig = GateConfig(),  # noqa: B008 (frozen)
    num_steps: int = 1000,
    seed: int = 0,
    gradient_accumulation: int = 1,
    z_loss: float = 0.0,
    log_every: int = 10,
    eval_every: int = 0,
    eval_batches: int = 16,
    checkpoint_every: int = 500,
    keep: int = 2,
    config_text: str = "",
    init_from: str | None = None,
) -> dict[str, Any]:
    """Trains a model, or goes on where the run in `run_dir` stopped.

    Args:
      run_dir: the run directory, local or in a bucket; made if it isn't there.
      model: what the model is; None takes that of `init_from`.
      execution: how it is run.
      data: where the batches come from; `data.batch_size` rows make one step.
      optimizer: how parameters are moved.
      mesh: the devices.
      rules: which mesh axes divide which axes of parameters, moments and activations.
      precision: loss scaling for float16, and matrix products in int8 or fp8.
      recovery: what is done about a loss or gradient that is not finite, or a spike.
      watch: how long the run may stand still before it ends itself with status 75, to be started again.
      report: histograms, pictures of attention and profiles.
      gates: what evaluations decide: which checkpoint is best, an early end, what is fit to be promoted.
      num_steps: updates of the whole run.
      seed: of the initial parameters and of whatever the model draws.
      gradient_accumulation: microbatches that a step's rows are cut into; changes memory, not the result.
      z_loss: see `objectives.next_token`.
      log_every: steps between two lines of metrics.
      eval_every: steps between two evaluations on the validation split; 0 evaluates at the start and at the end.
      eval_batches: batches of each evaluation; 0 takes the whole split.
      checkpoint_every: steps between two checkpoints; there is one at the end whatever this is.
      keep: checkpoints that are kept.
      config_text: the operative Gin configuration, kept in the run directory.
      init_from: another run directory, imported or trained, whose parameters are the first ones here, in float32; the
        optimizer begins anew. None draws them from the seed.

    Returns:
      The run's metrics, as in its manifest: `start` and `end` (validation loss, perplexity, bits per byte), speed.

    Raises:
      UserError: anything the caller can put right, among them a loss that is not finite.
      TrainingStopped: SIGTERM or Ctrl-C; a checkpoint was saved. It is a SystemExit with status 143 or 130.
    """
    _check_counts(num_steps=num_steps, log_every=log_every, checkpoint_every=checkpoint_every, keep=keep,
                  gradient_accumulation=gradient_accumulation)
    _check_counts(least=0, eval_every=eval_every, eval_batches=eval_batches)
    checkpoints.check_place(run_dir)
    for place in (run_dir, data.data_dir):
        storage.check_reachable(place)
    data_manifest = load_manifest(data.data_dir, verify=False)
    manifest = resume.read_manifest(run_dir)
    model = origin.find_model(model, init_from, run_dir, manifest)
    execution = with_fixed_rope(execution, model, data.row_length)
    settings = resume.decisive_settings(model=model, data=data, data_hash=data_manifest["data_hash"],
                                        optimizer=optimizer, num_steps=num_steps, seed=seed, z_loss=z_loss,
                                        expert_capacity=execution.expert_capacity,
                                        rope_context=execution.rope_context if model.switches_on_length else None)
    settings |= origin.decisive(init_from)
    if manifest is not None:
        resume.check_same(run_dir, manifest.get("settings", {}), settings)
        if manifest.get("finished_steps", 0) >= num_steps or is_over(manifest, gates):
            _say_finished(run_dir, manifest)
            return manifest["metrics"]
    resume.check_writable(run_dir)

    distributed.initialize(heartbeat_timeout_s=watch.runtime_timeout_s)
    compile_cache.enable_compile_cache()
    try:
        with contextlib.ExitStack() as stack:
            guard = stack.enter_context(Watch(watch, run_dir, runs.LOGS))
            guard.lock = resume.take(run_dir, stack)
            run = Trainer(run_dir, model, execution, data, optimizer, mesh, num_steps=num_steps, seed=seed,
                          accumulation=gradient_accumulation, z_loss=z_loss, eval_batches=eval_batches,
                          init_from=init_from, rules=rules, precision=precision, recovery=recovery, watch=guard,
                          report=report, gates=gates)
            stack.enter_context(run)
            run.check_memory()
            run.create(manifest, config_text, settings, data_manifest)
            stop = stack.enter_context(StopRequest())
            return run.train(stop, log_every=log_every, eval_every=eval_every or num_steps, keep=keep,
                             checkpoint_every=checkpoint_every,
                             unigram_bits_per_byte=data_manifest.get("unigram_bits_per_byte"))
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(f"can't write to the run directory {run_dir}: {error.strerror}; the same command goes on "
                        "when there is room") from error


def _check_counts(least: int = 1, **counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"train.{name} must be a whole number of at least {least}, not {value!r}")


def _say_finished(run_dir: str, manifest: dict[str, Any]) -> None:
    print(f"{run_dir} is complete: {manifest['finished_steps']} steps. {summary(manifest.get('metrics', {}))}",
          file=sys.stderr, flush=True)
