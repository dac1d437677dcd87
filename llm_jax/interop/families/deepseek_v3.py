"""DeepSeek-V3 and R1: latent attention, sigmoid routing within groups, experts that all tokens share
(arXiv:2412.19437)."""

from __future__ import annotations

from typing import Any

from llm_jax.interop import rope_fields
from llm_jax.interop.families import common
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor, matrix, vector
from llm_jax.models import ModelConfig
from llm_jax.models.facts import Experts, LatentAttention
from llm_jax.models.layout import layer_kinds
from llm_jax.models.rope import yarn_mscale

ARCHITECTURES = common.architectures("DeepseekV3")
MODEL_TYPES = ("deepseek_v3",)
IGNORED = common.IGNORED
TIED = common.TIED


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes."""
    f.default(vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
              num_attention_heads=128, num_key_value_heads=128, hidden_act="silu", max_position_embeddings=4096,
              rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10000.0, q_lora_rank=1536, kv_lora_rank=512,
              qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, rope_interleave=True, aux_loss_alpha=0.0)
    latent = LatentAttention(f.maybe_integer("q_lora_rank"), f.integer("kv_lora_rank"), f.integer("qk_nope_head_dim"),
                             f.integer("qk_rope_head_dim"), f.integer("v_head_dim"))
    f.default(head_dim=latent.rope_dim)  # hidden_size need be no multiple of the heads
    facts = common.read(f, ARCHITECTURES) | {"head_dim": latent.nope_dim + latent.rope_dim}  # the file's is rope_dim
    f.ignore("qk_head_dim", "seq_aux", "num_nextn_predict_layers", "num_mtp_layers")
    f.must("attention_bias", False)
    if facts["num_kv_heads"] != facts["num_heads"]:
        f.refuse("num_key_value_heads", f"num_attention_heads={facts['num_heads']}")
    rope = rope_fields.read(f, latent.rope_dim, facts["max_context"])
    experts, pattern = _experts(f, facts["num_layers"])
    return ModelConfig(family="deepseek_v3", **facts, **rope, latent=latent, experts=experts, mlp_pattern=pattern,
                       rope_interleaved=f.flag("rope_interleave"), attention_scale=_scale(facts["head_dim"], rope))


def _scale(head_dim: int, rope: dict[str, Any]) -> float | None:
    """The scores' scale, which grows with the stretch of the context (as the square: queries and keys both do)."""
    s = rope["rope_scaling"]
    if s is None or not s.mscale_all_dim:
        return None
    return head_dim**-0.5 * yarn_mscale(s.factor, s.mscale_all_dim) ** 2


def _experts(f: Fields, num_layers: int) -> tuple[Experts, tuple[str, ...]]:
    f.default(n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048, n_group=8,
              topk_group=4, norm_topk_prob=True, routed_scaling_factor=2.5, first_k_dense_replace=3)
    f.must("moe_layer_freq", 1)
    f.must("scoring_func", "sigmoid")
    f.must("topk_method", "noaux_tc")
    width, first = f.integer("moe_intermediate_size"), f.integer("first_k_dense_replace", least=0)
    if first >= num_layers:
        f.refuse("first_k_dense_replace", f"less than num_hidden_layers={num_layers}")
    experts = Experts(common.read_count(f, "n_routed_experts", "num_local_experts"), f.integer("num_experts_per_tok"),
                      width, "sigmoid", f.flag("norm_topk_prob"), f.number("routed_scaling_factor"),
                      f.integer("n_group"), f.integer("topk_group"), selection_bias=True,
                      shared_dim=width * f.integer("n_shared_experts"), balance_weight=f.number("aux_loss_alpha"))
    return experts, common.shortest_cycle(["dense"] * first + ["experts"] * (num_layers - first))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    e, m = common.need_experts(config), config.latent
    assert m is not None
    fields = common.write(config, ARCHITECTURES, "deepseek_v3") | rope_fields.write(config)
    fields.pop("head_dim")
    return fields | {
        "q_lora_rank": m.query_rank, "kv_lora_rank": m.kv_rank, "qk_nope_head_dim": m.nope_dim,
        "qk_rope_head_dim": m.rope_dim, "v_head_dim": m.value_dim, "rope_interleave": config.rope_interleaved,
        "n_routed_experts": e.count, "n_shared_experts": e.shared_dim // e.mlp_dim, "num_experts_per_tok": e.per_token,
        "moe_intermediate_size": e.mlp_dim, "n_group": e.groups, "topk_group": e.groups_kept,
        "norm_topk_prob": e.renormalize, "routed_scaling_factor": e.scale, "aux_loss_alpha": e.balance_weight,
        "scoring_func": e.scoring, "topk_method": "noaux_tc", "moe_layer_freq": 1, "num_nextn_predict_layers": 0,
        "first_k_dense_replace": [kind.mlp for kind in layer_kinds(config)].index("experts")}


def ignored(config: ModelConfig) -> tuple[str, ...]:
    """The layer after the last one, which predicts a second token in training."""
    return (rf"model\.layers\.{config.num_layers}\..*",)


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    return common.tensors(config, attention=_attention, sparse=_sparse)


def _attention(config: ModelConfig, hf: str, ours: str) -> list[Tensor]:
    m, path, d, h = config.latent, (ours, "attention"), (config.embed_dim,), config.num_heads
    assert m is not None
    q, rank = (h, config.head_dim), (m.kv_rank,)
    if m.query_rank is None:
        found = [matrix(hf + "q_proj.weight", (*path, "q"), d, q)]
    else:
        found = [matrix(hf + "q_a_proj.weight", (*path, "q_a"), d, (m.query_rank,)),
                 *common.norm(config, hf + "q_a_layernorm", *path, "q_a_norm", width=m.query_rank),
                 matrix(hf + "q_b_proj.weight", (*path, "q_b"), (m.query_rank,), q)]
    return [*found, matrix(hf + "kv_a_proj_with_mqa.weight", (*path, "kv_a"), d, (m.kv_rank + m.rope_dim,)),
            *common.norm(config, hf + "kv_a_layernorm", *path, "kv_a_norm", width=m.kv_rank),
            matrix(hf + "kv_b_proj.weight", (*path, "kv_b"), rank, (h, m.nope_dim + m.value_dim)),
            matrix(hf + "o_proj.weight", (*path, "o"), (h, m.value_dim), d)]


def _sparse(config: ModelConfig, hf: str, ours: str) -> list[Tensor]:
    e = common.need_experts(config)
    names = {name: name + "_proj" for name in ("gate", "up", "down")}
    return [*common.experts(config, hf + "mlp.", ours, names),
            vector(hf + "mlp.gate.e_score_correction_bias", (ours, "experts", "selection_bias"), (e.count,)),
            *common.gated_mlp(config, hf + "mlp.shared_experts.", ours, "experts", "shared", width=e.shared_dim)]
