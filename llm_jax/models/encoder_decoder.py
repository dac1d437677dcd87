"""The encoder–decoder Transformer (Vaswani et al. 2017; T5, Raffel et al. 2020, arXiv:1910.10683)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.kernels.attention import DenseContext
from llm_jax.models.attention import Attention
from llm_jax.models.blocks import Block, add_layers, residual, through_layers
from llm_jax.models.config import Execution, ModelConfig
from llm_jax.models.contexts import dense_context
from llm_jax.models.embedding import Embedding, output_weight, positions_along
from llm_jax.models.layers import Mlp, make_norm
from llm_jax.models.layout import LayerKind, encoder_part
from llm_jax.models.relative_positions import RelativePositions
from llm_jax.models.rope import Rotations, rotations

Array = jax.Array


class CrossBlock(nn.Module):
    """A decoder's block: attention to what is before, attention to the encoder's output, a feed-forward layer."""

    config: ModelConfig
    execution: Execution
    kind: LayerKind = LayerKind()

    @nn.compact
    def __call__(self, x_BTD: Array, cache: Any, turns: Rotations, context: Any, bias_HTS: Any, source_BSD: Array,
                 source_context: DenseContext) -> tuple[Array, Any]:
        c = self.config

        def attend(normed_BTD: Array) -> Array:
            layer = Attention(c, self.kind.attention, name="attention")
            return layer(normed_BTD, turns, context, bias_HTS=bias_HTS)[0]

        def attend_across(normed_BTD: Array) -> Array:
            layer = Attention(c, name="cross_attention")
            return layer(normed_BTD, {}, source_context, source_BSD=source_BSD)[0]

        def feed_forward(normed_BTD: Array) -> Array:
            return Mlp(c, (2 * c.num_layers) ** -0.5, name="mlp")(normed_BTD)

        x_BTD = residual(c, "attention", x_BTD, attend)
        x_BTD = residual(c, "cross_attention", x_BTD, attend_across)
        return residual(c, "mlp", x_BTD, feed_forward), cache


class EncoderStack(nn.Module):
    """Embedded tokens through the encoder's blocks."""

    config: ModelConfig  # the encoder's own, `layout.encoder_part`
    execution: Execution

    def setup(self) -> None:
        add_layers(self, Block, self.config, self.execution, 3)
        self.final_norm = make_norm(self.config)
        if self.config.positions == "relative":
            self.relative_positions = RelativePositions(self.config, causal=False)

    def __call__(self, x_BSD: Array, positions_BS: Array, segment_ids_BS: Array | None) -> Array:
        c, e = self.config, self.execution
        bias_HSS = self.relative_positions(x_BSD.shape[1]) if c.positions == "relative" else None
        turns = rotations(c, positions_BS, e.rope_context)
        context = dense_context(self.execution, segment_ids_BS, causal=False)
        return self.final_norm(through_layers(self, c, e, x_BSD, turns, context, bias_HSS)[0])


class EncoderDecoder(nn.Module):
    """The whole model; `encode`, `decode` and `logits` are its parts, for generation."""

    config: ModelConfig
    execution: Execution = Execution()

    def setup(self) -> None:
        c = self.config
        if c.architecture != "encoder_decoder":
            raise UserError(f"an EncoderDecoder can't be made of architecture={c.architecture!r}; `models.build` "
                            f"chooses")
        self.embed = Embedding(c)
        self.encoder = EncoderStack(encoder_part(c), self.execution)
        add_layers(self, CrossBlock, c, self.execution, 5)
        self.final_norm = make_norm(c)
        if c.positions == "relative":
            self.relative_positions = RelativePositions(c, causal=True)
        self.unembed = output_weight(self, c)

    def encode(self, tokens_BS: Array, segment_ids_BS: Array | None = None) -> Array:
        """The encoder's normalised output, [B, S, D] in the execution dtype; arguments as of `__call__`."""
        positions_BS = positions_along(tokens_BS, self.config)
        x_BSD = self.embed(tokens_BS, positions_BS, jnp.dtype(self.execution.dtype))
        return self.encoder(x_BSD, positions_BS, segment_ids_BS)

    def decode(self, source_BSD: Array, decoder_tokens_BT: Array, segment_ids_BS: Array | None = None,
               decoder_segment_ids_BT: Array | None = None) -> Array:
        """The decoder's normalised output, [B, T, D], over what `encode` gave; arguments as of `__call__`."""
        c, e = self.config, self.execution
        positions_BT = positions_along(decoder_tokens_BT, c)
        x_BTD = self.embed(decoder_tokens_BT, positions_BT, jnp.dtype(e.dtype))
        packed = segment_ids_BS is not None and decoder_segment_ids_BT is not None
        across = dense_context(e, decoder_segment_ids_BT if packed else None, segment_ids_BS, causal=False)
        bias_HTT = self.relative_positions(x_BTD.shape[1]) if c.positions == "relative" else None
        turns, own = rotations(c, positions_BT, e.rope_context), dense_context(e, decoder_segment_ids_BT)
        x_BTD, _ = through_layers(self, c, e, x_BTD, turns, own, bias_HTT, source_BSD, across)
        return self.final_norm(x_BTD)

    def logits(self, x_BTD: Array) -> Array:
        """float32 logits [B, T, V] of `decode`'s output."""
        return self.embed.logits(x_BTD, self.unembed)

    def __call__(self, tokens_BS: Array, decoder_tokens_BT: Array, segment_ids_BS: Array | None = None,
                 decoder_segment_ids_BT: Array | None = None) -> Array:
        """Logits of each decoder position, which sees the whole source and the decoder's tokens up to its own.

        Args:
          tokens_BS: int32 ids of the source.
          decoder_tokens_BT: int32 ids that the decoder reads; the first is the start token.
          segment_ids_BS, decoder_segment_ids_BT: int32, the document of each token in its row (0 is padding). A target
            sees the source of its own number. Where one of the two is absent, every target of a row sees all of the
            row's source that is not padding.
        Returns:
          float32 logits [B, T, V].
        """
        source_BSD = self.encode(tokens_BS, segment_ids_BS)
        return self.logits(self.decode(source_BSD, decoder_tokens_BT, segment_ids_BS, decoder_segment_ids_BT))
