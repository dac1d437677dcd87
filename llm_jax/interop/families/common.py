"""What the families of decoders share: keys of their `config.json`, and names of their tensors.

Most families name things as Llama does; a family's own file holds what it does differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.errors import UserError
from llm_jax.interop.fields import Fields
from llm_jax.interop.mapping import Tensor, matrix, same, vector
from llm_jax.models import ModelConfig
from llm_jax.models.facts import Experts, Head
from llm_jax.models.layout import layer_kinds

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
IGNORED = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def architectures(prefix: str) -> dict[str, str]:
    """The architectures that most families have, and what stands on their last hidden state."""
    return {f"{prefix}ForCausalLM": "lm", f"{prefix}ForSequenceClassification": "sequence_classification",
            f"{prefix}ForTokenClassification": "token_classification"}


# Reading and writing config.json

def read_head(f: Fields, known: Mapping[str, str]) -> Head | None:
    """The head of the file's architecture, which is one of `known`; None for language models."""
    named = f.strings("architectures")
    if not named or len(named) != 1 or named[0] not in known:
        f.refuse("architectures", ", ".join(known))
    kind = known[named[0]]
    if kind == "lm":
        return None
    f.default(num_labels=2, id2label=None, problem_type=None)
    f.must("problem_type", "regression", "single_label_classification")
    problem, names = f.raw("problem_type"), f.raw("id2label")
    labels = len(names) if isinstance(names, dict) and names else f.integer("num_labels")
    if kind == "token_classification":
        f.must("problem_type", "single_label_classification")
        f.must("token_classification_bias", True)
        return Head("value" if labels == 1 else kind, labels)
    if problem == "regression":
        return Head("regression", labels)
    return Head("reward") if labels == 1 else Head(kind, labels)


def write_head(config: ModelConfig, known: Mapping[str, str]) -> dict[str, Any]:
    """The keys that say which architecture and which head."""
    head = config.head
    if head is None:
        return {"architectures": [next(name for name, kind in known.items() if kind == "lm")]}
    kind = "sequence_classification" if head.per_sequence else "token_classification"
    named = [name for name, its_kind in known.items() if its_kind == kind]
    if not named:
        raise UserError(f"transformers has no {kind} for the family {config.family!r}; it has {', '.join(known)}")
    labels = [f"LABEL_{i}" for i in range(head.labels)]
    fields: dict[str, Any] = {"architectures": named[:1], "id2label": {str(i): name for i, name in enumerate(labels)},
                              "label2id": {name: i for i, name in enumerate(labels)}}
    if head.kind == "regression":
        fields["problem_type"] = "regression"
    return fields


def read(f: Fields, known: Mapping[str, str], *, activation: str = "hidden_act") -> dict[str, Any]:
    """The arguments of `ModelConfig` which all families read from the same keys.

    Args:
      f: its defaults are set.
      known: the family's ARCHITECTURES.
      activation: the key of the activation's name.
    """
    f.default(head_dim=None, tie_word_embeddings=True)
    d, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    head_dim = f.maybe_integer("head_dim")
    if head_dim is None:
        if d % heads:
            f.refuse("hidden_size", f"multiples of num_attention_heads={heads}, or a head_dim")
        head_dim = d // heads
    kv_heads = f.maybe_integer("num_key_value_heads")
    return {"vocab_size": f.integer("vocab_size"), "num_layers": f.integer("num_hidden_layers"), "embed_dim": d,
            "num_heads": heads, "num_kv_heads": heads if kv_heads is None else kv_heads, "head_dim": head_dim,
            "mlp_dim": f.integer("intermediate_size"), "max_context": f.integer("max_position_embeddings"),
            "norm_eps": f.number("rms_norm_eps"), "activation": f.choice(activation, ACTIVATIONS),
            "tie_embeddings": f.flag("tie_word_embeddings"), "head": read_head(f, known)}


def write(config: ModelConfig, known: Mapping[str, str], model_type: str, *,
          activation: str = "hidden_act") -> dict[str, Any]:
    """The inverse of `read`."""
    return write_head(config, known) | {
        "model_type": model_type, "vocab_size": config.vocab_size, "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, activation: _ACTIVATION_NAMES[config.activation],
        "max_position_embeddings": config.max_context, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings}


