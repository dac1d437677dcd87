"""GPT-2: learned positions, LayerNorm, biases everywhere (Radford et al. 2019)."""

from __future__ import annotations

from typing import Any

from llm_jax.interop.families import common
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor, conv1d, fused, same, vector
from llm_jax.models import ModelConfig

ARCHITECTURES = {"GPT2LMHeadModel": "lm", "GPT2ForSequenceClassification": "sequence_classification",
                 "GPT2ForTokenClassification": "token_classification"}
MODEL_TYPES = ("gpt2",)
IGNORED = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)  # the causal mask, as a buffer
TIED = {"lm_head.weight": "transformer.wte.weight"}
_PREFIX = "transformer."
_KEYS = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
         "max_position_embeddings": "n_positions", "rms_norm_eps": "layer_norm_epsilon",
         "hidden_act": "activation_function", "intermediate_size": "n_inner"}


def canonical(name: str) -> str:
    """Files of the bare model lack the prefix."""
    return _PREFIX + name if name.startswith(("wte.", "wpe.", "h.", "ln_f.")) else name


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes."""
    f.default(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, n_inner=None,
              activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
              tie_word_embeddings=True)
    f.must("scale_attn_by_inverse_layer_idx", False)
    f.must("add_cross_attention", False)
    f.ignore("reorder_and_upcast_attn", "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
             "summary_proj_to_labels", "summary_first_dropout")
    d, heads, inner = f.integer("n_embd"), f.integer("n_head"), f.maybe_integer("n_inner")
    if d % heads:
        f.refuse("n_embd", f"multiples of n_head={heads}")
    return ModelConfig(
        family="gpt2", vocab_size=f.integer("vocab_size"), num_layers=f.integer("n_layer"), embed_dim=d,
        num_heads=heads, num_kv_heads=heads, head_dim=d // heads, mlp_dim=4 * d if inner is None else inner,
        max_context=f.integer("n_positions"), positions="learned", norm="layer",
        norm_eps=f.number("layer_norm_epsilon"), activation=f.choice("activation_function", common.ACTIVATIONS),
        gated_mlp=False, mlp_bias=True, qkv_bias=True, output_bias=True,
        attention_scale=None if f.flag("scale_attn_weights") else 1.0, tie_embeddings=f.flag("tie_word_embeddings"),
        head=common.read_head(f, ARCHITECTURES))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    fields = common.write(config, ARCHITECTURES, "gpt2")
    fields = {_KEYS.get(name, name): value for name, value in fields.items()
              if name not in ("head_dim", "num_key_value_heads")}
    if config.activation == "gelu_tanh":
        fields["activation_function"] = "gelu_new"  # what GPT-2's own files call it
    return fields | {"scale_attn_weights": config.attention_scale is None}


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    found = common.ends(config, _PREFIX, embedding="wte", final_norm="ln_f", token_head="classifier")
    found.append(same(_PREFIX + "wpe.weight", ("embed", "position"), (config.max_context, config.embed_dim)))
    d, f, heads = (config.embed_dim,), (config.mlp_dim,), (config.num_heads, config.head_dim)
    for i in range(config.num_layers):
        hf, ours = f"{_PREFIX}h.{i}.", f"layers_{i}"
        attention, mlp = (ours, "attention"), (ours, "mlp")
        found += [
            *common.norm(config, hf + "ln_1", ours, "attention_norm"),
            *common.norm(config, hf + "ln_2", ours, "mlp_norm"),
            fused(hf + "attn.c_attn.weight", *(conv1d("", (*attention, n), d, heads) for n in "qkv"), axis=1),
            fused(hf + "attn.c_attn.bias", *(vector("", (*attention, n + "_bias"), heads) for n in "qkv")),
            conv1d(hf + "attn.c_proj.weight", (*attention, "o"), heads, d),
            vector(hf + "attn.c_proj.bias", (*attention, "o_bias"), d),
            conv1d(hf + "mlp.c_fc.weight", (*mlp, "up"), d, f), vector(hf + "mlp.c_fc.bias", (*mlp, "up_bias"), f),
            conv1d(hf + "mlp.c_proj.weight", (*mlp, "down"), f, d),
            vector(hf + "mlp.c_proj.bias", (*mlp, "down_bias"), d)]
    return found
