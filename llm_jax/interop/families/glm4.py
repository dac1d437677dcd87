"""GLM-4 (0414): norms before and after each part; half of each head turns, in neighbouring pairs (arXiv:2406.12793)."""

from __future__ import annotations

from typing import Any

from llm_jax.interop import rope_fields
from llm_jax.interop.families import common
from llm_jax.interop.families.phi3 import fused_mlp
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor
from llm_jax.models import ModelConfig

ARCHITECTURES = common.architectures("Glm4")
MODEL_TYPES = ("glm4",)
IGNORED = common.IGNORED
TIED = common.TIED
NORMS = {"input_layernorm": "attention_norm", "post_self_attn_layernorm": "attention_post_norm",
         "post_attention_layernorm": "mlp_norm", "post_mlp_layernorm": "mlp_post_norm"}


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes."""
    f.default(vocab_size=151552, hidden_size=4096, intermediate_size=13696, num_hidden_layers=40,
              num_attention_heads=32, num_key_value_heads=2, head_dim=128, hidden_act="silu",
              max_position_embeddings=131072, rms_norm_eps=1.5625e-7, tie_word_embeddings=False, rope_theta=10000.0,
              attention_bias=True)
    facts = common.read(f, ARCHITECTURES)
    return ModelConfig(family="glm4", **facts,
                       **rope_fields.read(f, facts["head_dim"], facts["max_context"], partial=0.5),
                       rope_interleaved=True, qkv_bias=f.flag("attention_bias"), norm_placement="sandwich")


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    return (common.write(config, ARCHITECTURES, "glm4") | {"partial_rotary_factor": 1.0} | rope_fields.write(config)
            | {"attention_bias": config.qkv_bias,
               "pad_token_id": None})  # the default, 151329, may lie past the vocabulary, and then nothing loads


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    return common.tensors(config, norms=NORMS, dense=fused_mlp)
