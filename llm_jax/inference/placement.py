"""Where an engine's arrays lie: on one device, or over the tensor axis of a mesh, of one process or of several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.errors import UserError
from llm_jax.inference.programs import Pools
from llm_jax.kernels.paged import head_axis
from llm_jax.models import Decoder, Execution, ModelConfig, activation_rules, logical_axes
from llm_jax.models.latent_attention import ABSORBED
from llm_jax.parallel import rules
from llm_jax.parallel.mesh import MeshConfig, make_mesh


class Placement:
    """Puts weights, pools and small arrays where they belong.

    Weights are cut along heads and mlp as in training, and along the vocabulary if it divides; keys, values and their
    pools along their heads, if these divide, and are on every device else. Everything that the host reads is on every
    device. Where the mesh spans processes, each calls with the same values and holds the shards of its own devices.

    Attributes:
      whole: the sharding of what every device holds; None on one device.
      pool_parts: devices among which each page is cut.
    """

    def __init__(self, config: ModelConfig, tensor: int, devices: Sequence[jax.Device] | None = None, *,
                 backend: str = "xla"):
        """Raises UserError if there are not `tensor` devices, or other processes would be left out."""
        self._config = config
        self._backend = backend
        self.whole: NamedSharding | None = None
        self.pool_parts = 1
        if tensor == 1:
            return
        if devices is None:
            devices = jax.devices()
            if jax.process_count() > 1 and tensor < len(devices):
                raise UserError(f"tensor={tensor} would leave some of the {len(devices)} devices of "
                                f"{jax.process_count()} processes idle; set it to {len(devices)}")
        devices = list(devices)
        if tensor > len(devices):
            raise UserError(f"tensor={tensor} needs as many devices; there are {len(devices)}")
        self._mesh = make_mesh(MeshConfig(tensor=tensor), devices[:tensor])
        self._divides = config.cache_widths()[0] % tensor == 0
        self._vocab = "tensor" if config.vocab_size % tensor == 0 else None
        self.pool_parts = tensor if self._divides else 1
        self.whole = rules.replicated(self._mesh)

    def params(self, params: Any) -> Any:
        """Per-layer parameters, as a step reads them; UserError if an axis can't be divided."""
        if self.whole is None:
            return jax.tree.map(_pinned, params)
        axes = logical_axes(Decoder(self._config, Execution(scan_layers=False)))
        if self._config.latent is not None:
            axes = {name: _absorbed(layer) if name.startswith("layers_") else layer for name, layer in axes.items()}
        table = {**rules.RULES, "vocab": self._vocab, "kv_heads": "tensor" if self._divides else None}
        return jax.tree.map(_put, params, rules.shardings(self._mesh, axes, table, params))

    def pools(self, make: Callable[[], Pools]) -> Pools:
        """What `make` makes, each pool made where it lies, so that no device ever holds more than its own part."""
        if self.whole is None:
            return jax.tree.map(_pinned, make())
        return jax.jit(make, out_shardings=self.pool_shardings(jax.eval_shape(make)))()

    def pool_shardings(self, pools: Pools) -> Any:
        """The sharding of each pool."""
        def one(pool: jax.Array) -> NamedSharding:
            spec: list[str | None] = [None] * len(pool.shape)
            if self._divides:
                spec[head_axis(self._backend)] = "tensor"
            return NamedSharding(self._mesh, PartitionSpec(*spec))

        return jax.tree.map(one, pools)

    def replicated(self, tree: Any) -> Any:
        """Arrays that every device holds."""
        return jax.tree.map(_pinned if self.whole is None else lambda leaf: _put(leaf, self.whole), tree)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """In force where the model is traced: products that are cut along their sum are added up once, and the experts
        are computed by each device on its own slice (`models.experts`)."""
        if self.whole is None:
            yield
            return
        with (jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh),
              activation_rules({"activation_mlp": "tensor", "activation_vocab": self._vocab})):
            yield


def _pinned(leaf: Any) -> jax.Array:
    """The same array, committed to the device that it is on: what a step returns is, if one of its arguments is, and a
    program is compiled again for arguments of which others are."""
    if isinstance(leaf, jax.Array) and leaf.committed:
        return leaf
    return jax.device_put(leaf, next(iter(leaf.devices())) if isinstance(leaf, jax.Array) else jax.local_devices()[0])


def _put(leaf: Any, sharding: Any) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)  # `device_put` would send it round to see whether all processes have the same
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _absorbed(layer: dict[str, Any]) -> dict[str, Any]:
    attention = {name: axes for name, axes in layer["attention"].items() if name != "kv_b"}
    keys, values = ABSORBED
    return layer | {"attention": attention | {keys: ("heads", "head_dim", "latent"),
                                              values: ("heads", "latent", "head_dim")}}
