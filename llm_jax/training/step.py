"""One update: gradients (accumulated exactly), clipping, AdamW, and a judgement of whether to apply it at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.models import ring_weight
from llm_jax.objectives import balance
from llm_jax.objectives.next_token import next_token_sums, targets_and_weights
from llm_jax.parallel import rules as rules_lib
from llm_jax.training import layer_norms, low_bit
from llm_jax.training.compiled_step import CompiledStep
from llm_jax.training.guard import APPLIED, NOT_FINITE, OVERFLOW, RecoveryConfig
from llm_jax.training.precision import PrecisionConfig
from llm_jax.training.state import TrainState, moment_shardings

Array = jax.Array
Batch = dict[str, Array]


def microbatches(batch: Batch, count: int, mesh: Mesh | None = None,
                 activations: rules_lib.Rules = rules_lib.ACTIVATIONS) -> Batch:
    """Cuts a batch [B, T] into `count` microbatches [count, B / count, T].

    Microbatch i takes the rows r with r mod count = i, so that every device cuts its own rows and none move.
    """

    def cut(x_BT: Array) -> Array:
        rows = x_BT.shape[0] // count
        x = x_BT.reshape(rows, count, *x_BT.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return x
        batch_axes = rules_lib.batch_sharding(mesh, activations).spec[0]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, batch_axes)))

    return jax.tree.map(cut, batch)


def gradients(model: Any, params: Any, batch: Batch, rng: Array | None, *, z_loss: float = 0.0, accumulation: int = 1,
              mesh: Mesh | None = None, gradient_shardings: Any = None,
              rules: rules_lib.ShardingRules = rules_lib.ShardingRules(), matmul: str = "none",  # noqa: B008 (frozen)
              loss_scale: Array | None = None) -> tuple[Any, dict[str, Any]]:
    """Gradient of the batch's mean objective, by microbatches that are weighted by their tokens.

    The number of tokens is known before the first microbatch, so each contributes its share of the one mean, and the
    sum over microbatches is the whole batch's gradient (up to the order of additions). Only the balance loss of a
    mixture of experts is told from one microbatch's tokens alone (`next_token_sums`); an expert's capacity is by row,
    and rotary frequencies that switch on length are fixed by `Execution.rope_context`.

    Args:
      model: the Flax module.
      params: float32 parameters.
      batch: see `objectives.next_token.targets_and_weights`.
      rng: key, or None where the model draws nothing.
      z_loss: see `next_token_sums`.
      accumulation: number of microbatches; divides the rows.
      mesh: where the microbatches lie.
      gradient_shardings: shardings that the gradients are kept in, those of the moments.
      rules: where everything lies on `mesh`.
      matmul: see `PrecisionConfig`.
      loss_scale: float32 scalar that the backward pass is multiplied by; what is returned is divided by it again.

    Returns:
      Gradients (float32, structure of `params`) and the sums that `next_token_sums` gives.
    """
    total = jnp.maximum(jnp.sum(targets_and_weights(batch)[1]), 1.0)
    apply = low_bit.wrapped_apply(model.apply, matmul)
    if mesh is not None and matmul == "none":
        apply = ring_weight.wrapped_apply(apply, models.logical_axes(model), mesh, rules)

    def objective(params: Any, micro: Batch, key: Array | None) -> tuple[Array, dict[str, Any]]:
        objective_sum, sums = next_token_sums(apply, params, micro, key, z_loss=z_loss, config=model.config,
                                              loss_chunk=model.execution.loss_chunk)
        mean = objective_sum / total
        return mean if loss_scale is None else mean * loss_scale, sums

    def micro_gradients(micro: Batch, key: Array | None) -> tuple[Any, dict[str, Any]]:
        grads, sums = jax.grad(objective, has_aux=True)(params, micro, key)
        if loss_scale is not None:
            grads = jax.tree.map(lambda g: g * (1.0 / loss_scale), grads)
        return _placed(grads, gradient_shardings), sums

    if accumulation == 1:
        return micro_gradients(batch, rng)

    def add(carry: tuple, micro: tuple) -> tuple[tuple, None]:
        index, piece = micro
        key = None if rng is None else jax.random.fold_in(rng, index)
        return jax.tree.map(jnp.add, carry, micro_gradients(piece, key)), None

    zeros = _placed(jax.tree.map(jnp.zeros_like, params), gradient_shardings)
    pieces = (jnp.arange(accumulation), microbatches(batch, accumulation, mesh, rules.activations))
    sums_like = jax.eval_shape(objective, params, jax.tree.map(lambda x: x[0], pieces[1]), rng)[1]
    zero_sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums_like)
    (grads, sums), _ = jax.lax.scan(add, (zeros, zero_sums), pieces)
    return grads, sums


def _placed(tree: Any, shardings: Any) -> Any:
    return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)


def update(model: Any, optimizer: optax.GradientTransformation, schedule: Callable, state: TrainState, batch: Batch, *,
           z_loss: float = 0.0, selection_bias_rate: float = 0.0, accumulation: int = 1, mesh: Mesh | None = None,
           gradient_shardings: Any = None, rules: rules_lib.ShardingRules = rules_lib.ShardingRules(),  # noqa: B008
           precision: PrecisionConfig = PrecisionConfig(),  # noqa: B008 (frozen)
           recovery: RecoveryConfig = RecoveryConfig()) -> tuple[TrainState, dict[str, Array]]:  # noqa: B008 (frozen)
    """One training step, as a pure function (`make_train_step` compiles it).

    A step is judged before it changes anything (see `guard.Guard.outcome`). A good one is applied. One that overflows
    under loss scaling, or is bad and to be skipped, is dropped: the batch is consumed and `step` counts it, and
    parameters, moments, the optimizer's own step, and with it the learning rate and what the model draws, stay where
    they were, as if the batch had never been. At any other bad one, `first_bad_step` is set and the state stands still
    from then on, whatever comes.

    Returns:
      The next state, and float32 scalars: `loss` (cross-entropy, nats per token), `z_loss`, `learning_rate`,
      `grad_norm` (before clipping), `param_norm` (after the update), `tokens` (not padding), `targets`; and int32 ones:
      `first_bad_step`, `outcome` (see `guard`), with loss scaling `loss_scale` (the step's own, float32) and
      `overflow_steps`, with the policy "skip" `skipped_steps` (of the run so far). `layers` is what
      `layer_norms.measure` gives. For a model with experts also what
      `objectives.balance.load` gives.
    """
    is_scaled = precision.scales(model.execution.dtype)
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.updates)
    grads, sums = gradients(model, state.params, batch, rng, z_loss=z_loss, accumulation=accumulation, mesh=mesh,
                            gradient_shardings=gradient_shardings, rules=rules, matmul=precision.matmul,
                            loss_scale=state.scale.value if is_scaled else None)
    grad_norm = optax.global_norm(grads)
    targets = jnp.maximum(sums["weight_sum"], 1.0)
    loss = sums["loss_sum"] / targets
    z = sums["z_loss_sum"] / targets
    guard = state.guard
    outcome = guard.outcome(recovery, loss + z, grad_norm, is_scaled and state.scale.value > precision.min_loss_scale)
    is_running = state.first_bad_step < 0
    is_applied = is_running & (outcome == APPLIED)
    is_overflow = is_running & (outcome == OVERFLOW)
    is_skipped = is_running & (outcome >= NOT_FINITE)
    is_skipped &= (guard.in_a_row < recovery.max_events) if recovery.on_bad == "skip" else False
    goes_on = is_applied | is_overflow | is_skipped

    # Each device updates what it has the moments of; where it holds more of the parameters, that is gathered after.
    before = _placed(state.params, gradient_shardings)
    updates, opt_state = optimizer.update(grads, state.opt_state, before)
    params = optax.apply_updates(before, updates)
    if selection_bias_rate:
        params = models.move_selection_biases(params, sums["router"]["assigned"], model.config, selection_bias_rate)
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(is_applied, new, old), (params, opt_state),
                                     (before, state.opt_state))
    params = _placed(params, gradient_shardings)
    first_bad_step = jnp.where(goes_on | ~is_running, state.first_bad_step, state.step)
    next_state = dataclasses.replace(
        state, step=state.step + goes_on.astype(jnp.int32), params=params, opt_state=opt_state,
        first_bad_step=first_bad_step, guard=guard.after(recovery, loss + z, grad_norm, is_applied, is_skipped),
        scale=state.scale.after(precision, is_applied, is_overflow) if is_scaled else state.scale)
    tokens = batch["segment_ids"] > 0 if "segment_ids" in batch else jnp.ones_like(batch["tokens"])
    layers = layer_norms.measure(grads, updates, params, models.logical_axes(model))
    metrics = {"loss": loss, "z_loss": z, "learning_rate": schedule(state.updates), "grad_norm": grad_norm,
               "param_norm": layer_norms.total(layers["weight"]), "tokens": jnp.sum(tokens.astype(jnp.float32)),
               "targets": sums["weight_sum"], "first_bad_step": first_bad_step, "outcome": outcome,
               "layers": layers}
    if is_scaled:
        metrics |= {"loss_scale": state.scale.value, "overflow_steps": next_state.scale.overflows}
    if recovery.on_bad == "skip":
        metrics["skipped_steps"] = next_state.guard.skipped
    if "router" in sums:
        metrics |= balance.load(sums["router"])
    return next_state, metrics


def make_train_step(model: Any, optimizer: optax.GradientTransformation, schedule: Callable, mesh: Mesh,
                    shardings: TrainState, *, z_loss: float = 0.0, selection_bias_rate: float = 0.0,
                    accumulation: int = 1, rules: rules_lib.ShardingRules = rules_lib.ShardingRules(),  # noqa: B008
                    precision: PrecisionConfig = PrecisionConfig(),  # noqa: B008 (frozen)
                    recovery: RecoveryConfig = RecoveryConfig(),  # noqa: B008 (frozen)
                    ) -> CompiledStep:
    """Compiles `update` for a mesh. The state is donated: the one passed in is gone, its memory holds the new one.

    Args:
      model: the Flax module.
      optimizer: the optax transformation.
      schedule: the learning rate, for metrics.
      mesh: the device mesh.
      shardings: from `state.state_shardings`.
      z_loss: see `next_token_sums`.
      selection_bias_rate: see `OptimizerConfig`.
      accumulation: microbatches per step.
      rules: where everything lies; those that `shardings` was made by.
      precision: loss scaling, and what matrices are multiplied in.
      recovery: what is done about bad steps.

    Returns:
      A jitted (state, batch) → (state, metrics), which can be compiled ahead.

    Raises:
      UserError: selection biases are to be moved, and the model has none; or a package that `precision` needs is
        absent.
    """
    experts = model.config.experts
    if selection_bias_rate and (experts is None or not experts.selection_bias):
        raise UserError(f"OptimizerConfig.selection_bias_rate={selection_bias_rate} moves the selection biases of "
                        "experts, and the model has none; set it to 0, or Experts.selection_bias to True")

    gradient_shardings = moment_shardings(model, mesh, rules)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        with models.activation_rules(rules.activations):
            return update(model, optimizer, schedule, state, batch, z_loss=z_loss,
                          selection_bias_rate=selection_bias_rate, accumulation=accumulation, mesh=mesh,
                          gradient_shardings=gradient_shardings, rules=rules, precision=precision,
                          recovery=recovery)

    low_bit.wrapped_apply(model.apply, precision.matmul)  # that a package is absent is said before anything is compiled
    jitted = jax.jit(train_step, donate_argnums=0,
                     in_shardings=(shardings, rules_lib.batch_sharding(mesh, rules.activations)),
                     out_shardings=(shardings, rules_lib.replicated(mesh)))

    return CompiledStep(jitted, mesh)
