"""Random shapes of every family, as configurations of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import transformers as hf

from tests.golden.spec import Gains

ROWS, LONGEST = 3, 30


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to compare.

    Attributes:
      config: of transformers.
      model: the name of its class.
      kind: "decoder", "bert", "t5", "sequence" or "tokens".
      gains: sizes of its random weights.
      untied: whether an encoder–decoder has an output projection of its own, which its config cannot say.
    """

    config: Any
    model: str
    kind: str = "decoder"
    gains: Gains = Gains()
    untied: bool = False


class Draw:
    """Choices from one random generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def of(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def between(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def maybe(self) -> bool:
        return bool(self.rng.integers(2))

    def factors(self, count: int) -> list[float]:
        return np.sort(1.0 + 5.0 * self.rng.random(count)).tolist()

    def width(self, heads: int, least: int = 20) -> int:
        """Of the model, a multiple of the heads; narrower ones turn rounding into visible differences."""
        smallest = -(-least // heads)
        return heads * self.between(smallest, smallest + 6)

    def shape(self, head_dims: bool = True) -> dict[str, Any]:
        """Sizes that Llama-like configurations share."""
        kv = self.between(1, 3)
        heads = kv * self.between(1, 3)
        width = 2 * self.between(3, 8)
        fields = {"vocab_size": self.between(70, 130), "num_hidden_layers": self.between(2, 4),
                  "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": self.between(20, 70),
                  "max_position_embeddings": 64, "rms_norm_eps": self.of(1e-6, 1e-3)}
        if head_dims:
            return fields | {"head_dim": width, "hidden_size": self.width(heads)}
        return fields | {"hidden_size": self.width(heads) // (2 * heads) * 2 * heads + 2 * heads}

    def rope(self, width: int, scaled: bool = True, theta: float | None = None) -> dict[str, Any]:
        """Rotary parameters of any kind, over `width` entries of a head."""
        theta = theta or self.of(500.0, 10000.0, 1000000.0)
        kind = self.of("default", "linear", "yarn", "llama3", "dynamic", "longrope") if scaled else "default"
        extra: dict[str, dict[str, Any]] = {
            "default": {}, "linear": {"factor": 3.0}, "dynamic": {"factor": 2.0},
            "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": self.of(32.0, 8.0),
                     "truncate": self.maybe()},
            "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 16},
            "longrope": {"short_factor": self.factors(width // 2), "long_factor": self.factors(width // 2),
                         "original_max_position_embeddings": 32}}
        return {"rope_type": kind, "rope_theta": theta, **extra[kind]}


def llama(d: Draw) -> Case:
    shape = d.shape(head_dims=d.maybe())
    width = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    return Case(hf.LlamaConfig(**shape, rope_parameters=d.rope(width), tie_word_embeddings=d.maybe(),
                               attention_bias=d.maybe(), mlp_bias=d.maybe()), "LlamaForCausalLM")


def mistral(d: Draw) -> Case:
    shape = d.shape()
    return Case(hf.MistralConfig(**shape, sliding_window=d.of(None, d.between(2, 12)),
                                 rope_parameters=d.rope(shape["head_dim"], scaled=False)), "MistralForCausalLM")


def qwen2(d: Draw) -> Case:
    shape = d.shape(head_dims=False)
    sliding = {"use_sliding_window": True, "sliding_window": d.between(3, 9), "max_window_layers": 1}
    width = shape["hidden_size"] // shape["num_attention_heads"]
    return Case(hf.Qwen2Config(**shape, **d.of({}, sliding), tie_word_embeddings=d.maybe(), rope_parameters=d.of(
        d.rope(width, scaled=False), {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                                      "original_max_position_embeddings": 16})), "Qwen2ForCausalLM")


def qwen3(d: Draw) -> Case:
    shape = d.shape()
    return Case(hf.Qwen3Config(**shape, tie_word_embeddings=d.maybe(), attention_bias=d.maybe(),
                               rope_parameters=d.rope(shape["head_dim"], scaled=False)),
                "Qwen3ForCausalLM", gains=Gains(qk_norm=1.7))


def gemma2(d: Draw) -> Case:
    shape = d.shape()
    return Case(hf.Gemma2Config(**shape, sliding_window=d.between(2, 9), query_pre_attn_scalar=d.between(8, 40),
                                attn_logit_softcapping=d.of(None, 3.0, 10.0),
                                final_logit_softcapping=d.of(None, 8.0, 20.0),
                                rope_parameters=d.rope(shape["head_dim"], scaled=False)),
                "Gemma2ForCausalLM", gains=Gains(norm_offset=True, embed=0.8))


def gemma3(d: Draw) -> Case:
    shape = d.shape() | {"num_hidden_layers": d.between(4, 8)}
    kinds = d.of(3, 6)
    layers = ["full_attention" if (i + 1) % kinds == 0 or i == 3 else "sliding_attention"
              for i in range(shape["num_hidden_layers"])]
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
    return Case(hf.Gemma3TextConfig(
        **shape, layer_types=layers, sliding_window=d.between(2, 9), query_pre_attn_scalar=d.between(8, 40),
        rope_parameters={"full_attention": d.of(linear, d.rope(16, scaled=False)),
                         "sliding_attention": d.rope(16, scaled=False, theta=10000.0)}),
        "Gemma3ForCausalLM", gains=Gains(norm_offset=True, qk_norm=1.5, embed=0.8))


def phi3(d: Draw) -> Case:
    shape = d.shape(head_dims=False)
    heads = shape["num_attention_heads"]
    shape["hidden_size"] = heads * d.of(16, 24)
    part = d.of(0.5, 0.75, 1.0)
    turned = int(shape["hidden_size"] // heads * part)
    rope = d.of({"rope_type": "default"}, {"rope_type": "longrope", "short_factor": d.factors(turned // 2),
                                           "long_factor": d.factors(turned // 2)})
    return Case(hf.Phi3Config(**shape, pad_token_id=2, eos_token_id=2, original_max_position_embeddings=32,
                              sliding_window=d.of(None, d.between(3, 9)), tie_word_embeddings=d.maybe(),
                              rope_parameters=rope | {"rope_theta": 10000.0, "partial_rotary_factor": part}),
                "Phi3ForCausalLM")


def gpt2(d: Draw) -> Case:
    heads = d.between(1, 4)
    return Case(hf.GPT2Config(vocab_size=d.between(70, 130), n_positions=d.between(32, 50), n_layer=d.between(2, 4),
                              n_head=heads, n_embd=d.width(heads), n_inner=d.of(None, 44),
                              bos_token_id=1, eos_token_id=1, layer_norm_epsilon=d.of(1e-5, 1e-3)),
                "GPT2LMHeadModel")


def glm4(d: Draw) -> Case:
    shape = d.shape() | {"head_dim": d.of(8, 12, 16)}
    return Case(hf.Glm4Config(**shape, pad_token_id=3, attention_bias=d.maybe(), tie_word_embeddings=d.maybe(),
                              rope_parameters=d.rope(shape["head_dim"], scaled=False) | {
                                  "partial_rotary_factor": d.of(0.5, 1.0)}), "Glm4ForCausalLM")


def mixtral(d: Draw) -> Case:
    shape = d.shape()
    experts = d.between(3, 7)
    return Case(hf.MixtralConfig(**shape, num_local_experts=experts, num_experts_per_tok=d.between(1, experts - 1),
                                 sliding_window=d.of(None, d.between(3, 9)),
                                 rope_parameters=d.rope(shape["head_dim"], scaled=False)), "MixtralForCausalLM")


def qwen3_moe(d: Draw) -> Case:
    shape = d.shape() | {"num_hidden_layers": 4}
    experts = d.between(3, 7)
    return Case(hf.Qwen3MoeConfig(
        **shape, num_experts=experts, num_experts_per_tok=d.between(1, experts - 1),
        moe_intermediate_size=d.between(8, 24), norm_topk_prob=d.maybe(), mlp_only_layers=d.of([], [1], [0, 3]),
        decoder_sparse_step=d.of(1, 1, 2), tie_word_embeddings=d.maybe(),
        rope_parameters=d.rope(shape["head_dim"], scaled=False)), "Qwen3MoeForCausalLM", gains=Gains(qk_norm=1.7))


def deepseek_v3(d: Draw) -> Case:
    heads, groups = d.between(1, 4), d.of(1, 2, 4)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "mscale": 1.0, "mscale_all_dim": d.of(0.7, 1.0)}
    return Case(hf.DeepseekV3Config(
        vocab_size=d.between(70, 130), hidden_size=d.between(20, 50), intermediate_size=d.between(20, 60),
        moe_intermediate_size=d.between(8, 24), num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=heads, n_shared_experts=d.between(1, 2), n_routed_experts=groups * d.between(2, 4),
        routed_scaling_factor=d.of(1.0, 2.5), kv_lora_rank=d.between(8, 20), q_lora_rank=d.of(None, d.between(8, 24)),
        qk_rope_head_dim=2 * d.between(2, 5), v_head_dim=d.between(6, 16), qk_nope_head_dim=d.between(6, 16),
        n_group=groups, topk_group=max(1, groups // 2), num_experts_per_tok=2, first_k_dense_replace=d.of(0, 1, 2),
        norm_topk_prob=d.maybe(), rms_norm_eps=d.of(1e-6, 1e-3), rope_interleave=True, max_position_embeddings=64,
        num_mtp_layers=0, rope_parameters=d.of(yarn, {"rope_type": "default", "rope_theta": 10000.0})),
        "DeepseekV3ForCausalLM")


def bert(d: Draw) -> Case:
    heads = d.between(1, 4)
    return Case(hf.BertConfig(vocab_size=d.between(70, 130), hidden_size=d.width(heads),
                              num_hidden_layers=d.between(2, 4), num_attention_heads=heads,
                              intermediate_size=d.between(20, 70), max_position_embeddings=d.between(32, 50),
                              type_vocab_size=d.between(2, 3), hidden_act=d.of("gelu", "relu"),
                              layer_norm_eps=d.of(1e-12, 1e-3)),
                "BertForPreTraining", "bert")


def _t5(d: Draw, **changes: Any) -> hf.T5Config:
    return hf.T5Config(vocab_size=d.between(70, 130), d_model=d.between(20, 50), d_kv=d.between(6, 14),
                       d_ff=d.between(20, 70), num_layers=d.between(2, 3), num_decoder_layers=d.between(2, 3),
                       num_heads=d.between(1, 4), relative_attention_num_buckets=d.of(8, 16),
                       relative_attention_max_distance=d.of(16, 24), decoder_start_token_id=0,
                       layer_norm_epsilon=d.of(1e-6, 1e-3), **changes)


def t5(d: Draw) -> Case:
    return Case(_t5(d), "T5ForConditionalGeneration", "t5", Gains(embed=4.0, qk=0.9))


def flan_t5(d: Draw) -> Case:
    return Case(_t5(d, feed_forward_proj="gated-gelu", tie_word_embeddings=False), "T5ForConditionalGeneration", "t5",
                Gains(embed=1.0, qk=0.9), untied=True)


FAMILIES: dict[str, Callable[[Draw], Case]] = {f.__name__: f for f in (
    llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2, glm4, mixtral, qwen3_moe, deepseek_v3, bert, t5, flan_t5)}


def _headed(family: Callable[[Draw], Case], model: str, kind: str, **labels: Any) -> Callable[[Draw], Case]:
    def draw(d: Draw) -> Case:
        case = family(d)
        case.config.pad_token_id = 0
        for name, value in labels.items():
            setattr(case.config, name, value)
        return dataclasses.replace(case, model=model, kind=kind)

    return draw


HEADS: dict[str, Callable[[Draw], Case]] = {
    "llama_sequence": _headed(llama, "LlamaForSequenceClassification", "sequence", num_labels=3),
    "llama_tokens": _headed(llama, "LlamaForTokenClassification", "tokens", num_labels=4),
    "llama_reward": _headed(llama, "LlamaForSequenceClassification", "sequence", num_labels=1),
    "qwen3_sequence": _headed(qwen3, "Qwen3ForSequenceClassification", "sequence", num_labels=3),
    "gemma2_tokens": _headed(gemma2, "Gemma2ForTokenClassification", "tokens", num_labels=3),
    "gpt2_sequence": _headed(gpt2, "GPT2ForSequenceClassification", "sequence", num_labels=3),
    "bert_sequence": _headed(bert, "BertForSequenceClassification", "sequence", num_labels=3),
    "bert_regression": _headed(bert, "BertForSequenceClassification", "sequence", num_labels=2,
                               problem_type="regression"),
    "bert_tokens": _headed(bert, "BertForTokenClassification", "tokens", num_labels=5),
}
