"""Qwen3 with experts: Qwen3's attention, and many small experts in most layers (arXiv:2505.09388)."""

from __future__ import annotations

from typing import Any

from llm_jax.errors import UserError
from llm_jax.interop import rope_fields
from llm_jax.interop.families import common
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor
from llm_jax.models import ModelConfig
from llm_jax.models.facts import Experts
from llm_jax.models.layout import layer_kinds

ARCHITECTURES = common.architectures("Qwen3Moe")
MODEL_TYPES = ("qwen3_moe",)
IGNORED = common.IGNORED
TIED = common.TIED


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes."""
    f.default(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24,
              num_attention_heads=32, num_key_value_heads=4, hidden_act="silu", max_position_embeddings=32768,
              rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10000.0, attention_bias=False,
              use_sliding_window=False, sliding_window=4096, decoder_sparse_step=1, moe_intermediate_size=768,
              num_experts_per_tok=8, num_experts=128, norm_topk_prob=False, router_aux_loss_coef=0.001,
              mlp_only_layers=None)
    facts = common.read(f, ARCHITECTURES)
    f.ignore("max_window_layers")  # the window, if it is on, is on every layer
    if not f.flag("use_sliding_window"):
        f.ignore("sliding_window")
    window = common.read_window(f) if f.flag("use_sliding_window") else {}
    experts = Experts(common.read_count(f, "num_experts", "num_local_experts"), f.integer("num_experts_per_tok"),
                      f.integer("moe_intermediate_size"), renormalize=f.flag("norm_topk_prob"),
                      balance_weight=f.number("router_aux_loss_coef"))
    bias = f.flag("attention_bias")
    return ModelConfig(family="qwen3_moe", **facts, **rope_fields.read(f, facts["head_dim"], facts["max_context"]),
                       **window, mlp_pattern=_mlp_pattern(f, facts["num_layers"]), experts=experts, qk_norm=True,
                       qkv_bias=bias, output_bias=bias)


def _mlp_pattern(f: Fields, num_layers: int) -> tuple[str, ...]:
    step, dense = f.integer("decoder_sparse_step"), f.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) and 0 <= i < num_layers for i in dense):
        f.refuse("mlp_only_layers", f"lists of layers, from 0 to {num_layers - 1}")
    kinds = ["dense" if i in dense or (i + 1) % step else "experts" for i in range(num_layers)]
    if "experts" not in kinds:
        raise UserError(f"{f.source}: decoder_sparse_step={step} and mlp_only_layers leave no layer with experts; "
                        f"at least one is supported")
    return common.shortest_cycle(kinds)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    e = common.need_experts(config)
    dense = [i for i, kind in enumerate(layer_kinds(config)) if kind.mlp == "dense"]
    return (common.write(config, ARCHITECTURES, "qwen3_moe") | rope_fields.write(config)
            | {"attention_bias": config.qkv_bias, "use_sliding_window": config.sliding_window is not None,
               "sliding_window": config.sliding_window, "num_experts": e.count, "num_experts_per_tok": e.per_token,
               "moe_intermediate_size": e.mlp_dim, "norm_topk_prob": e.renormalize, "decoder_sparse_step": 1,
               "mlp_only_layers": dense, "router_aux_loss_coef": e.balance_weight})


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    return common.tensors(config, sparse=_sparse)


def _sparse(config: ModelConfig, hf: str, ours: str) -> list[Tensor]:
    return common.experts(config, hf + "mlp.", ours, {name: name + "_proj" for name in ("gate", "up", "down")})
