"""T5's positions: a learned number for every head and bucket of distances, added to the scores (Raffel et al. 2020,
arXiv:1910.10683, section 2.1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import weight

Array = jax.Array


def bucket_table(furthest: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance 0 … furthest, in one direction.

    The first half of the buckets hold one distance each. The others hold ranges that widen by a constant factor, so
    that `max_distance` would begin the bucket after the last; what is further falls into the last. float32, as the
    models were trained: in float64 a distance on a border can fall into its neighbour.

    Returns:
      int32 [furthest + 1], values 0 … buckets − 1.
    """
    exact = buckets // 2
    distance = np.arange(furthest + 1)
    with np.errstate(divide="ignore"):
        ratio = np.log(distance.astype(np.float32) / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    wide = exact + (np.maximum(ratio, 0) * np.float32(buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(wide, buckets - 1)).astype(np.int32)


def buckets_between(length: int, config: ModelConfig, causal: bool) -> np.ndarray:
    """The bucket of every pair of a row's tokens, by how far apart they stand in it.

    Tokens that a causal mask hides have bucket 0. Where every token sees all others, one half of the buckets is for
    keys at or before the query, the other for keys after it.

    Returns:
      int32 [T, S], T = S = length.
    """
    relative_TS = np.arange(length)[None, :] - np.arange(length)[:, None]
    one_way = config.relative_buckets if causal else config.relative_buckets // 2
    table = bucket_table(length, one_way, config.relative_max_distance)
    if causal:
        return table[np.maximum(-relative_TS, 0)]
    return table[np.abs(relative_TS)] + np.where(relative_TS > 0, np.int32(one_way), np.int32(0))


class RelativePositions(nn.Module):
    """The numbers a stack's layers add to their scores; all of them the same.

    Attributes:
      config: the stack's.
      causal: whether a token sees only what is before it.
    """

    config: ModelConfig
    causal: bool

    @nn.compact
    def __call__(self, length: int) -> Array:
        """float32 [H, T, S] for rows of T = S = length tokens."""
        c = self.config
        small = nn.initializers.normal(c.embed_dim**-0.5)
        bias_NH = weight(self, "bias", small, (c.relative_buckets, c.num_heads), (None, "heads"))
        bias_TSH = jnp.take(bias_NH, jnp.asarray(buckets_between(length, c, self.causal)), axis=0)
        return jnp.transpose(bias_TSH, (2, 0, 1)).astype(jnp.float32)
