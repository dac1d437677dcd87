"""A paged key/value cache (Kwon et al. 2023, arXiv:2309.06180): what a step may attend to, and the pools of pages.

A serving step carries N flat tokens: `decode_width` for each decoding row, then `chunk` for each prefilling row. Keys
and values live in pools of pages, whose layout belongs to the backend.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.kernels.quantized_cache import is_quantized, stored_dtype

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WorkList:
    """Which pages which rows read.

    Attributes:
      row_W: int32 row of each item; items of a row are adjacent. Entries from `count` on are not read.
      page_W: int32 page of the pool.
      start_W: int32 position of the page's first slot in the row's sequence.
      count: int32 scalar, items in use.
    """

    row_W: Array
    page_W: Array
    start_W: Array
    count: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedContext:
    """What the flat tokens of a serving step may attend to.

    Attributes:
      position_N: int32 position of each token in its sequence; −1 for padding.
      slot_N: int32 page · page_size + offset where the token's key and value go; a slot of the spare page for padding.
      decode_rows, chunk: the static split of the N tokens: decode_rows · decode_width tokens of decoding rows, then
        `chunk` tokens a prefilling row.
      decode_width: tokens of a decoding row; more than 1 where proposed tokens are checked.
      decode: work list of the decoding rows; None if every layer has a window.
      prefill: work list of the prefilling rows (`chunk` tokens a row); likewise.
      decode_local, prefill_local: the same for layers with a window, without the pages that lie wholly before it, so
        that such a layer's cost stops growing with the context; None if no layer has one.
      table_RP: int32, the pages of each row (decoding, then prefilling rows) in order of position; past its last one
        the spare page. For kernels that read tables instead of work lists; else None.
      length_R: int32, tokens of each row that are in the cache once this step's are written; 0 for an empty row. As
        table_RP.
      backend: "xla" (work lists), "triton" or "tpu" (tables).
      deterministic: a token's result depends, to the bit, on its own sequence and on N alone: not on which other rows
        are in the step, nor on how its prompt was cut into chunks. "xla" only; reads tables, and each token reads its
        pages by itself.
    """

    position_N: Array
    slot_N: Array
    decode_rows: int = dataclasses.field(metadata={"static": True})
    chunk: int = dataclasses.field(metadata={"static": True})
    decode: WorkList | None = None
    prefill: WorkList | None = None
    decode_local: WorkList | None = None
    prefill_local: WorkList | None = None
    table_RP: Array | None = None
    length_R: Array | None = None
    decode_width: int = dataclasses.field(default=1, metadata={"static": True})
    backend: str = dataclasses.field(default="xla", metadata={"static": True})
    deterministic: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def num_decode(self) -> int:
        """Flat tokens of the decoding rows."""
        return self.decode_rows * self.decode_width


def make_pool(num_pages: int, page_size: int, widths: tuple[int, int, int], dtype: str,
              backend: str = "xla") -> tuple[Array, ...]:
    """Empty pools of one layer: (keys, values), or (keys, values, scales of keys, scales of values).

    "xla": keys [P + 1, G, S, K] and values [P + 1, G, S, V]: a page lies together, as reading it costs more than
    anything else does. With int8 or float8_e4m3fn entries, float32 scales [P + 1, G, S] follow, one a token and head
    (`quantized_cache`, which also says why bfloat16 and float8 lie there as uint16 and uint8).
    "triton": [G, P + 1, S, K] and [G, P + 1, S, V]: a head's page lies together.
    The last page is spare: padding tokens write there, and no work list ever names it.

    Args:
      num_pages, page_size: P and S.
      widths: G, K and V, as `ModelConfig.cache_widths` has them; with V = 0 (latent attention) there are no values.
      dtype: of the entries.
      backend: see `PagedContext.backend`; the TPU's pools are made by its own module.
    """
    heads, *entries = widths
    entries = [width for width in entries if width]
    if backend == "triton":
        if is_quantized(dtype):
            raise ValueError(f"the Triton kernel reads no {dtype} cache")
        return tuple(jnp.zeros((heads, num_pages + 1, page_size, width), dtype) for width in entries)
    shape = (num_pages + 1, heads, page_size)
    pools = tuple(jnp.zeros((*shape, width), stored_dtype(dtype)) for width in entries)
    return pools + tuple(jnp.zeros(shape, jnp.float32) for _ in entries if is_quantized(dtype))


def cache_bytes_per_token(widths: tuple[int, int, int], dtype: str) -> int:
    """Bytes that one layer keeps of a token, scales included.

    Args: as for `make_pool`, "xla".
    """
    heads, *entries = widths
    scale = 4 if is_quantized(dtype) else 0
    return heads * sum(width * jnp.dtype(dtype).itemsize + scale for width in entries if width)


def page_axis(backend: str) -> int:
    """The axis of pages, of every array of a layer's pools."""
    return 1 if backend == "triton" else 0


def head_axis(backend: str) -> int:
    """The axis of key/value heads, of every array of a layer's pools."""
    return {"xla": 1, "triton": 0, "tpu": 2}[backend]


def take_pages(cache: tuple[Array, ...], page_B: Array, backend: str = "xla") -> tuple[Array, ...]:
    """What pages of one layer hold: an array [B, ...] for each array of its pools."""
    axis = page_axis(backend)
    return tuple(jnp.moveaxis(jnp.take(pool, page_B, axis=axis, mode="clip"), axis, 0) for pool in cache)


def put_pages(cache: tuple[Array, ...], page_B: Array, contents: tuple[Array, ...],
              backend: str = "xla") -> tuple[Array, ...]:
    """The layer's pools (in place where donated) with pages set to what `take_pages` gave."""
    axis = page_axis(backend)
    index = (slice(None),) * axis
    return tuple(pool.at[(*index, page_B)].set(jnp.moveaxis(jnp.asarray(new), 0, axis), mode="promise_in_bounds")
                 for pool, new in zip(cache, contents, strict=True))
