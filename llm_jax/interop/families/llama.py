"""Llama 2, 3 and later, and the many models that are one under another name (arXiv:2307.09288, arXiv:2407.21783)."""

from __future__ import annotations

from typing import Any

from llm_jax.interop import rope_fields
from llm_jax.interop.families import common
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor
from llm_jax.models import ModelConfig

ARCHITECTURES = common.architectures("Llama")
MODEL_TYPES = ("llama",)
IGNORED = common.IGNORED
TIED = common.TIED


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes."""
    f.default(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
              num_attention_heads=32, num_key_value_heads=None, hidden_act="silu", max_position_embeddings=2048,
              rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10000.0, attention_bias=False, mlp_bias=False)
    facts = common.read(f, ARCHITECTURES)
    f.must("rope_interleaved", False)
    f.ignore("is_llama_config")
    bias = f.flag("attention_bias")
    return ModelConfig(family="llama", **facts, **rope_fields.read(f, facts["head_dim"], facts["max_context"]),
                       qkv_bias=bias, output_bias=bias, mlp_bias=f.flag("mlp_bias"))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    return (common.write(config, ARCHITECTURES, "llama") | rope_fields.write(config)
            | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias})


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    return common.tensors(config)
