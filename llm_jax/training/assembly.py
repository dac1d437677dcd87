"""A run's train step with all that it is made of, and no data: what the trainer runs and `experiments.compile_check`
compiles for devices that are not there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax

from llm_jax.data.loader import DataConfig
from llm_jax.errors import UserError
from llm_jax.models import Execution, ModelConfig, build_language_model, logical_axes
from llm_jax.models.blocks import pipeline_schedule
from llm_jax.parallel import rules as rules_lib
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.parallel.pipeline import Schedule
from llm_jax.training.guard import RecoveryConfig
from llm_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
from llm_jax.training.precision import PrecisionConfig
from llm_jax.training.state import TrainState, abstract_state, state_shardings
from llm_jax.training.step import make_train_step


class Assembly:
    """Model, mesh, optimizer, shardings and step of a run; see `loop.train` for what the arguments mean.

    Attributes:
      pipeline: how microbatches pass through the stages, where the mesh has any.
      compile_seconds: that `compile_step` took, tracing included; 0 before it.
    """

    def __init__(self, config: ModelConfig, execution: Execution, data: DataConfig, optimizer: OptimizerConfig,
                 mesh: MeshConfig, *, num_steps: int, accumulation: int = 1, z_loss: float = 0.0,
                 rules: rules_lib.ShardingRules = rules_lib.ShardingRules(),  # noqa: B008 (frozen)
                 precision: PrecisionConfig = PrecisionConfig(),  # noqa: B008 (frozen)
                 recovery: RecoveryConfig = RecoveryConfig(),  # noqa: B008 (frozen)
                 devices: Sequence[jax.Device] | None = None):
        """Checks that the parts fit; nothing is compiled, and no data are opened.

        Args:
          devices: those of the mesh, also such as are only described; None is all there are.
        """
        self.compile_seconds = 0.0
        self.config, self.execution, self.data, self.num_steps = config, execution, data, num_steps
        self.accumulation, self.z_loss, self.rules = accumulation, z_loss, rules
        self.precision, self.policy = precision, recovery
        self.model = build_language_model(config, execution)
        self.mesh = make_mesh(mesh, devices)
        rules_lib.check_rows(data.batch_size, data.row_length, self.mesh, accumulation, rules.activations)
        self.pipeline: Schedule | None = None
        if (stages := self.mesh.shape["pipeline"]) > 1:
            self.pipeline = pipeline_schedule(config, execution, stages)
            self.pipeline.check_rows(data.batch_size // accumulation,
                                     rules_lib.batch_shards(self.mesh, rules.activations))
        if data.row_length > config.longest_context:
            raise UserError(f"DataConfig.row_length={data.row_length} is more than ModelConfig.max_context="
                            f"{config.longest_context}")
        self.schedule = learning_rate_schedule(optimizer, num_steps)
        self.optimizer = make_optimizer(optimizer, num_steps, decay_mask(logical_axes(self.model)))
        self.shardings = state_shardings(self.model, self.optimizer, self.mesh, rules)
        self.batch_sharding = rules_lib.batch_sharding(self.mesh, rules.activations)
        self.train_step = make_train_step(self.model, self.optimizer, self.schedule, self.mesh, self.shardings,
                                          z_loss=z_loss, selection_bias_rate=optimizer.selection_bias_rate,
                                          accumulation=accumulation, rules=rules, precision=precision,
                                          recovery=recovery)

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of what is carried from step to step."""
        return abstract_state(self.model, self.optimizer, self.shardings)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of what the loader brings."""
        rows = jax.ShapeDtypeStruct((self.data.batch_size, self.data.row_length), "int32", sharding=self.batch_sharding)
        return dict.fromkeys(("tokens", "segment_ids", "positions"), rows)

    def compile_step(self) -> jax.stages.Compiled:
        """Compiles the step for its state and batch; `train_step` runs this program from then on."""
        began = time.perf_counter()
        compiled = self.train_step.compile(self.abstract_state(), self.abstract_batch())
        self.compile_seconds = time.perf_counter() - began
        return compiled


def with_fixed_rope(execution: Execution, config: ModelConfig, row_length: int) -> Execution:
    """`execution` with the length that rotary frequencies are computed for fixed, where they switch on length: a
    document's loss would otherwise depend on the longest one that shares its microbatch."""
    if not config.switches_on_length or execution.rope_context is not None:
        return execution
    return dataclasses.replace(execution, rope_context=row_length)
