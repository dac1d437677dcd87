"""The decoder-only Transformer that trains, evaluates and serves (Vaswani et al. 2017; Touvron et al. 2023)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.models.blocks import Block, add_layers, through_layers
from llm_jax.models.config import Execution, ModelConfig
from llm_jax.models.contexts import dense_context
from llm_jax.models.embedding import Embedding, Output, output_weight, positions_along
from llm_jax.models.heads import TaskHead, last_token
from llm_jax.models.layers import make_norm
from llm_jax.models.rope import rotations

Array = jax.Array


class Decoder(nn.Module):
    """The whole model.

    `model.apply({"params": p}, tokens_BT, segment_ids_BT, positions_BT)` gives logits; `hidden` and `logits` are its
    two halves, for callers that need the logits of a few positions only (the server) or in pieces (the loss).
    """

    config: ModelConfig
    execution: Execution = Execution()

    def setup(self) -> None:
        c, e = self.config, self.execution
        if c.architecture != "decoder":
            raise UserError(f"a Decoder can't be made of architecture={c.architecture!r}; `models.build` chooses")
        self.embed = Embedding(c)
        add_layers(self, Block, c, e, 2)
        self.final_norm = make_norm(c)
        if c.head is not None:
            self.head = TaskHead(c.head, bias=not c.head.per_sequence)
        else:
            self.unembed = output_weight(self, c)

    def hidden(self, tokens_BT: Array, positions_BT: Array, context: Any, cache: Any = None) -> tuple[Array, Any]:
        """The normalised output of the last block.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 position of each token in its own document.
          context: what each token may attend to: `kernels.attention.DenseContext` or `kernels.paged.PagedContext`.
          cache: with a paged context, the pools of each layer (a list; layers unrolled).
        Returns:
          [B, T, D] in the execution dtype, and the cache with this call's keys and values written.
        """
        c, e = self.config, self.execution
        x_BTD = self.embed(tokens_BT, positions_BT, jnp.dtype(e.dtype))
        turns = rotations(c, positions_BT, e.rope_context)
        x_BTD, cache = through_layers(self, c, e, x_BTD, turns, context, cache=cache)
        return self.final_norm(x_BTD), cache

    def logits(self, x_BTD: Array) -> Array:
        """float32 logits [B, T, V] of `hidden`'s output."""
        return self.embed.logits(x_BTD, self.unembed)

    def __call__(self, tokens_BT: Array, segment_ids_BT: Array | None = None,
                 positions_BT: Array | None = None) -> Array:
        """Causal logits of whole rows.

        Args:
          tokens_BT: int32 token ids.
          segment_ids_BT: int32, the document of each token in its row (0 is padding); tokens attend within their own
            document only. Absent: each row is one document.
          positions_BT: int32 position of each token in its document. Absent: 0, 1, 2, … along the row.
        Returns:
          float32 logits [B, T, V]; with `ModelConfig.head`, that head's result, see `heads.TaskHead`. One result a
          sequence is read from the last token of the row that is not padding.
        """
        x_BTD = self._rows(tokens_BT, segment_ids_BT, positions_BT)
        head = self.config.head
        if head is not None:
            return self.head(last_token(x_BTD, segment_ids_BT) if head.per_sequence else x_BTD)
        return self.logits(x_BTD)

    def states(self, tokens_BT: Array, segment_ids_BT: Array | None = None,
               positions_BT: Array | None = None) -> tuple[Array, Output]:
        """`hidden` of whole rows, and what turns it into logits: for losses that never hold the logits of all tokens.

        Args:
          tokens_BT, segment_ids_BT, positions_BT: as `__call__` takes them.
        Returns:
          [B, T, D] in the execution dtype, and the output projection.
        """
        return self._rows(tokens_BT, segment_ids_BT, positions_BT), self.embed.output(self.unembed)

    def _rows(self, tokens_BT: Array, segment_ids_BT: Array | None, positions_BT: Array | None) -> Array:
        if positions_BT is None:
            positions_BT = positions_along(tokens_BT, self.config)
        return self.hidden(tokens_BT, positions_BT, dense_context(self.execution, segment_ids_BT))[0]
