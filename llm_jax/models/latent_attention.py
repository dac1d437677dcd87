"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Keys and values of all heads are projections of one small latent vector, beside one turned key that all heads share.
Training projects them up and attends as usual. A paged cache keeps the latent vector and the turned key alone; there
the up-projection of the keys is applied to the queries instead, and that of the values to the result, so that attention
runs over the latent vectors as over a single wide head.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.kernels.attention import DenseContext
from llm_jax.models.attention_maps import keep_map
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import RMSNorm, fan_in_normal, linear, weight
from llm_jax.models.rope import Rotations, rotate
from llm_jax.models.rows import attention

Array = jax.Array

# What `absorbed` makes of kv_b.
ABSORBED = ("kv_b_keys", "kv_b_values")

# Not the model's norm_eps: the reference implementation leaves its bottlenecks' norms at their default.
_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """As `attention.Attention`, with the projections of `ModelConfig.latent`."""

    config: ModelConfig
    kind: str = "global"

    @nn.compact
    def __call__(self, x_BTD: Array, rotations: Rotations, context: Any, cache: Any = None) -> tuple[Array, Any]:
        c, m = self.config, self.config.latent
        d, h, nope = c.embed_dim, c.num_heads, m.nope_dim

        q_BTHK = self._queries(x_BTD)
        kv_a_DR = weight(self, "kv_a", fan_in_normal(d), (d, m.kv_rank + m.rope_dim), ("embed", "latent"))
        o_HKD = weight(self, "o", fan_in_normal(h * m.value_dim, (2 * c.num_layers) ** -0.5), (h, m.value_dim, d),
                       ("heads", "head_dim", "embed"))

        down_BTR = linear(x_BTD, kv_a_DR)
        latent_BTR = RMSNorm(_NORM_EPS, name="kv_a_norm")(down_BTR[..., :m.kv_rank])
        turned_q_BTHK = rotate(q_BTHK[..., nope:], rotations[self.kind], c.rope_interleaved)
        turned_k_BT1K = rotate(down_BTR[:, :, None, m.kv_rank:], rotations[self.kind], c.rope_interleaved)
        options: dict[str, Any] = {"scale": c.score_scale, "soft_cap": c.attention_soft_cap,
                   "window": c.sliding_window if self.kind == "local" else None}
        if isinstance(context, DenseContext):
            kv_b_RHK = weight(self, "kv_b", fan_in_normal(m.kv_rank), (m.kv_rank, h, nope + m.value_dim),
                              ("latent", "heads", "head_dim"))
            up_BTHK = linear(latent_BTR, kv_b_RHK)
            turned_k_BTHK = jnp.broadcast_to(turned_k_BT1K, (*up_BTHK.shape[:3], m.rope_dim))
            q_BTHK = jnp.concatenate([q_BTHK[..., :nope], turned_q_BTHK], axis=-1)
            k_BTHK = jnp.concatenate([up_BTHK[..., :nope], turned_k_BTHK], axis=-1)
            keep_map(self, q_BTHK, k_BTHK, context, **options)
            out_BTHK, cache = attention(q_BTHK, k_BTHK, up_BTHK[..., nope:], context, cache, **options)
        else:
            keys_HKR, values_HRV = (self.get_variable("params", name).astype(x_BTD.dtype) for name in ABSORBED)
            q_BTHR = jnp.einsum("bthk,hkr->bthr", q_BTHK[..., :nope], keys_HKR)
            q_BTHR = jnp.concatenate([q_BTHR, turned_q_BTHK], axis=-1)
            k_BT1R = jnp.concatenate([latent_BTR[:, :, None], turned_k_BT1K], axis=-1)
            out_BTHR, cache = attention(q_BTHR, k_BT1R, None, context, cache, value_dim=m.kv_rank, **options)
            out_BTHK = jnp.einsum("bthr,hrv->bthv", out_BTHR, values_HRV)
        return linear(out_BTHK, o_HKD, contract=2), cache

    def _queries(self, x_BTD: Array) -> Array:
        c, m = self.config, self.config.latent
        d, shape, axes = c.embed_dim, (c.num_heads, c.head_dim), ("heads", "head_dim")
        if m.query_rank is None:
            return linear(x_BTD, weight(self, "q", fan_in_normal(d), (d, *shape), ("embed", *axes)))
        q_a_DR = weight(self, "q_a", fan_in_normal(d), (d, m.query_rank), ("embed", "latent"))
        q_b_RHK = weight(self, "q_b", fan_in_normal(m.query_rank), (m.query_rank, *shape), ("latent", *axes))
        return linear(RMSNorm(_NORM_EPS, name="q_a_norm")(linear(x_BTD, q_a_DR)), q_b_RHK)


def absorbed(params: Any, config: ModelConfig) -> Any:
    """Per-layer parameters with each kv_b [R, H, K] as the two factors that a paged cache needs: one of the queries
    [H, nope_dim, R] and one of the result [H, R, value_dim]. Made once, as a step would otherwise do it each time."""
    nope = config.latent.nope_dim

    def layer(attention: dict[str, Any]) -> dict[str, Any]:
        kv_b_HKR = jnp.transpose(attention["kv_b"], (1, 2, 0))
        factors = dict(zip(ABSORBED, (kv_b_HKR[:, :nope], jnp.swapaxes(kv_b_HKR[:, nope:], 1, 2)), strict=True))
        return {name: leaf for name, leaf in attention.items() if name != "kv_b"} | factors

    return {name: value | {"attention": layer(value["attention"])} if name.startswith("layers_") else value
            for name, value in params.items()}
