"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), with what families add to it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from llm_jax.models.attention_maps import keep_map
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import RMSNorm, add_bias, fan_in_normal, linear, weight
from llm_jax.models.rope import Rotations, rotate
from llm_jax.models.rows import attention

Array = jax.Array


class Attention(nn.Module):
    """Projections, biases, norms of heads, rotary positions; who sees whom is the context's to say.

    Attributes:
      config: the model's.
      kind: "global" or "local" (see `ModelConfig.attention_pattern`).
    """

    config: ModelConfig
    kind: str = "global"

    @nn.compact
    def __call__(self, x_BTD: Array, rotations: Rotations, context: Any, cache: Any = None, source_BSD: Any = None,
                 bias_HTS: Any = None) -> tuple[Array, Any]:
        """Attends from `x_BTD` to `source_BSD` (None: to itself).

        Args:
          x_BTD: normalised activations.
          rotations: see `rope.rotations`.
          context, cache: see `kernels.attention.attention`.
          source_BSD: an encoder's output, for cross attention.
          bias_HTS: added to the scores.
        Returns:
          [B, T, D], and the cache with this call's keys and values.
        """
        c = self.config
        d, h, g, k = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        source_BSD = x_BTD if source_BSD is None else source_BSD

        def project(name: str, x: Array, heads: int, axis: str) -> Array:
            kernel_DHK = weight(self, name, fan_in_normal(d), (d, heads, k), ("embed", axis, "head_dim"))
            return add_bias(self, f"{name}_bias", linear(x, kernel_DHK), (axis, "head_dim"), c.qkv_bias)

        q_BTHK = project("q", x_BTD, h, "heads")
        k_BSGK = project("k", source_BSD, g, "kv_heads")
        v_BSGK = project("v", source_BSD, g, "kv_heads")
        if c.qk_norm:
            q_BTHK = RMSNorm(c.norm_eps, c.norm_offset, name="q_norm")(q_BTHK)
            k_BSGK = RMSNorm(c.norm_eps, c.norm_offset, name="k_norm")(k_BSGK)
        if rotations:
            q_BTHK = rotate(q_BTHK, rotations[self.kind], c.rope_interleaved)
            k_BSGK = rotate(k_BSGK, rotations[self.kind], c.rope_interleaved)
        options: dict[str, Any] = {"scale": c.score_scale, "soft_cap": c.attention_soft_cap, "bias_HTS": bias_HTS,
                                   "window": c.sliding_window if self.kind == "local" else None}
        keep_map(self, q_BTHK, k_BSGK, context, **options)
        out_BTHK, cache = attention(q_BTHK, k_BSGK, v_BSGK, context, cache, **options)
        o_HKD = weight(self, "o", fan_in_normal(h * k, (2 * c.num_layers) ** -0.5), (h, k, d),
                       ("heads", "head_dim", "embed"))
        out_BTD = linear(out_BTHK, o_HKD, contract=2)
        return add_bias(self, "o_bias", out_BTD, ("embed",), c.output_bias), cache
