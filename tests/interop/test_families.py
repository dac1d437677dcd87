"""Each family's names and shapes are those of a checkpoint and of the model; what is not supported is refused by name.

That the numbers agree is shown in test_golden.py.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.interop import families
from llm_jax.interop.safetensors import Folder
from llm_jax.models import Experts, Head, ModelConfig, RopeScaling
from tests.interop.golden import FAMILIES, FOLDERS, GOLDEN
from tests.interop.test_published import PUBLISHED


def values_of(folder: str, file: str = "config.json") -> dict:
    return json.loads((GOLDEN / folder / file).read_text())


def config_of(folder: str, file: str = "config.json") -> ModelConfig:
    tensors = Folder(GOLDEN / folder).tensors
    return families.config_from_hf(values_of(folder, file), tensors=tensors)


def abstract_layers(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path → shape of every leaf of the per-layer parameters, as the model makes them."""
    model = models.build(config)
    shapes = jax.eval_shape(lambda p: models.unstack(p, config), models.abstract_params(model))
    return {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


def check_cover(config: ModelConfig) -> None:
    """The parts of a family's tensors are every number of every leaf, once."""
    leaves = abstract_layers(config)
    times = {path: np.zeros(shape, np.int8) for path, shape in leaves.items()}
    tensors = families.by_name(config.family).tensors(config)
    assert len({t.name for t in tensors}) == len(tensors)
    for part in (part for t in tensors for part in t.parts):
        assert part.shape == leaves[part.path][len(part.index):], part
        times[part.path][part.index] += 1
    for path, count in times.items():
        assert (count == 1).all(), path


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_and_shapes_are_the_checkpoints(folder):
    config = config_of(folder)
    family = families.by_name(config.family)
    stored = {families.canonical(family, name): info.shape for name, info in Folder(GOLDEN / folder).tensors.items()}
    ours = {t.name: t.shape for t in family.tensors(config)}
    surplus = {name for name in stored if name not in ours and name not in family.TIED
               and not families.is_ignored(family, config, name)}
    assert not surplus
    assert ours == {name: stored.get(name) for name in ours}


@pytest.mark.parametrize("folder", FOLDERS)
def test_parts_cover_the_parameters_once(folder):
    check_cover(config_of(folder))


@pytest.mark.parametrize("folder", FOLDERS)
def test_both_spellings_of_a_config(folder):
    for path in sorted((GOLDEN / folder).glob("config_v*.json")):
        config, expected = config_of(folder, path.name), config_of(folder)
        if folder == "deepseek_v3":  # whose coefficient of the balancing loss the newer spelling has lost
            assert config.experts.balance_weight == 0.001
            expected = dataclasses.replace(
                expected, experts=dataclasses.replace(expected.experts, balance_weight=0.001))
        assert config == expected


@pytest.mark.parametrize("path", sorted(str(p.relative_to(GOLDEN)) for p in GOLDEN.glob("*/*.json")
                                        if p.name != "generation_config.json"))
def test_a_written_config_is_read_back(path):
    config = config_of(*path.split("/"))
    written = json.loads(json.dumps(families.config_to_hf(config)))
    tensors = [t.name for t in families.by_name(config.family).tensors(config)]
    assert families.config_from_hf(written, tensors=tensors) == config


@pytest.mark.parametrize(("family", "change"), [
    ("llama", {"rope_scaling": RopeScaling("yarn", 4.0)}), ("llama", {"sliding_window": 5}),
    ("llama", {"attention_scale": 0.25, "head_dim": 16}), ("phi3", {"rotary_dim": 8, "head_dim": 8}),
    ("gemma2", {"attention_pattern": ("local", "global", "local", "global")}), ("gpt2", {"rope_theta": 7.0}),
    ("gemma3", {"attention_pattern": ("global",), "sliding_window": None, "local_rope_theta": None}),
    ("gemma3", {"rope_scaling": None, "local_rope_theta": None}),
])
def test_the_same_said_otherwise(family, change):
    """Values that mean the same, or nothing at all in this model, are no obstacle to writing it."""
    config = dataclasses.replace(config_of(FAMILIES[family]), **change)
    families.config_to_hf(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [
    Head("sequence_classification", 3), Head("regression", 1), Head("regression", 4), Head("reward"),
    Head("token_classification", 5), Head("value")], ids=lambda h: f"{h.kind}-{h.labels}")
def test_heads(family, head):
    config = dataclasses.replace(config_of(FAMILIES[family]), head=head)
    if family == "gemma3" and not head.per_sequence:
        with pytest.raises(UserError, match="transformers has no token_classification for the family 'gemma3'"):
            families.config_to_hf(config)
        return
    assert families.config_from_hf(families.config_to_hf(config)) == config
    check_cover(config)


VARIANTS = {
    "llama": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "tie_embeddings": True, "head_dim": 6},
    "mistral": {"attention_pattern": ("global",), "sliding_window": None, "head_dim": 6, "tie_embeddings": True},
    "qwen2": {"rope_scaling": RopeScaling("yarn", 4.0, 16)},
    "qwen3": {"qkv_bias": True, "output_bias": True, "rope_scaling": RopeScaling("dynamic", 2.0)},
    "gemma2": {"qkv_bias": True, "output_bias": True, "attention_pattern": ("global",), "sliding_window": None,
               "attention_soft_cap": None, "attention_scale": 0.125},
    "gemma3": {"attention_pattern": ("local",), "sliding_window": 3, "rope_scaling": RopeScaling("linear", 8.0),
               "local_rope_theta": 77.0},
    "phi3": {"tie_embeddings": True, "attention_pattern": ("local",), "sliding_window": 3, "rotary_dim": 2},
    "gpt2": {"tie_embeddings": False, "attention_scale": 1.0, "activation": "relu", "mlp_dim": 40},
    "glm4": {"qkv_bias": False, "rotary_dim": None, "rope_scaling": RopeScaling("linear", 2.0)},
    "mixtral": {"attention_pattern": ("local",), "sliding_window": 4, "tie_embeddings": True},
    "qwen3_moe": {"qkv_bias": True, "output_bias": True, "attention_pattern": ("local",), "sliding_window": 4},
    "deepseek_v3": {"attention_scale": None, "rope_scaling": None, "rope_interleaved": False, "norm_eps": 1e-5},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_settings(family):
    """What the golden models leave at its default is written and read, and has names, too."""
    config = dataclasses.replace(config_of(FAMILIES[family]), **VARIANTS[family])
    assert families.config_from_hf(families.config_to_hf(config)) == config
    check_cover(config)


def test_settings_of_layers():
    """Layer by layer where the file lists them, and by the family's rule where it does not."""
    def read(folder, **change):
        return families.config_from_hf({**values_of(folder, "config_v4.json"), **change})

    qwen = read("qwen2", num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert qwen.attention_pattern == ("global", "global", "local", "local") and qwen.sliding_window == 8
    qwen = read("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=99)
    assert qwen.attention_pattern == ("global",) and qwen.sliding_window is None
    gemma = read("gemma2", num_hidden_layers=5)
    assert gemma.attention_pattern == ("local", "global")
    gemma = read("gemma3", num_hidden_layers=13, sliding_window_pattern=6)
    assert gemma.attention_pattern == ("local",) * 5 + ("global",)
    gemma = read("gemma3", num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"])
    assert gemma.attention_pattern == ("global", "local")
    moe = read("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert moe.mlp_pattern == ("dense", "experts", "dense", "dense")
    moe = read("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[])
    assert moe.mlp_pattern == ("dense", "experts")
    deepseek = read("deepseek_v3", num_hidden_layers=5, first_k_dense_replace=2)
    assert deepseek.mlp_pattern == ("dense", "dense", "experts", "experts", "experts")


def test_deepseeks_scores_are_scaled_with_the_context():
    config = families.config_from_hf(PUBLISHED["DeepSeek-V3"][1])
    stretch = 0.1 * np.log(40) + 1
    assert config.attention_scale == pytest.approx(192**-0.5 * stretch**2)
    assert config.mlp_pattern == ("dense",) * 3 + ("experts",) * 58


@pytest.mark.parametrize(("family", "published"), [
    ("llama", "Llama-2-7b"), ("mistral", "Mistral-7B-v0.1"), ("gemma2", "gemma-2-2b"), ("phi3", "Phi-3-mini-4k"),
    ("gpt2", "gpt2"), ("glm4", "GLM-4-9B-0414"), ("mixtral", "Mixtral-8x7B"), ("deepseek_v3", "DeepSeek-V3")])
def test_keys_that_are_absent(family, published):
    """The defaults are those of `transformers`' configuration classes, which have these models' shapes."""
    architecture = next(iter(families.by_name(family).ARCHITECTURES))
    assert families.config_from_hf({"architectures": [architecture]}).num_params() == PUBLISHED[published][0]


@pytest.mark.parametrize(("family", "change", "words"), [
    *((family, {"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} is not supported")
      for family in FAMILIES),
    *((family, {"attention_multiplier": 2.0}, "attention_multiplier=2.0 is not supported") for family in FAMILIES),
    *((family, {"model_type": "mamba"}, "model_type='mamba' is not supported; supported: ") for family in FAMILIES),
    *((family, {"output_multiplier_scale": 0.5}, "output_multiplier_scale=0.5 is not supported")
      for family in FAMILIES),
    *((family, {"vocab_size": 0}, "vocab_size=0 is not supported; supported: whole numbers from 1")
      for family in FAMILIES),
    *((family, {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not supported; supported: 'silu'")
      for family in FAMILIES if family not in ("gpt2", "gemma2", "gemma3")),
    *((family, {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}, "rope_parameters": None},
       "rope_type='proportional' is not supported; supported: 'default', 'linear'")
      for family in FAMILIES if family != "gpt2"),
    *((family, {"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25 is not supported")
      for family in FAMILIES if family not in ("gpt2", "phi3", "glm4")),
    *((family, {"architectures": [architecture], "problem_type": "multi_label_classification"},
       "problem_type='multi_label_classification' is not supported")
      for family, architecture in (("llama", "LlamaForSequenceClassification"),
                                   ("gpt2", "GPT2ForTokenClassification"))),
    ("llama", {"rope_interleaved": True}, "rope_interleaved=True is not supported; supported: False"),
    ("llama", {"num_key_value_heads": 3}, "num_heads=.* is not a multiple of num_kv_heads=3"),
    ("llama", {"hidden_size": 33, "head_dim": None}, "hidden_size=33 is not supported; supported: multiples of"),
    ("llama", {"sliding_window": 8}, "sliding_window=8"),
    ("llama", {"token_classification_bias": False, "architectures": ["LlamaForTokenClassification"]},
     "token_classification_bias=False is not supported; supported: True"),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types="),
    ("mistral", {"sliding_window": 0}, "sliding_window=0"),
    ("mistral", {"attention_bias": True}, "attention_bias=True"),
    ("qwen2", {"use_mrope": True}, "use_mrope=True is not supported; supported: False"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2, "num_hidden_layers": 2, "use_sliding_window": True},
     "layer_types=.* for each of 2 layers"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2, "num_hidden_layers": 2}, "use_sliding_window=False"),
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 9}}, "dual_chunk_attention_config="),
    ("gemma2", {"hidden_activation": "relu6"}, "hidden_activation='relu6' is not supported"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma2", {"sliding_window": None}, "sliding_window=None is not supported; supported: a number of tokens"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
    ("gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta=10000.0"),
    ("phi3", {"attention_bias": True}, "attention_bias=True is not supported; supported: False"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias=True"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "rope_type='linear'"),
    ("phi3", {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]},
              "rope_parameters": None}, "RopeScaling has 1 factors for"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    ("gpt2", {"activation_function": "mish"}, "activation_function='mish'"),
    ("glm4", {"partial_rotary_factor": 1.5, "rope_parameters": None}, "partial_rotary_factor=1.5"),
    ("mixtral", {"num_experts_per_tok": 99}, "Experts.per_token=99 is more than"),
    ("mixtral", {"num_experts": 7}, "num_local_experts=.* is not supported; supported: 7"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3], "num_hidden_layers": 4}, "leave no layer with experts"),
    ("qwen3_moe", {"mlp_only_layers": [99]}, r"mlp_only_layers=\[99\]"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported; supported: 'sigmoid'"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias=True"),
    ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads=1"),
    ("deepseek_v3", {"first_k_dense_replace": 99}, "first_k_dense_replace=99"),
    ("deepseek_v3", {"topk_group": 99}, "Experts.groups_kept=99"),
])
def test_refused(family, change, words):
    values = {**values_of(FAMILIES[family]), **change}
    with pytest.raises(UserError, match=words) as raised:
        families.config_from_hf(values, "some/config.json")
    assert str(raised.value).startswith("some/config.json: ")


@pytest.mark.parametrize("architectures", [["FalconForCausalLM"], [], None, [{}], "LlamaForCausalLM", ["LlamaModel"],
                                           ["LlamaForCausalLM", "LlamaForTokenClassification"]])
def test_unknown_architectures(architectures):
    with pytest.raises(UserError, match=r"architectures=.* it knows .*GPT2LMHeadModel.*LlamaForCausalLM"):
        families.config_from_hf({"architectures": architectures, "model_type": "llama"})


def test_unknown_families():
    with pytest.raises(UserError, match="no family 'falcon'; the families are .*deepseek_v3.*, llama, "):
        families.by_name("falcon")


@pytest.mark.parametrize(("family", "change", "words"), [
    ("llama", {"qk_norm": True}, "LlamaForCausalLM cannot be told: qk_norm=True"),
    ("llama", {"qkv_bias": True}, "cannot be told: output_bias=False"),
    ("llama", {"logit_soft_cap": 30.0, "embed_scale": 8.0}, "cannot be told: embed_scale=8.0, logit_soft_cap=30.0"),
    ("gpt2", {"norm": "rms"}, "cannot be told: norm='rms'"),
    ("gemma2", {"attention_scale": 0.3}, "cannot be told: attention_scale=0.3"),
    ("mixtral", {"experts": None, "mlp_pattern": ("dense",)}, "ModelConfig.experts is None"),
    ("mixtral", {"experts": Experts(4, 2, 5)}, "cannot be told: experts="),
    ("deepseek_v3", {"attention_scale": 1.0}, "cannot be told: attention_scale=1.0"),
    ("gemma3", {"rope_scaling": RopeScaling("linear", 2.0), "local_rope_theta": None}, "cannot.*local_rope_theta=None"),
])
def test_what_a_family_cannot_say_is_not_written(family, change, words):
    with pytest.raises(UserError, match=words):
        families.config_to_hf(dataclasses.replace(config_of(FAMILIES[family]), **change))
