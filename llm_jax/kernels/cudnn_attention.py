"""Attention of whole rows by cuDNN, on NVIDIA GPUs: the fastest there is where a row is one document.

Packed rows are not for it. A mask for it is an array of all pairs of tokens, which is what is to be avoided, and its
ragged form wants a bound on the documents of a row, for each of which it keeps the statistics of a whole row. They are
for `triton_attention`.
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.attention_call import Call
from llm_jax.kernels.chunked_attention import SAVED

Array = jax.Array

MAX_WIDTH = 128  # of a head; chips from Hopper on take 256


def unsupported(call: Call) -> str | None:
    """Why cuDNN can't do it, or None if it can."""
    if call.segments or call.other_keys:
        return "it takes rows of one document only, and packed rows can't be told from them in advance"
    if call.bias or call.soft_cap is not None:
        return "it takes neither a bias nor a soft cap"
    if call.dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 or float16, not {call.dtype}"
    if call.width != call.value_width or call.width % 8 or call.width > MAX_WIDTH:
        return (f"it takes keys and values of one width, a multiple of 8 up to {MAX_WIDTH}, not {call.width} and "
                f"{call.value_width}")
    return None


def attend(q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, segment_ids_BT: None = None, *, scale: float, causal: bool,
           window: int | None = None, soft_cap: None = None) -> Array:
    """See `attention.dense_attention`; on one device (`attention_call.on_mesh`)."""
    out_BTHV = jax.nn.dot_product_attention(
        q_BTHK, k_BSGK, v_BSGV, scale=scale, is_causal=causal, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0))
    return checkpoint_name(out_BTHV, SAVED)
