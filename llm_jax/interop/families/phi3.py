"""Phi-3, Phi-3.5 and Phi-4 with its mini: Llama with fused projections, longrope and partly turned heads
(arXiv:2404.14219)."""

from __future__ import annotations

from typing import Any

from llm_jax.errors import UserError
from llm_jax.interop import rope_fields
from llm_jax.interop.families import common
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor, fused, matrix
from llm_jax.models import ModelConfig

ARCHITECTURES = common.architectures("Phi3")
MODEL_TYPES = ("phi3",)
IGNORED = common.IGNORED
TIED = common.TIED


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes."""
    f.default(vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
              num_attention_heads=32, num_key_value_heads=None, hidden_act="silu", max_position_embeddings=4096,
              original_max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=10000.0,
              sliding_window=None)
    facts = common.read(f, ARCHITECTURES)
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        f.must(name, False)
    for name in ("full_attn_mod", "interpolate_factor"):
        f.must(name, 1)
    rope = rope_fields.read(f, facts["head_dim"], facts["max_context"], partial=1.0)
    scaling = rope["rope_scaling"]
    if scaling is not None and scaling.kind != "longrope":
        raise UserError(f"{f.source}: rope_type={scaling.kind!r} is not supported in this family; supported: 'default' "
                        f"and 'longrope'")
    return ModelConfig(family="phi3", **facts, **rope, **common.read_window(f))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    original = config.rope_scaling.original_context if config.rope_scaling else None
    return (common.write(config, ARCHITECTURES, "phi3") | rope_fields.write(config)
            | {"sliding_window": config.sliding_window,
               "pad_token_id": None,  # the default, 32000, may lie past the vocabulary, and then nothing loads
               "original_max_position_embeddings": original or config.max_context})


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    return common.tensors(config, attention=_attention, dense=fused_mlp)


def _attention(config: ModelConfig, hf: str, ours: str) -> list[Tensor]:
    d, path = (config.embed_dim,), (ours, "attention")
    q, kv = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
    return [fused(hf + "qkv_proj.weight", matrix("", (*path, "q"), d, q), matrix("", (*path, "k"), d, kv),
                  matrix("", (*path, "v"), d, kv)),
            matrix(hf + "o_proj.weight", (*path, "o"), q, d)]


def fused_mlp(config: ModelConfig, hf: str, ours: str) -> list[Tensor]:
    """gate and up as one matrix, and down; as GLM-4 has them too."""
    d, f, path = (config.embed_dim,), (config.mlp_dim,), (ours, "mlp")
    return [fused(hf + "mlp.gate_up_proj.weight", matrix("", (*path, "gate"), d, f), matrix("", (*path, "up"), d, f)),
            matrix(hf + "mlp.down_proj.weight", (*path, "down"), f, d)]
