"""Mixtral: Mistral with experts in every layer (arXiv:2401.04088)."""

from __future__ import annotations

from typing import Any

from llm_jax.interop import rope_fields
from llm_jax.interop.families import common
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor
from llm_jax.models import ModelConfig
from llm_jax.models.facts import Experts

ARCHITECTURES = common.architectures("Mixtral")
MODEL_TYPES = ("mixtral",)
IGNORED = common.IGNORED
TIED = common.TIED
_EXPERT_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes."""
    f.default(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
              num_attention_heads=32, num_key_value_heads=8, hidden_act="silu", max_position_embeddings=131072,
              rms_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=1e6, sliding_window=None,
              num_experts_per_tok=2, num_local_experts=8, router_aux_loss_coef=0.001)
    facts = common.read(f, ARCHITECTURES)
    experts = Experts(common.read_count(f, "num_local_experts", "num_experts"), f.integer("num_experts_per_tok"),
                      facts["mlp_dim"], balance_weight=f.number("router_aux_loss_coef"))
    return ModelConfig(family="mixtral", **facts, **rope_fields.read(f, facts["head_dim"], facts["max_context"]),
                       **common.read_window(f), mlp_pattern=("experts",), experts=experts)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    e = common.need_experts(config)
    return (common.write(config, ARCHITECTURES, "mixtral") | rope_fields.write(config)
            | {"sliding_window": config.sliding_window, "num_local_experts": e.count,
               "num_experts_per_tok": e.per_token, "router_aux_loss_coef": e.balance_weight})


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    return common.tensors(config, sparse=_sparse)


def _sparse(config: ModelConfig, hf: str, ours: str) -> list[Tensor]:
    return common.experts(config, hf + "block_sparse_moe.", ours, _EXPERT_NAMES)
