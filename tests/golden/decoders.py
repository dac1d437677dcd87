"""The decoders of the golden files: tiny configurations in which every fact of the family changes the logits.

Widths are small and numbers unlike each other (heads, head width, model width), windows are shorter than the rows, and
rotary bases are such that every frequency turns within a row.
"""

from __future__ import annotations

import transformers as hf

from tests.golden.spec import Gains, Spec

VOCAB = 96
EPS = 0.002  # far larger than anyone's, so that it matters
_SHORT = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5]
_LONG = [1.2, 1.8, 3.0, 5.0, 8.0, 12.0]


def llama(**changes):
    values = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16, max_position_embeddings=64, rms_norm_eps=EPS, bos_token_id=1,
                  eos_token_id=2, pad_token_id=None, tie_word_embeddings=False)
    return hf.LlamaConfig(**(values | changes))


def _old_rope(theta: float, scaling: dict | None = None) -> dict:
    """Rope as checkpoints of transformers 4 say it."""
    return {"rope_theta": theta, "rope_scaling": scaling}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
           "rope_type": "llama3"}
_DEEPSEEK = {"beta_fast": 32, "beta_slow": 1, "factor": 4, "mscale": 1.0, "mscale_all_dim": 0.7,
             "original_max_position_embeddings": 32, "type": "yarn"}
_LONGROPE = {"type": "longrope", "short_factor": _SHORT, "long_factor": _LONG}

