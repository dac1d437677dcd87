"""BERT: an encoder with norms after its blocks, learned positions and token types (arXiv:1810.04805)."""

from __future__ import annotations

import re
from typing import Any

from llm_jax.interop.families import common
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor, matrix, same, vector
from llm_jax.models import ModelConfig

ARCHITECTURES = {"BertModel": "lm", "BertForMaskedLM": "lm", "BertForPreTraining": "lm",
                 "BertForNextSentencePrediction": "lm", "BertForSequenceClassification": "sequence_classification",
                 "BertForTokenClassification": "token_classification"}
MODEL_TYPES = ("bert",)
IGNORED = (r"bert\.embeddings\.(position|token_type)_ids",)
TIED = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias"}
# What each architecture's class has; a checkpoint may hold more (bert-base-uncased calls itself BertForMaskedLM), and
# only a bare model may hold less: those that were trained without a pooler call themselves BertModel too.
_HEADS = {"BertModel": ("pooler",), "BertForMaskedLM": ("masked_lm",),
          "BertForPreTraining": ("masked_lm", "pooler", "next_sentence"),
          "BertForNextSentencePrediction": ("pooler", "next_sentence"), "BertForSequenceClassification": ("pooler",),
          "BertForTokenClassification": ()}
_SIGNS = {"masked_lm": "cls.predictions.bias", "pooler": "bert.pooler.dense.weight",
          "next_sentence": "cls.seq_relationship.weight"}


def canonical(name: str) -> str:
    """Files of the bare model lack the prefix, and early ones call a norm's scale gamma and its bias beta."""
    name = "bert." + name if name.startswith(("embeddings.", "encoder.", "pooler.")) else name
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{'weight' if m[1] == 'gamma' else 'bias'}", name)


def config_from_hf(f: Fields) -> ModelConfig:
    """The model that a `config.json` describes; which heads it has, the checkpoint's tensors say if they are known."""
    f.default(vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
              hidden_act="gelu", max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12,
              tie_word_embeddings=True)
    f.must("position_embedding_type", "absolute")
    f.must("is_decoder", False)
    f.must("add_cross_attention", False)
    f.ignore("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
             "pooler_size_per_head", "pooler_type")
    head = common.read_head(f, ARCHITECTURES)
    d, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if d % heads:
        f.refuse("hidden_size", f"multiples of num_attention_heads={heads}")
    return ModelConfig(
        family="bert", architecture="encoder", vocab_size=f.integer("vocab_size"),
        num_layers=f.integer("num_hidden_layers"), embed_dim=d, num_heads=heads, num_kv_heads=heads,
        head_dim=d // heads, mlp_dim=f.integer("intermediate_size"),
        max_context=f.integer("max_position_embeddings"), positions="learned",
        token_types=f.integer("type_vocab_size"), embed_norm=True, norm="layer", norm_eps=f.number("layer_norm_eps"),
        norm_placement="post", activation=f.choice("hidden_act", common.ACTIVATIONS), gated_mlp=False, mlp_bias=True,
        qkv_bias=True, output_bias=True, tie_embeddings=f.flag("tie_word_embeddings"), head=head,
        encoder_heads=_encoder_heads(f, head is not None))


def _encoder_heads(f: Fields, for_task: bool) -> tuple[str, ...]:
    (named,) = f.raw("architectures")
    if f.tensors is None:
        return _HEADS[named]
    promised = () if named == "BertModel" else _HEADS[named]
    found = tuple(name for name, sign in _SIGNS.items() if name in promised or sign in f.tensors)
    return tuple(name for name in found if name == "pooler") if for_task else found


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model."""
    fields = common.write(config, ARCHITECTURES, "bert")
    fields = {name: value for name, value in fields.items() if name not in ("head_dim", "num_key_value_heads")}
    fields["layer_norm_eps"] = fields.pop("rms_norm_eps")
    if config.head is None:
        held = set(config.encoder_heads)
        # The class with just these heads; failing that, one that has them and more would make up weights.
        fit = [name for name, kind in ARCHITECTURES.items() if kind == "lm" and set(_HEADS[name]) <= held]
        fit.sort(key=lambda name: (len(_HEADS[name]), "masked_lm" in _HEADS[name]))
        fields["architectures"] = fit[-1:] or ["BertModel"]
    return fields | {"type_vocab_size": config.token_types, "position_embedding_type": "absolute"}


def tensors(config: ModelConfig) -> list[Tensor]:
    """The tensors of a checkpoint."""
    v, d, f, heads = config.vocab_size, config.embed_dim, config.mlp_dim, (config.num_heads, config.head_dim)

    def dense(hf: str, inputs: tuple[int, ...], outputs: tuple[int, ...], kernel: tuple[str, ...],
              bias: tuple[str, ...]) -> list[Tensor]:
        return [matrix(hf + ".weight", kernel, inputs, outputs), vector(hf + ".bias", bias, outputs)]

    found = [same("bert.embeddings.word_embeddings.weight", ("embed", "embedding"), (v, d)),
             same("bert.embeddings.position_embeddings.weight", ("embed", "position"), (config.max_context, d)),
             same("bert.embeddings.token_type_embeddings.weight", ("embed", "token_type"), (config.token_types, d)),
             *common.norm(config, "bert.embeddings.LayerNorm", "embed", "norm")]
    for i in range(config.num_layers):
        hf, attention, mlp = f"bert.encoder.layer.{i}.", (f"layers_{i}", "attention"), (f"layers_{i}", "mlp")
        for name, leaf in (("query", "q"), ("key", "k"), ("value", "v")):
            found += dense(f"{hf}attention.self.{name}", (d,), heads, (*attention, leaf), (*attention, leaf + "_bias"))
        found += dense(hf + "attention.output.dense", heads, (d,), (*attention, "o"), (*attention, "o_bias"))
        found += common.norm(config, hf + "attention.output.LayerNorm", f"layers_{i}", "attention_norm")
        found += dense(hf + "intermediate.dense", (d,), (f,), (*mlp, "up"), (*mlp, "up_bias"))
        found += dense(hf + "output.dense", (f,), (d,), (*mlp, "down"), (*mlp, "down_bias"))
        found += common.norm(config, hf + "output.LayerNorm", f"layers_{i}", "mlp_norm")

    def on_top(hf: str, ours: str, outputs: int) -> list[Tensor]:
        return dense(hf, (d,), (outputs,), (ours, "kernel"), (ours, "bias"))

    if "pooler" in config.encoder_heads:
        found += on_top("bert.pooler.dense", "pooler", d)
    if "masked_lm" in config.encoder_heads:
        found += on_top("cls.predictions.transform.dense", "masked_lm", d)
        found += common.norm(config, "cls.predictions.transform.LayerNorm", "masked_lm", "norm")
        found.append(same("cls.predictions.bias", ("output_bias",), (v,)))
        if not config.tie_embeddings:
            found.append(matrix("cls.predictions.decoder.weight", ("unembed",), (d,), (v,)))
    if "next_sentence" in config.encoder_heads:
        found += on_top("cls.seq_relationship", "next_sentence", 2)
    if config.head is not None:
        found += on_top("classifier", "head", config.head.labels)
    return found
