"""A jitted step that can be compiled before anything is there to run it on, and is compiled only once."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh


class CompiledStep:
    """Called, it runs on its mesh: what `compile` made if that was called, otherwise what jit makes of the first call.
    """

    def __init__(self, jitted: Any, mesh: Mesh):
        self._jitted, self._mesh = jitted, mesh
        self._compiled: jax.stages.Compiled | None = None

    def compile(self, *arguments: Any) -> jax.stages.Compiled:
        """Compiles for arguments of these shapes, dtypes and shardings, which later calls must have.

        Args:
          *arguments: trees of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          The program; `memory_analysis()` and `as_text()` tell what it will need and do.

        Raises:
          jax.errors.JaxRuntimeError: it can't be compiled; RESOURCE_EXHAUSTED, if it can't fit.
        """
        self._compiled = self.lower(*arguments).compile()
        return self._compiled

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Only traces, for the same arguments as `compile`."""
        with jax.set_mesh(self._mesh):
            return self._jitted.lower(*arguments)

    def __call__(self, *arguments: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return (self._compiled or self._jitted)(*arguments)
