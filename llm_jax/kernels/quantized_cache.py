"""Cache entries of one or two bytes.

bfloat16 and float8 lie in their pools as whole numbers of the same bits: XLA on a CPU widens a whole pool of narrow
floats, once to read a few pages of it and once more to write a token, where it reads and writes whole numbers in place.

One-byte entries are each token's key or value of a head as small numbers times one float32 scale. Taken from the entry
itself, it needs no calibration and no second look at tokens written before (cf. KIVI, Liu et al. 2024,
arXiv:2402.02750, whose values are quantized per token as here).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

# The largest number that an entry may hold, by dtype.
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}
_ENTRIES = {bits: entry for entry, bits in _BITS.items()}
# What a slot that was never written may hold at worst: a NaN, or the largest number where there is none.
_WORST = {"uint16": 0x7FC0, "uint8": 0x7F, "int8": 127}


def stored_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of the pool that holds entries of `dtype`."""
    name = jnp.dtype(dtype).name
    return jnp.dtype(_BITS.get(name, name))


def entry_dtype(pool: Array) -> jnp.dtype:
    """The dtype of a pool's entries."""
    return jnp.dtype(_ENTRIES.get(pool.dtype.name, pool.dtype.name))


def to_bits(entries: Array) -> Array:
    """Entries as a pool holds them."""
    stored = stored_dtype(entries.dtype)
    return entries if stored == entries.dtype else jax.lax.bitcast_convert_type(entries, stored)


def from_bits(stored: Array) -> Array:
    """What a pool holds, as entries."""
    dtype = entry_dtype(stored)
    return stored if stored.dtype == dtype else jax.lax.bitcast_convert_type(stored, dtype)


def worst_like(pool: Array) -> Array:
    """An array like `pool` of the worst that it can hold: NaN wherever there is one. For tests of isolation."""
    return jnp.full(pool.shape, _WORST.get(pool.dtype.name, jnp.nan), pool.dtype)


def is_quantized(dtype: Any) -> bool:
    """Whether entries of this dtype are kept with scales."""
    return jnp.dtype(dtype).name in _LARGEST


def quantize(x_NGK: Array, dtype: Any) -> tuple[Array, Array]:
    """Entries of `dtype` and float32 scales [N, G], whose product is near x.

    An int8 entry is off by at most half a scale, scale = max|x| / 127; a float8 one by at most 1/16 of itself
    (3 bits of mantissa), or half a scale · 2⁻⁹ next to zero, scale = max|x| / 448.
    """
    largest = _LARGEST[jnp.dtype(dtype).name]
    x_NGK = x_NGK.astype(jnp.float32)
    scale_NG = jnp.max(jnp.abs(x_NGK), axis=-1) / largest
    scaled_NGK = x_NGK / jnp.where(scale_NG > 0, scale_NG, 1.0)[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        scaled_NGK = jnp.round(scaled_NGK)
    # Rounding the quotient may have passed the largest number by a hair: float8 would make NaN of it.
    return jnp.clip(scaled_NGK, -largest, largest).astype(dtype), scale_NG