def shortest_cycle(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern that, cycled, gives `kinds`."""
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return tuple(kinds[:period])
    raise ValueError("a model has at least one layer")


def read_layer_types(f: Fields, num_layers: int, absent: Callable[[int], bool]) -> dict[str, Any]:
    """The arguments attention_pattern and sliding_window, from `layer_types`.

    Args:
      f: of the file; "sliding_window" has a default.
      num_layers: how many entries there must be.
      absent: whether a layer is local where the file has no `layer_types`.
    """
    f.default(layer_types=None)
    types, window = f.strings("layer_types"), f.maybe_integer("sliding_window")
    if types is None:
        kinds = ["local" if absent(i) else "global" for i in range(num_layers)]
    else:
        names = {"full_attention": "global", "sliding_attention": "local"}
        if len(types) != num_layers or not set(types) <= set(names):
            f.refuse("layer_types", f"'full_attention' or 'sliding_attention' for each of {num_layers} layers")
        kinds = [names[name] for name in types]
    if "local" not in kinds:
        return {"attention_pattern": ("global",), "sliding_window": None}
    if window is None:
        f.refuse("sliding_window", "a number of tokens, as there are layers with sliding attention")
    return {"attention_pattern": shortest_cycle(kinds), "sliding_window": window}


def read_window(f: Fields) -> dict[str, Any]:
    """The same arguments of a model whose layers all have the window, if there is one."""
    window = f.maybe_integer("sliding_window")
    return {"attention_pattern": ("global",) if window is None else ("local",), "sliding_window": window}


def write_layer_types(config: ModelConfig) -> dict[str, Any]:
    names = {"global": "full_attention", "local": "sliding_attention"}
    return {"layer_types": [names[kind.attention] for kind in layer_kinds(config)],
            "sliding_window": config.sliding_window}


def read_qwen_layers(f: Fields, num_layers: int) -> dict[str, Any]:
    """The same arguments of Qwen2 and Qwen3: the window, if it is switched on, is on the last layers."""
    f.default(use_sliding_window=False, sliding_window=4096, max_window_layers=28)
    on, first = f.flag("use_sliding_window"), f.integer("max_window_layers", least=0)
    if not on:
        f.default(layer_types=None)
        if "sliding_attention" in (f.strings("layer_types") or ()):
            f.refuse("use_sliding_window", "true where layer_types has sliding attention")
        f.ignore("sliding_window")
        return {"attention_pattern": ("global",), "sliding_window": None}
    windowed = f.maybe_integer("sliding_window") is not None
    return read_layer_types(f, num_layers, lambda i: windowed and i >= first)


def write_qwen_layers(config: ModelConfig) -> dict[str, Any]:
    on = "local" in config.attention_pattern
    return write_layer_types(config) | {"use_sliding_window": on, "max_window_layers": config.num_layers}


def read_count(f: Fields, name: str, alias: str) -> int:
    """The number of experts, which `transformers` also writes under the name it has in other families."""
    if f.given(alias):
        f.must(name, f.raw(alias))
        return f.integer(alias)
    return f.integer(name)


def need_experts(config: ModelConfig) -> Experts:
    """The config's experts; UserError where it has none."""
    if config.experts is None:
        raise UserError(f"a model of the family {config.family!r} has experts; ModelConfig.experts is None")
    return config.experts


# Names of tensors

def norm(config: ModelConfig, name: str, *path: str, width: int | None = None) -> list[Tensor]:
    """A norm's scale, and its bias where it has one."""
    shape = (config.embed_dim if width is None else width,)
    found = [same(name + ".weight", (*path, "scale"), shape)]
    return found + [same(name + ".bias", (*path, "bias"), shape)] if config.norm == "layer" else found


def ends(config: ModelConfig, prefix: str = "model.", *, embedding: str = "embed_tokens", final_norm: str = "norm",
         token_head: str = "score") -> list[Tensor]:
    """What stands before and after the layers: embedding, last norm, output projection or head."""
    v, d = config.vocab_size, config.embed_dim
    found = [same(f"{prefix}{embedding}.weight", ("embed", "embedding"), (v, d)),
             *norm(config, prefix + final_norm, "final_norm")]
    if config.head is not None:
        name = "score" if config.head.per_sequence else token_head
        found.append(matrix(f"{name}.weight", ("head", "kernel"), (d,), (config.head.labels,)))
        if not config.head.per_sequence:  # the others have no bias in transformers' decoders
            found.append(vector(f"{name}.bias", ("head", "bias"), (config.head.labels,)))
    elif not config.tie_embeddings:
        found.append(matrix("lm_head.weight", ("unembed",), (d,), (v,)))
    return found


def attention(config: ModelConfig, hf: str, ours: str) -> list[Tensor]:
    """q_proj, k_proj, v_proj and o_proj under `hf`, with the biases and head norms of the config."""
    d, path = (config.embed_dim,), (ours, "attention")
    q, kv = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
    found = [matrix(hf + "q_proj.weight", (*path, "q"), d, q), matrix(hf + "k_proj.weight", (*path, "k"), d, kv),
             matrix(hf + "v_proj.weight", (*path, "v"), d, kv), matrix(hf + "o_proj.weight", (*path, "o"), q, d)]
    if config.qkv_bias:
        found += [vector(hf + f"{name}_proj.bias", (*path, f"{name}_bias"), shape)
                  for name, shape in (("q", q), ("k", kv), ("v", kv))]
    if config.output_bias:
        found.append(vector(hf + "o_proj.bias", (*path, "o_bias"), d))
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            found += norm(config, hf + name, *path, name, width=config.head_dim)
    return found


def gated_mlp(config: ModelConfig, hf: str, *path: str, width: int | None = None) -> list[Tensor]:
    """gate_proj, up_proj and down_proj under `hf`, with biases if the config has them."""
    d, f = (config.embed_dim,), (config.mlp_dim if width is None else width,)
    sides = (("gate", d, f), ("up", d, f), ("down", f, d))
    found = [matrix(f"{hf}{name}_proj.weight", (*path, name), inputs, outputs) for name, inputs, outputs in sides]
    if config.mlp_bias:
        found += [vector(f"{hf}{name}_proj.bias", (*path, f"{name}_bias"), outputs) for name, _, outputs in sides]
    return found


def mlp(config: ModelConfig, hf: str, ours: str) -> list[Tensor]:
    """A dense layer's feed-forward part, named as Llama's."""
    return gated_mlp(config, hf + "mlp.", ours, "mlp")


def experts(config: ModelConfig, hf: str, ours: str, names: Mapping[str, str]) -> list[Tensor]:
    """The router and the experts, one by one, under `hf`; `names` are those of gate, up and down."""
    assert config.experts is not None
    d, f, path = (config.embed_dim,), (config.experts.mlp_dim,), (ours, "experts")
    found = [matrix(hf + "gate.weight", (*path, "router"), d, (config.experts.count,))]
    for e in range(config.experts.count):
        for leaf, inputs, outputs in (("gate", d, f), ("up", d, f), ("down", f, d)):
            found.append(matrix(f"{hf}experts.{e}.{names[leaf]}.weight", (*path, leaf), inputs, outputs, (e,)))
    return found


def tensors(config: ModelConfig, *, norms: Mapping[str, str] = PRE_NORMS,
            attention: Callable[[ModelConfig, str, str], list[Tensor]] = attention,
            dense: Callable[[ModelConfig, str, str], list[Tensor]] = mlp,
            sparse: Callable[[ModelConfig, str, str], list[Tensor]] | None = None) -> list[Tensor]:
    """A decoder named as Llama is, but for what is given.

    Args:
      config: of the model.
      norms: the layers' norms, their names → ours.
      attention: (config, name before "q_proj", our layer) → the attention's tensors.
      dense: (config, name before "mlp", our layer) → the feed-forward layer's tensors.
      sparse: the same where there are experts.
    """
    found = ends(config)
    for i, kind in enumerate(layer_kinds(config)):
        hf, ours = f"model.layers.{i}.", f"layers_{i}"
        for name, our_name in norms.items():
            found += norm(config, hf + name, ours, our_name)
        found += attention(config, hf + "self_attn.", ours)
        if kind.mlp == "dense":
            found += dense(config, hf, ours)
        else:
            assert sparse is not None
            found += sparse(config, hf, ours)
    return found
