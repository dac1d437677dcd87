"""T5, T5 1.1 and Flan-T5: an encoder and a decoder with relative positions (arXiv:1910.10683, arXiv:2210.11416)."""

from __future__ import annotations

from typing import Any

from llm_jax.interop.families import common
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor, matrix, same
from llm_jax.models import ModelConfig

ARCHITECTURES = {"T5ForConditionalGeneration": "lm", "T5WithLMHeadModel": "lm"}
# Early files carry a bias for positions in cross-attention, which no model used.
IGNORED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
MODEL_TYPES = ("t5",)
TIED = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight"}
_FEED_FORWARD = {"relu": ("relu", False), "gelu": ("gelu", False), "silu": ("silu", False),
                 "gated-relu": ("relu", True), "gated-gelu": ("gelu_tanh", True), "gated-silu": ("silu", True)}


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes.

    T5's outputs are scaled, those of T5 1.1 and Flan are not and have a projection of their own. Files tell the two
    apart by `tie_word_embeddings`, until transformers 5 wrote it as true in either and `scale_decoder_outputs` beside
    it. Where that says that a tied model is not scaled, whether there is a projection is for the tensors to say.
    """
    f.default(vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_decoder_layers=None, num_heads=8,
              relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
              feed_forward_proj="relu", tie_word_embeddings=True, n_positions=512)
    f.must("is_encoder_decoder", True)
    f.must("is_decoder", False)
    f.ignore("dropout_rate")
    common.read_head(f, ARCHITECTURES)
    activation, gated = _FEED_FORWARD[f.choice("feed_forward_proj", {name: name for name in _FEED_FORWARD})]
    f.must("dense_act_fn", *(name for name, ours in common.ACTIVATIONS.items() if ours == activation))
    f.must("is_gated_act", gated)
    tied = f.flag("tie_word_embeddings")
    scaled = f.flag("scale_decoder_outputs") if f.given("scale_decoder_outputs") else tied
    if f.tensors is not None and tied and not scaled:
        tied = "lm_head.weight" not in f.tensors
    d, encoder_layers = f.integer("d_model"), f.integer("num_layers")
    decoder_layers = f.maybe_integer("num_decoder_layers")
    return ModelConfig(
        family="t5", architecture="encoder_decoder", vocab_size=f.integer("vocab_size"),
        num_layers=encoder_layers if decoder_layers is None else decoder_layers, encoder_layers=encoder_layers,
        embed_dim=d, num_heads=f.integer("num_heads"), num_kv_heads=f.integer("num_heads"), head_dim=f.integer("d_kv"),
        mlp_dim=f.integer("d_ff"), max_context=f.integer("n_positions"), positions="relative",
        relative_buckets=f.integer("relative_attention_num_buckets"),
        relative_max_distance=f.integer("relative_attention_max_distance"), attention_scale=1.0,
        norm_eps=f.number("layer_norm_epsilon"), activation=activation, gated_mlp=gated, tie_embeddings=tied,
        logit_scale=d**-0.5 if scaled else None)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    gate = "gated-" if config.gated_mlp else ""
    # In transformers gated-gelu is the tanh approximation and gelu alone is exact.
    activation = "gelu" if config.activation.startswith("gelu") else config.activation
    return {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
            "vocab_size": config.vocab_size, "d_model": config.embed_dim, "d_kv": config.head_dim,
            "d_ff": config.mlp_dim, "num_layers": config.encoder_layers, "num_decoder_layers": config.num_layers,
            "num_heads": config.num_heads, "relative_attention_num_buckets": config.relative_buckets,
            "relative_attention_max_distance": config.relative_max_distance, "layer_norm_epsilon": config.norm_eps,
            "feed_forward_proj": gate + activation, "n_positions": config.max_context,
            "tie_word_embeddings": config.tie_embeddings, "scale_decoder_outputs": config.logit_scale is not None,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    v, d = config.vocab_size, config.embed_dim
    found = [same("shared.weight", ("embed", "embedding"), (v, d)),
             *_stack(config, "encoder", ("encoder",), config.encoder_layers, ("attention", "mlp")),
             *_stack(config, "decoder", (), config.num_layers, ("attention", "cross_attention", "mlp"))]
    return found if config.tie_embeddings else [*found, matrix("lm_head.weight", ("unembed",), (d,), (v,))]


def _stack(config: ModelConfig, hf: str, ours: tuple[str, ...], num_layers: int,
           parts: tuple[str, ...]) -> list[Tensor]:
    """The blocks of one side, what they share and the norm after them."""
    bias = f"{hf}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shape = (config.relative_buckets, config.num_heads)
    found = [same(bias, (*ours, "relative_positions", "bias"), shape),
             *common.norm(config, f"{hf}.final_layer_norm", *ours, "final_norm")]
    for i in range(num_layers):
        for place, part in enumerate(parts):
            name, path = f"{hf}.block.{i}.layer.{place}.", (*ours, f"layers_{i}")
            found += common.norm(config, name + "layer_norm", *path, f"{part}_norm")
            found += (_mlp if part == "mlp" else _attention)(config, name, (*path, part))
    return found


def _attention(config: ModelConfig, hf: str, path: tuple[str, ...]) -> list[Tensor]:
    d, heads = (config.embed_dim,), (config.num_heads, config.head_dim)
    hf += "EncDecAttention." if path[-1] == "cross_attention" else "SelfAttention."
    found = [matrix(f"{hf}{name}.weight", (*path, name), d, heads) for name in "qkv"]
    return [*found, matrix(hf + "o.weight", (*path, "o"), heads, d)]


def _mlp(config: ModelConfig, hf: str, path: tuple[str, ...]) -> list[Tensor]:
    d, f = (config.embed_dim,), (config.mlp_dim,)
    inner = {"wi_0": "gate", "wi_1": "up"} if config.gated_mlp else {"wi": "up"}
    found = [matrix(f"{hf}DenseReluDense.{name}.weight", (*path, leaf), d, f) for name, leaf in inner.items()]
    return [*found, matrix(hf + "DenseReluDense.wo.weight", (*path, "down"), f, d)]