DECODERS = {
    "llama2": Spec(
        lambda: llama(num_key_value_heads=4, head_dim=8, intermediate_size=64, rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0}),
        seed=1, old=_old_rope(10000.0) | {"pretraining_tp": 1}, old_drops=("head_dim",)),
    "llama3": Spec(
        lambda: llama(tie_word_embeddings=True, max_position_embeddings=128, bos_token_id=1, eos_token_id=[2, 3, 4],
                       rope_parameters={"rope_theta": 500.0, **_LLAMA3}),
        seed=2, dtype="bfloat16", old=_old_rope(500.0, _LLAMA3), generation={
            "bos_token_id": 1, "eos_token_id": [2, 3, 4], "do_sample": True, "temperature": 0.6, "top_p": 0.9}),
    "mistral": Spec(
        lambda: hf.MistralConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            rms_norm_eps=EPS, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, sliding_window=6,
            bos_token_id=1,
            eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        seed=3, dtype="bfloat16", old=_old_rope(10000.0)),
    "qwen2": Spec(
        lambda: hf.Qwen2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            rms_norm_eps=EPS, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2, sliding_window=6, max_window_layers=1,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        seed=4, old=_old_rope(1000000.0) | {"sliding_window": 6}, old_drops=("layer_types",),
        generation={"bos_token_id": 1, "eos_token_id": [2, 1], "pad_token_id": 1, "do_sample": True, "top_k": 20,
                    "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.05},
        variants={"sliding": {"use_sliding_window": True, "sliding_window": 6, "layer_types": [
            "full_attention", "sliding_attention", "sliding_attention"]}}),
    "qwen3": Spec(
        lambda: hf.Qwen3Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            rms_norm_eps=EPS, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
            tie_word_embeddings=True, bos_token_id=1,
            eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        seed=5, gains=Gains(qk_norm=1.7), old=_old_rope(1000000.0), old_drops=("layer_types",)),
    "gemma2": Spec(
        lambda: hf.Gemma2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            rms_norm_eps=EPS, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, sliding_window=5,
            query_pre_attn_scalar=24, attn_logit_softcapping=3.0, final_logit_softcapping=8.0,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        seed=6, dtype="bfloat16", gains=Gains(norm_offset=True, embed=0.8),
        old={"rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
        old_drops=("layer_types", "use_bidirectional_attention", "tie_word_embeddings", "_sliding_window_pattern")),
    "gemma3": Spec(
        lambda: hf.Gemma3TextConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=13, num_attention_heads=2,
            rms_norm_eps=EPS, num_key_value_heads=1, head_dim=16, max_position_embeddings=64, sliding_window=5,
            query_pre_attn_scalar=20, eos_token_id=[1, 7], rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}),
        seed=7, dtype="bfloat16", gains=Gains(norm_offset=True, qk_norm=1.6, embed=0.8),
        old={"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": {"factor": 8.0,
             "rope_type": "linear"}, "sliding_window_pattern": 6, "cache_implementation": "hybrid"},
        old_drops=("layer_types", "use_bidirectional_attention", "tie_word_embeddings", "_sliding_window_pattern")),
    "phi3": Spec(
        lambda: hf.Phi3Config(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            rms_norm_eps=EPS, num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=64,
            sliding_window=7,
            bos_token_id=1, eos_token_id=2, pad_token_id=2, rope_parameters={
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        seed=8, dtype="bfloat16", old=_old_rope(10000.0) | {"partial_rotary_factor": 0.5}),
    "phi3_longrope": Spec(
        lambda: hf.Phi3Config(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
            rms_norm_eps=EPS, num_key_value_heads=3, max_position_embeddings=128, original_max_position_embeddings=32,
            sliding_window=262144, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
            rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                             "short_factor": _SHORT, "long_factor": _LONG, "original_max_position_embeddings": 32}),
        seed=9, old=_old_rope(10000.0, _LONGROPE) | {"partial_rotary_factor": 0.75}, long_row=44, greedy=4),
    "gpt2": Spec(
        lambda: hf.GPT2Config(vocab_size=VOCAB, n_positions=48, n_embd=32, n_layer=2, n_head=4, bos_token_id=95,
                              eos_token_id=95, layer_norm_epsilon=EPS),
        seed=10, old={"n_ctx": 48}, hub="gpt2"),
    "glm4": Spec(
        lambda: hf.Glm4Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            rms_norm_eps=EPS, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=3,
            eos_token_id=[3, 4, 5],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        seed=41, dtype="bfloat16", old={"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        generation={"eos_token_id": [3, 4, 5], "pad_token_id": 3, "do_sample": True, "temperature": 0.8,
                    "top_p": 0.8}),
    "mixtral": Spec(
        lambda: hf.MixtralConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
            rms_norm_eps=EPS, num_key_value_heads=2, max_position_embeddings=64, num_local_experts=5,
            num_experts_per_tok=2,
            bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        seed=12, dtype="bfloat16", old={"rope_theta": 1000000.0}),
    "qwen3_moe": Spec(
        lambda: hf.Qwen3MoeConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            rms_norm_eps=EPS, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=16, norm_topk_prob=True, mlp_only_layers=[1], bos_token_id=1, eos_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        seed=13, gains=Gains(qk_norm=1.7), old=_old_rope(1000000.0) | {"max_window_layers": 3}),
    "deepseek_v3": Spec(
        lambda: hf.DeepseekV3Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=3,
            rms_norm_eps=EPS, num_attention_heads=4, num_key_value_heads=4, n_shared_experts=2, n_routed_experts=8,
            routed_scaling_factor=2.5, kv_lora_rank=16, q_lora_rank=20, qk_rope_head_dim=8, v_head_dim=12,
            qk_nope_head_dim=16, n_group=4, topk_group=2, num_experts_per_tok=3, first_k_dense_replace=1,
            norm_topk_prob=True, max_position_embeddings=128, num_mtp_layers=1, rope_parameters={
                **{k: v for k, v in _DEEPSEEK.items() if k != "type"}, "rope_type": "yarn", "rope_theta": 10000.0}),
        seed=14, dtype="bfloat16", hub="deepseek_v3", old=_old_rope(10000.0, _DEEPSEEK) | {
            "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1,
            "aux_loss_alpha": 0.001, "seq_aux": True},
        old_drops=("rope_interleave", "head_dim", "qk_head_dim", "output_router_logits")),
    "llama_rope": Spec(
        lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        seed=15, greedy=0, lengths=(24,), dtype="bfloat16", variants={
            "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
            "dynamic": {"max_position_embeddings": 32, "rope_parameters": {
                "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
            "yarn": {"rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}},
            "yarn_untruncated": {"rope_parameters": {
                "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
                "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 0.8}},
            "longrope": {"max_position_embeddings": 64, "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
                "short_factor": [*_SHORT, 3.0, 4.0], "long_factor": [*_LONG, 16.0, 20.0]}},
        }, long_row=44),
}
