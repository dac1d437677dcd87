"""Greedy generation with an encoder–decoder.

The engine serves decoders. This is one pure function for models such as T5: it encodes the source once and runs the
decoder over all of its tokens for each new one, without a cache. For answers of a few dozen tokens that is fast enough.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models import EncoderDecoder

Array = jax.Array


def generate(model: EncoderDecoder, params: Any, tokens_BS: Array, segment_ids_BS: Array | None = None, *,
             max_tokens: int, start_id: int, end_ids: Sequence[int]) -> tuple[Array, Array]:
    """The likeliest token at every step.

    Args:
      model, params: an encoder–decoder and its parameters.
      tokens_BS: int32 ids of the sources, one a row.
      segment_ids_BS: int32, 1 for tokens and 0 for padding; None if there is none.
      max_tokens: most tokens of an answer.
      start_id: what the decoder reads first (T5's is its padding, 0).
      end_ids: tokens that end an answer. `generation_config.answer_tokens(run_dir)` reads both of an imported model.
    Returns:
      int32 tokens [B, max_tokens], of which each row's first lengths[b] are its answer, the end token included, and
      start_id comes after them; and int32 lengths [B].
    """
    return _generate(model, params, tokens_BS, segment_ids_BS, max_tokens, start_id, tuple(end_ids))


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _generate(model: EncoderDecoder, params: Any, tokens_BS: Array, segment_ids_BS: Array | None, max_tokens: int,
              start_id: int, end_ids: tuple[int, ...]) -> tuple[Array, Array]:
    variables = {"params": params}
    source_BSD = model.apply(variables, tokens_BS, segment_ids_BS, method="encode")
    rows = tokens_BS.shape[0]

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        t, _, lengths_B = state
        return (t < max_tokens) & jnp.any(lengths_B == max_tokens + 1)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        t, read_BT, lengths_B = state
        x_BTD = model.apply(variables, source_BSD, read_BT[:, :-1], segment_ids_BS, method="decode")
        x_B1D = jax.lax.dynamic_slice_in_dim(x_BTD, t, 1, axis=1)
        logits_B1V: Any = model.apply(variables, x_B1D, method="logits")
        best_B = jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32)
        going_B = lengths_B == max_tokens + 1
        read_BT = jax.lax.dynamic_update_slice_in_dim(
            read_BT, jnp.where(going_B, best_B, start_id)[:, None], t + 1, axis=1)
        ends_B = going_B & jnp.any(best_B[:, None] == jnp.asarray(end_ids, jnp.int32), axis=1)
        return t + 1, read_BT, jnp.where(ends_B, t + 1, lengths_B)

    # A length of max_tokens + 1 says that no end has come yet.
    start = (jnp.int32(0), jnp.full((rows, max_tokens + 1), start_id, jnp.int32),
             jnp.full((rows,), max_tokens + 1, jnp.int32))
    _, read_BT, lengths_B = jax.lax.while_loop(unfinished, step, start)
    return read_BT[:, 1:], jnp.minimum(lengths_B, max_tokens)
