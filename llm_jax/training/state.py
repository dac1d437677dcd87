"""What training carries from step to step, and how it is created already sharded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llm_jax import models
from llm_jax.parallel import rules as rules_lib
from llm_jax.training.guard import Guard
from llm_jax.training.precision import LossScale, PrecisionConfig

Array = jax.Array
NOTHING_BAD = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A plain pytree.

    Attributes:
      step: int32 scalar, steps done; each consumed a batch, and all but those that were dropped moved the parameters.
      params: float32 parameters, stacked layout.
      opt_state: the optimizer's state; both moments are sharded as their parameters.
      rng: uint32 data of the run's random key; a step folds in the number of updates, so the key itself never changes.
      first_bad_step: int32 scalar, the bad step at which the run stops or goes back, else -1. Once set, nothing is
        updated any more, so the host may look late and still find the last good state and the right step.
      scale: of the loss, and how long since it changed.
      guard: what bad steps are told by, and how many were skipped.
    """

    step: Array
    params: Any
    opt_state: Any
    rng: Array
    first_bad_step: Array
    scale: LossScale
    guard: Guard

    @property
    def updates(self) -> Array:
        """int32 scalar, how often the parameters were moved: the step of the optimizer and its schedule."""
        return self.step - self.guard.skipped - self.scale.overflows

    def to_checkpoint(self) -> dict[str, Any]:
        """What is saved; a state is only saved while nothing is bad."""
        return {"params": self.params, "opt_state": self.opt_state, "step": self.step, "rng": self.rng}

    def facts(self) -> dict[str, Any]:
        """`scale` and `guard` as plain numbers: saved as a checkpoint's `extra`, which older ones are without."""
        plain = jax.tree.map(lambda leaf: leaf.item(), jax.device_get((self.scale, self.guard)))
        return {"scale": dataclasses.asdict(plain[0]), "guard": dataclasses.asdict(plain[1])}

    @classmethod
    def from_checkpoint(cls, saved: dict[str, Any], facts: Mapping[str, Any] | None = None,
                        precision: PrecisionConfig = PrecisionConfig()) -> TrainState:  # noqa: B008 (frozen)
        """The inverse of `to_checkpoint` and `facts`; of `facts`, what is not there is as when a run begins."""
        facts = facts or {}
        small = {"first_bad_step": jnp.full((), NOTHING_BAD, jnp.int32),
                 "scale": _with_facts(LossScale.new(precision), facts.get("scale", {})),
                 "guard": _with_facts(Guard.new(), facts.get("guard", {}))}
        return cls(**saved, **jax.device_put(small, saved["step"].sharding))


def _with_facts(begun: Any, facts: Mapping[str, Any]) -> Any:
    known = {name: jnp.asarray(facts[name], value.dtype) for name, value in vars(begun).items() if name in facts}
    return dataclasses.replace(begun, **known)


def state_shardings(model: Any, optimizer: optax.GradientTransformation, mesh: Mesh,
                    rules: rules_lib.ShardingRules = rules_lib.ShardingRules()) -> TrainState:  # noqa: B008 (frozen)
    """The sharding of every leaf of the state: parameters and both moments by the rules.

    Raises:
      UserError: an axis of a parameter that its mesh axes don't divide.
    """
    abstract = models.abstract_params(model)
    params = rules_lib.shardings(mesh, models.logical_axes(model), rules.parameters, shapes=abstract)
    moments = moment_shardings(model, mesh, rules)
    replicated = rules_lib.replicated(mesh)
    # jit alone would leave the moments replicated: nothing ties their sharding to the parameters'.
    opt_state = optax.tree.map_params(optimizer, lambda _, sharding: sharding, jax.eval_shape(optimizer.init, abstract),
                                      moments, transform_non_params=lambda _: replicated)
    scale, guard = jax.tree.map(lambda _: replicated, jax.eval_shape(lambda: (LossScale.new(PrecisionConfig()),
                                                                              Guard.new())))
    return TrainState(step=replicated, params=params, opt_state=opt_state, rng=replicated, first_bad_step=replicated,
                      scale=scale, guard=guard)


def moment_shardings(model: Any, mesh: Mesh, rules: rules_lib.ShardingRules) -> Any:
    """The sharding of each moment, in the structure of the parameters: where gradients are brought, and the update is
    computed."""
    return rules_lib.shardings(mesh, models.logical_axes(model), rules.of_moments, shapes=models.abstract_params(model))


def new_state(model: Any, optimizer: optax.GradientTransformation, seed: Array, params: Any = None,
              precision: PrecisionConfig = PrecisionConfig()) -> TrainState:  # noqa: B008 (frozen)
    """A state at step 0 from the seed's key data, and from parameters if there are any; a pure function to be jitted
    (see `init_state`)."""
    init_key, run_key = jax.random.split(jax.random.wrap_key_data(seed))
    if params is None:
        params = models.init_params(model, init_key)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
                      rng=jax.random.key_data(run_key), first_bad_step=jnp.full((), NOTHING_BAD, jnp.int32),
                      scale=LossScale.new(precision), guard=Guard.new())


def abstract_state(model: Any, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """`jax.ShapeDtypeStruct`s with shardings, at no cost in memory: what a checkpoint is restored into."""
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    shapes = jax.eval_shape(lambda seed: new_state(model, optimizer, seed), key)
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes,
                        shardings)


def init_state(model: Any, optimizer: optax.GradientTransformation, seed: int, shardings: TrainState,
               params: Any = None,
               precision: PrecisionConfig = PrecisionConfig()) -> TrainState:  # noqa: B008 (frozen)
    """Creates the state on the devices it belongs to; no device ever holds more than its share.

    Args:
      model: the Flax module.
      optimizer: the optax transformation.
      seed: of the initial parameters and of the run's key; the values don't depend on the mesh.
      shardings: from `state_shardings`.
      params: float32 parameters to begin with, sharded so, which this takes over; None draws them from the seed.
      precision: has the first loss scale.
    """
    is_cpu = jax.tree.leaves(shardings)[0].mesh.devices.flat[0].platform == "cpu"
    # Random numbers for every leaf make a long program that runs once: optimizing it for CPU costs more than it saves.
    options = {"xla_backend_optimization_level": 1} if is_cpu else None
    create = jax.jit(lambda key_data, params: new_state(model, optimizer, key_data, params, precision),
                     out_shardings=shardings, compiler_options=options, donate_argnums=1)
    return create(jax.random.key_data(jax.random.key(seed)), params)


def num_bytes_per_device(tree: Any) -> int:
    """Bytes of `tree` that the most loaded device of this process holds."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)
