"""Gemma 3, its text models: Gemma 2 with head norms for soft caps, five local layers to a global one, and a base of
rotary frequencies for each kind (arXiv:2503.19786)."""

from __future__ import annotations

from typing import Any

from llm_jax.interop import rope_fields
from llm_jax.interop.families import common
from llm_jax.interop.families.gemma2 import NORMS, read_gemma, write_gemma
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor
from llm_jax.models import ModelConfig

ARCHITECTURES = {"Gemma3ForCausalLM": "lm", "Gemma3TextForSequenceClassification": "sequence_classification"}
MODEL_TYPES = ("gemma3_text",)
IGNORED = (*common.IGNORED, r"model\.rotary_emb_local\.inv_freq", r"model\.rotary_emb\.\w+_inv_freq")
TIED = common.TIED


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes."""
    f.default(vocab_size=262208, max_position_embeddings=131072, attn_logit_softcapping=None,
              final_logit_softcapping=None, sliding_window_pattern=6)
    facts = read_gemma(f, ARCHITECTURES)
    period = f.integer("sliding_window_pattern")
    f.must("_sliding_window_pattern", period)
    layers = common.read_layer_types(f, facts["num_layers"], lambda i: (i + 1) % period != 0)
    return ModelConfig(family="gemma3", **facts, **layers, qk_norm=True,
                       **rope_fields.read_layered(f, facts["max_context"], 1e6, 1e4))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    return (write_gemma(config, ARCHITECTURES, "gemma3_text") | rope_fields.write(config)
            | {"rope_local_base_freq": config.local_rope_theta or config.rope_theta})


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    return common.tensors(config, norms=NORMS)
