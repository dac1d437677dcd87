"""One update: gradients (accumulated exactly), clipping, AdamW, and a check that everything is finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.objectives import balance
from llm_jax.objectives.next_token import next_token_sums, targets_and_weights
from llm_jax.parallel import rules as rules_lib
from llm_jax.training.state import TrainState

Array = jax.Array
Batch = dict[str, Array]

# How activations lie; a name that is absent is left to the compiler.
ACTIVATION_RULES = {"batch": ("data", "fsdp", "expert"), "length": None, "activation_embed": None,
                    "activation_mlp": "tensor", "activation_vocab": "tensor", "activation_experts": "expert"}


def microbatches(batch: Batch, count: int, mesh: Mesh | None = None) -> Batch:
    """Cuts a batch [B, T] into `count` microbatches [count, B / count, T].

    Microbatch i takes the rows r with r mod count = i, so that every device cuts its own rows and none move.
    """

    def cut(x_BT: Array) -> Array:
        rows = x_BT.shape[0] // count
        x = x_BT.reshape(rows, count, *x_BT.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return x
        batch_axes = rules_lib.batch_sharding(mesh).spec[0]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, batch_axes)))

    return jax.tree.map(cut, batch)


def gradients(model: Any, params: Any, batch: Batch, rng: Array | None, *, z_loss: float = 0.0, accumulation: int = 1,
              mesh: Mesh | None = None, param_shardings: Any = None) -> tuple[Any, dict[str, Any]]:
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
      param_shardings: shardings that the gradients are kept in, those of the parameters.

    Returns:
      Gradients (float32, structure of `params`) and the sums that `next_token_sums` gives.
    """
    total = jnp.maximum(jnp.sum(targets_and_weights(batch)[1]), 1.0)

    def objective(params: Any, micro: Batch, key: Array | None) -> tuple[Array, dict[str, Any]]:
        objective_sum, sums = next_token_sums(model.apply, params, micro, key, z_loss=z_loss, config=model.config)
        return objective_sum / total, sums

    def micro_gradients(micro: Batch, key: Array | None) -> tuple[Any, dict[str, Any]]:
        grads, sums = jax.grad(objective, has_aux=True)(params, micro, key)
        if param_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, param_shardings)
        return grads, sums

    if accumulation == 1:
        return micro_gradients(batch, rng)

    def add(carry: tuple, micro: tuple) -> tuple[tuple, None]:
        index, piece = micro
        key = None if rng is None else jax.random.fold_in(rng, index)
        return jax.tree.map(jnp.add, carry, micro_gradients(piece, key)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    pieces = (jnp.arange(accumulation), microbatches(batch, accumulation, mesh))
    sums_like = jax.eval_shape(objective, params, jax.tree.map(lambda x: x[0], pieces[1]), rng)[1]
    zero_sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums_like)
    (grads, sums), _ = jax.lax.scan(add, (zeros, zero_sums), pieces)
    return grads, sums


def update(model: Any, optimizer: optax.GradientTransformation, schedule: Callable, state: TrainState, batch: Batch, *,
           z_loss: float = 0.0, selection_bias_rate: float = 0.0, accumulation: int = 1, mesh: Mesh | None = None,
           param_shardings: Any = None) -> tuple[TrainState, dict[str, Array]]:
    """One training step, as a pure function (`make_train_step` compiles it).

    If the loss or the gradient's norm is not finite, the state stays as it was and its `first_bad_step` says so; from
    then on nothing is updated.

    Returns:
      The next state, and float32 scalars: `loss` (cross-entropy, nats per token), `z_loss`, `learning_rate`,
      `grad_norm` (before clipping), `param_norm` (after the update), `tokens` (not padding), `targets`; and
      `first_bad_step` (int32). For a model with experts also what `objectives.balance.load` gives.
    """
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    grads, sums = gradients(model, state.params, batch, rng, z_loss=z_loss, accumulation=accumulation, mesh=mesh,
                            param_shardings=param_shardings)
    grad_norm = optax.global_norm(grads)
    targets = jnp.maximum(sums["weight_sum"], 1.0)
    loss = sums["loss_sum"] / targets
    z = sums["z_loss_sum"] / targets
    is_finite = jnp.isfinite(loss + z) & jnp.isfinite(grad_norm)
    is_applied = is_finite & (state.first_bad_step < 0)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if selection_bias_rate:
        params = models.move_selection_biases(params, sums["router"]["assigned"], model.config, selection_bias_rate)
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(is_applied, new, old), (params, opt_state),
                                     (state.params, state.opt_state))
    first_bad_step = jnp.where(is_finite | (state.first_bad_step >= 0), state.first_bad_step, state.step)
    next_state = dataclasses.replace(state, step=state.step + is_applied.astype(jnp.int32), params=params,
                                     opt_state=opt_state, first_bad_step=first_bad_step)
    tokens = batch["segment_ids"] > 0 if "segment_ids" in batch else jnp.ones_like(batch["tokens"])
    metrics = {"loss": loss, "z_loss": z, "learning_rate": schedule(state.step), "grad_norm": grad_norm,
               "param_norm": optax.global_norm(params), "tokens": jnp.sum(tokens.astype(jnp.float32)),
               "targets": sums["weight_sum"], "first_bad_step": first_bad_step}
    if "router" in sums:
        metrics |= balance.load(sums["router"])
    return next_state, metrics


def check_batch_divides(rows: int, mesh: Mesh, accumulation: int) -> None:
    """Every device needs the same number of rows in every microbatch; otherwise a UserError with the numbers."""
    shards = rules_lib.batch_shards(mesh)
    if accumulation < 1:
        raise UserError(f"gradient_accumulation={accumulation} must be at least 1")
    if rows % (shards * accumulation):
        unit = shards * accumulation
        raise UserError(f"a batch of {rows} rows can't be divided among {shards} devices (data × fsdp × expert) in "
                        f"{accumulation} microbatches; choose a multiple of {unit}, such as "
                        f"{unit * math.ceil(rows / unit)}")


def make_train_step(model: Any, optimizer: optax.GradientTransformation, schedule: Callable, mesh: Mesh,
                    shardings: TrainState, *, z_loss: float = 0.0, selection_bias_rate: float = 0.0,
                    accumulation: int = 1) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
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

    Returns:
      A jitted (state, batch) → (state, metrics).

    Raises:
      UserError: selection biases are to be moved, and the model has none.
    """
    experts = model.config.experts
    if selection_bias_rate and (experts is None or not experts.selection_bias):
        raise UserError(f"OptimizerConfig.selection_bias_rate={selection_bias_rate} moves the selection biases of "
                        "experts, and the model has none; set it to 0, or Experts.selection_bias to True")

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        with models.activation_rules(ACTIVATION_RULES):
            return update(model, optimizer, schedule, state, batch, z_loss=z_loss,
                          selection_bias_rate=selection_bias_rate, accumulation=accumulation, mesh=mesh,
                          param_shardings=shardings.params)

    jitted = jax.jit(train_step, donate_argnums=0, in_shardings=(shardings, rules_lib.batch_sharding(mesh)),
                     out_shardings=(shardings, rules_lib.replicated(mesh)))

    def call(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        with jax.set_mesh(mesh):
            return jitted(state, batch)

    return call
