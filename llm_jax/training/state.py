"""What training carries from step to step, and how it is created already sharded."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llm_jax import models
from llm_jax.parallel import rules as rules_lib

Array = jax.Array
NOTHING_BAD = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A plain pytree.

    Attributes:
      step: int32 scalar, updates applied so far; also the number of batches consumed.
      params: float32 parameters, stacked layout.
      opt_state: the optimizer's state; both moments are sharded as their parameters.
      rng: uint32 data of the run's random key; a step folds in its number, so the key itself never changes.
      first_bad_step: int32 scalar, the step whose loss or gradient was not finite, else -1. Once set, nothing is
        updated any more, so the host may look late and still find the last good state and the right step.
    """

    step: Array
    params: Any
    opt_state: Any
    rng: Array
    first_bad_step: Array

    def to_checkpoint(self) -> dict[str, Any]:
        """What is saved; a state is only saved while nothing is bad."""
        return {"params": self.params, "opt_state": self.opt_state, "step": self.step, "rng": self.rng}

    @classmethod
    def from_checkpoint(cls, saved: dict[str, Any]) -> TrainState:
        """The inverse of `to_checkpoint`."""
        nothing_bad = jax.device_put(jnp.full((), NOTHING_BAD, jnp.int32), saved["step"].sharding)
        return cls(**saved, first_bad_step=nothing_bad)


def state_shardings(model: Any, optimizer: optax.GradientTransformation, mesh: Mesh,
                    rules: rules_lib.Rules = rules_lib.RULES) -> TrainState:
    """The sharding of every leaf of the state: parameters by the rules, both moments as their parameters.

    Raises:
      UserError: an axis of a parameter that its mesh axes don't divide.
    """
    abstract = models.abstract_params(model)
    params = rules_lib.shardings(mesh, models.logical_axes(model), rules, shapes=abstract)
    replicated = rules_lib.replicated(mesh)
    # jit alone would leave the moments replicated: nothing ties their sharding to the parameters'.
    opt_state = optax.tree.map_params(optimizer, lambda _, sharding: sharding, jax.eval_shape(optimizer.init, abstract),
                                      params, transform_non_params=lambda _: replicated)
    return TrainState(step=replicated, params=params, opt_state=opt_state, rng=replicated, first_bad_step=replicated)


def new_state(model: Any, optimizer: optax.GradientTransformation, seed: Array, params: Any = None) -> TrainState:
    """A state at step 0 from the seed's key data, and from parameters if there are any; a pure function to be jitted
    (see `init_state`)."""
    init_key, run_key = jax.random.split(jax.random.wrap_key_data(seed))
    if params is None:
        params = models.init_params(model, init_key)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
                      rng=jax.random.key_data(run_key), first_bad_step=jnp.full((), NOTHING_BAD, jnp.int32))


def abstract_state(model: Any, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """`jax.ShapeDtypeStruct`s with shardings, at no cost in memory: what a checkpoint is restored into."""
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    shapes = jax.eval_shape(lambda seed: new_state(model, optimizer, seed), key)
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes,
                        shardings)


def init_state(model: Any, optimizer: optax.GradientTransformation, seed: int, shardings: TrainState,
               params: Any = None) -> TrainState:
    """Creates the state on the devices it belongs to; no device ever holds more than its share.

    Args:
      model: the Flax module.
      optimizer: the optax transformation.
      seed: of the initial parameters and of the run's key; the values don't depend on the mesh.
      shardings: from `state_shardings`.
      params: float32 parameters to begin with, sharded so, which this takes over; None draws them from the seed.
    """
    is_cpu = jax.tree.leaves(shardings)[0].mesh.devices.flat[0].platform == "cpu"
    # Random numbers for every leaf make a long program that runs once: optimizing it for CPU costs more than it saves.
    options = {"xla_backend_optimization_level": 1} if is_cpu else None
    create = jax.jit(lambda key_data, params: new_state(model, optimizer, key_data, params), out_shardings=shardings,
                     compiler_options=options, donate_argnums=1)
    return create(jax.random.key_data(jax.random.key(seed)), params)


def num_bytes_per_device(tree: Any) -> int:
    """Bytes of `tree` that the most loaded device of this process holds."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)
