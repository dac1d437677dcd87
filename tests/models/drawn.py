"""Random parameters without a compile: initialisation proper costs seconds a model."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from llm_jax import models
from llm_jax.models import ModelConfig


def drawn_params(config: ModelConfig, seed: int = 0) -> Any:
    """Stacked float32 parameters; scales of norms near 1, biases off 0, matrices large enough to matter."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if name == "scale":
            return 1 - config.norm_offset + 0.1 * noise
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else 16
        return noise * (0.1 if name.endswith("bias") else fan_in**-0.5)

    return jax.tree_util.tree_map_with_path(draw, models.abstract_params(models.build(config)))
