"""The encoder-only Transformer: every token sees its whole document (BERT, Devlin et al. 2019, arXiv:1810.04805)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.models.blocks import Block, add_layers, through_layers
from llm_jax.models.config import Execution, ModelConfig
from llm_jax.models.contexts import dense_context
from llm_jax.models.embedding import Embedding, output_weight, positions_along
from llm_jax.models.heads import TaskHead, dense, first_token, mean_token
from llm_jax.models.layers import activation, make_norm, weight
from llm_jax.models.relative_positions import RelativePositions
from llm_jax.models.rope import rotations

Array = jax.Array


class Pooler(nn.Module):
    """tanh of a linear map: float32."""

    @nn.compact
    def __call__(self, x_BD: Array) -> Array:
        return jnp.tanh(dense(self, x_BD, x_BD.shape[-1], axis="mlp"))


class NextSentence(nn.Module):
    """Scores of "B follows A" and "B is from elsewhere": float32 [B, 2]."""

    @nn.compact
    def __call__(self, pooled_BD: Array) -> Array:
        return dense(self, pooled_BD, 2)


class MaskedLmTransform(nn.Module):
    """What stands between the last block and the output projection: a linear map, the activation and a norm."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        out_BTD = dense(self, x_BTD, x_BTD.shape[-1], axis="mlp").astype(x_BTD.dtype)
        return make_norm(self.config, "norm")(activation(self.config.activation)(out_BTD))


class Encoder(nn.Module):
    """The whole model: embeddings, blocks, and the heads that `ModelConfig.encoder_heads` names, or a task's."""

    config: ModelConfig
    execution: Execution = Execution()

    def setup(self) -> None:
        c = self.config
        if c.architecture != "encoder":
            raise UserError(f"an Encoder can't be made of architecture={c.architecture!r}; `models.build` chooses")
        self.embed = Embedding(c)
        add_layers(self, Block, c, self.execution, 3)
        if c.norm_placement != "post":
            self.final_norm = make_norm(c)
        if c.positions == "relative":
            self.relative_positions = RelativePositions(c, causal=False)
        if "pooler" in c.encoder_heads:
            self.pooler = Pooler()
        if "next_sentence" in c.encoder_heads:
            self.next_sentence = NextSentence()
        if "masked_lm" in c.encoder_heads:
            self.masked_lm = MaskedLmTransform(c)
            self.output_bias = weight(self, "output_bias", nn.initializers.zeros_init(), (c.vocab_size,), ("vocab",))
            self.unembed = output_weight(self, c)
        if c.head is not None:
            self.head = TaskHead(c.head, bias=True)

    def hidden(self, tokens_BT: Array, segment_ids_BT: Array | None = None, token_types_BT: Array | None = None,
               positions_BT: Array | None = None) -> Array:
        """The output of the last block, [B, T, D] in the execution dtype; arguments as of `__call__`."""
        c, e = self.config, self.execution
        positions_BT = positions_along(tokens_BT, c) if positions_BT is None else positions_BT
        x_BTD = self.embed(tokens_BT, positions_BT, jnp.dtype(e.dtype), token_types_BT)
        turns, context = rotations(c, positions_BT, e.rope_context), dense_context(e, segment_ids_BT, causal=False)
        bias_HTT = self.relative_positions(x_BTD.shape[1]) if c.positions == "relative" else None
        x_BTD, _ = through_layers(self, c, e, x_BTD, turns, context, bias_HTT)
        return x_BTD if c.norm_placement == "post" else self.final_norm(x_BTD)

    def logits(self, x_BTD: Array) -> Array:
        """Masked-LM logits, float32 [B, T, V], of `hidden`'s output."""
        return self.embed.logits(self.masked_lm(x_BTD), self.unembed, self.output_bias)

    def __call__(self, tokens_BT: Array, segment_ids_BT: Array | None = None, token_types_BT: Array | None = None,
                 positions_BT: Array | None = None) -> dict[str, Array] | Array:
        """What the model says of whole rows. Under jit, entries of the mapping that nobody uses cost nothing.

        Args:
          tokens_BT: int32 token ids.
          segment_ids_BT: int32, the document of each token in its row (0 is padding); tokens attend within their own
            document only. Absent: each row is one document.
          token_types_BT: int32, the row of the table of token types (BERT's sentence A is 0, B is 1). Absent: 0.
          positions_BT: int32 position of each token in its document. Absent: 0, 1, 2, … along the row.
        Returns:
          With `ModelConfig.head`, the head's result: float32, see `heads.TaskHead`. Without, a mapping with
            "hidden": [B, T, D] in the execution dtype;
            "mean": float32 [B, D], the mean over the row's tokens that are not padding;
            "pooled": float32 [B, D], from the row's first token, if there is a pooler;
            "nsp": float32 [B, 2], if there is a next-sentence head: B follows A, B is from elsewhere;
            "logits": float32 [B, T, V], if there is a masked-LM head.
          What is one a sequence ("mean", "pooled", "nsp", and a task's result) is of a row, whose documents should
          then be one.
        """
        c = self.config
        x_BTD = self.hidden(tokens_BT, segment_ids_BT, token_types_BT, positions_BT)
        pooled_BD = self.pooler(first_token(x_BTD, segment_ids_BT)) if "pooler" in c.encoder_heads else None
        if c.head is not None:
            return self.head(pooled_BD.astype(x_BTD.dtype) if c.head.per_sequence else x_BTD)
        made = {"hidden": x_BTD, "mean": mean_token(x_BTD, segment_ids_BT)}
        if pooled_BD is not None:
            made["pooled"] = pooled_BD
        if "next_sentence" in c.encoder_heads:
            made["nsp"] = self.next_sentence(pooled_BD.astype(x_BTD.dtype))
        if "masked_lm" in c.encoder_heads:
            made["logits"] = self.logits(x_BTD)
        return made
