"""Gemma 2: norms before and after each part, soft caps, every other layer local (arXiv:2408.00118)."""

from __future__ import annotations

from typing import Any

from llm_jax.interop import rope_fields
from llm_jax.interop.families import common
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor
from llm_jax.models import ModelConfig

ARCHITECTURES = common.architectures("Gemma2")
MODEL_TYPES = ("gemma2",)
IGNORED = common.IGNORED
TIED = common.TIED
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "attention_post_norm",
         "pre_feedforward_layernorm": "mlp_norm", "post_feedforward_layernorm": "mlp_post_norm"}


def read_gemma(f: Fields, known: dict[str, str]) -> dict[str, Any]:
    """The arguments of `ModelConfig` that Gemma 2 and 3 read alike."""
    f.default(vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
              num_key_value_heads=4, head_dim=256, hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
              tie_word_embeddings=True, attention_bias=False, query_pre_attn_scalar=256, sliding_window=4096)
    facts = common.read(f, known, activation="hidden_activation")
    f.ignore("hidden_act")  # stands beside hidden_activation in some files, and is not read
    f.must("use_bidirectional_attention", False)
    bias, scalar = f.flag("attention_bias"), f.number("query_pre_attn_scalar")
    if scalar <= 0:
        f.refuse("query_pre_attn_scalar", "numbers above 0")
    return facts | {
        "norm_offset": 1.0, "norm_placement": "sandwich", "embed_scale": facts["embed_dim"] ** 0.5, "qkv_bias": bias,
        "output_bias": bias, "attention_scale": None if scalar == facts["head_dim"] else scalar**-0.5,
        "attention_soft_cap": f.maybe_number("attn_logit_softcapping"),
        "logit_soft_cap": f.maybe_number("final_logit_softcapping")}


def write_gemma(config: ModelConfig, known: dict[str, str], model_type: str) -> dict[str, Any]:
    """The inverse of `read_gemma`."""
    return (common.write(config, known, model_type, activation="hidden_activation") | common.write_layer_types(config)
            | {"sliding_window": config.sliding_window or config.max_context,  # never null, even where no layer has it
               "attention_bias": config.qkv_bias, "query_pre_attn_scalar": round(config.score_scale**-2),
               "attn_logit_softcapping": config.attention_soft_cap, "final_logit_softcapping": config.logit_soft_cap})


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes."""
    f.default(max_position_embeddings=8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
              rope_theta=10000.0)
    facts = read_gemma(f, ARCHITECTURES)
    layers = common.read_layer_types(f, facts["num_layers"], lambda i: i % 2 == 0)
    return ModelConfig(family="gemma2", **facts, **layers,
                       **rope_fields.read(f, facts["head_dim"], facts["max_context"]))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    return write_gemma(config, ARCHITECTURES, "gemma2") | rope_fields.write(config)


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    return common.tensors(config, norms=NORMS)
