"""Qwen3: Llama with a norm on each query and key (arXiv:2505.09388)."""

from __future__ import annotations

from typing import Any

from llm_jax.interop import rope_fields
from llm_jax.interop.families import common
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor
from llm_jax.models import ModelConfig

ARCHITECTURES = common.architectures("Qwen3")
MODEL_TYPES = ("qwen3",)
IGNORED = common.IGNORED
TIED = common.TIED


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes."""
    f.default(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
              num_attention_heads=32, num_key_value_heads=32, head_dim=128, hidden_act="silu",
              max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10000.0,
              attention_bias=False)
    facts = common.read(f, ARCHITECTURES)
    bias = f.flag("attention_bias")
    return ModelConfig(family="qwen3", **facts, **rope_fields.read(f, facts["head_dim"], facts["max_context"]),
                       **common.read_qwen_layers(f, facts["num_layers"]), qk_norm=True, qkv_bias=bias,
                       output_bias=bias)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    return (common.write(config, ARCHITECTURES, "qwen3") | rope_fields.write(config)
            | common.write_qwen_layers(config) | {"attention_bias": config.qkv_bias})


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    return common.tensors(config)
