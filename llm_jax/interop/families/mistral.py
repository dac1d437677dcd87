"""Mistral 7B, Nemo and others of one shape: Llama with a window over all its layers (arXiv:2310.06825)."""

from __future__ import annotations

from typing import Any

from llm_jax.interop import rope_fields
from llm_jax.interop.families import common
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor
from llm_jax.models import ModelConfig

ARCHITECTURES = common.architectures("Mistral")
MODEL_TYPES = ("mistral",)
IGNORED = common.IGNORED
TIED = common.TIED


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes."""
    f.default(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
              num_attention_heads=32, num_key_value_heads=8, hidden_act="silu", max_position_embeddings=131072,
              rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10000.0, sliding_window=4096)
    facts = common.read(f, ARCHITECTURES)
    return ModelConfig(family="mistral", **facts, **rope_fields.read(f, facts["head_dim"], facts["max_context"]),
                       **common.read_window(f))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    return (common.write(config, ARCHITECTURES, "mistral") | rope_fields.write(config)
            | {"sliding_window": config.sliding_window})


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    return common.tensors(config)
