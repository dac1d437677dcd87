"""Reading config.json: typed, with the file's own words in refusals, and nothing left unread."""

from __future__ import annotations

import json

import pytest

from llm_jax.errors import UserError
from llm_jax.interop import rope_fields
from llm_jax.interop.fields import Fields
from llm_jax.models import ModelConfig
from llm_jax.models.facts import RopeScaling


def test_values_and_defaults():
    f = Fields({"a": 3, "b": 2.5, "c": True, "d": None, "e": "new", "f": ["x"]})
    f.default(a=9, g=4)
    f.default(g=5, h=6)
    assert (f.integer("a"), f.integer("g"), f.integer("h")) == (3, 4, 6)
    assert f.number("a") == 3.0 and f.number("b") == 2.5 and f.flag("c") is True
    assert f.maybe_integer("d") is None and f.maybe_number("b") == 2.5
    assert f.choice("e", {"new": "ours"}) == "ours" and f.strings("f") == ["x"]
    f.finish()


@pytest.mark.parametrize(("value", "read"), [
    (True, "integer"), (3.0, "integer"), ("3", "integer"), (0, "integer"), (None, "integer"), (True, "number"),
    ("x", "number"), (float("nan"), "number"), (float("inf"), "number"), (1, "flag"), (None, "flag"), ("x", "strings"),
    ([1], "strings"),
])
def test_ill_typed(value, read):
    with pytest.raises(UserError, match=r"my\.json: key=.* is not supported; supported: "):
        getattr(Fields({"key": value}, "my.json"), read)("key")


def test_missing():
    with pytest.raises(UserError, match=r"my\.json: 'hidden_size' is missing"):
        Fields({}, "my.json").integer("hidden_size")
    with pytest.raises(UserError, match="holds no JSON object"):
        Fields([], "my.json")


def test_must():
    for value in (None, False, 1.0):
        Fields({"key": value}).must("key", False, 1)
    Fields({}).must("key", False)
    for value in (True, 0, 2, "x"):
        with pytest.raises(UserError, match="key=.* is not supported; supported: False or 1"):
            Fields({"key": value}).must("key", False, 1)


def test_what_nobody_read_is_refused():
    f = Fields({"attention_multiplier": 0.5, "use_cache": True, "torch_dtype": "float16", "quantization_config": None,
                "attention_dropout": 0.1, "pruned_heads": {}, "is_decoder": False})
    with pytest.raises(UserError, match=r"config\.json: attention_multiplier=0\.5 is not supported"):
        f.finish()
    f.ignore("attention_multiplier")
    f.finish()
    with pytest.raises(UserError, match=r"quantization_config=\{'quant_method': 'fp8'\} is not supported"):
        Fields({"quantization_config": {"quant_method": "fp8"}}).finish()


@pytest.mark.parametrize("key", ["output_multiplier_scale", "output_norm", "unsloth_scale", "dropout_scale",
                                 "residual_multiplier_dropout", "classifier_activation", "bos_tokens"])
def test_what_merely_looks_like_a_harmless_key_is_refused(key):
    with pytest.raises(UserError, match=f"{key}=0.5 is not supported"):
        Fields({key: 0.5}).finish()


# Rotary positions

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def read(partial=None, head_width=8, **values):
    f = Fields(values)
    f.default(rope_theta=1e4)
    found = rope_fields.read(f, head_width, 128, partial=partial)
    f.finish()
    return found


@pytest.mark.parametrize("values", [
    {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3", "rope_type": "llama3"}},
    {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
    {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}, "rope_theta": 500000},
    {"rope_parameters": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 5e5, "rope_scaling": None},
])
def test_every_spelling_of_a_scaling(values):
    expected = RopeScaling("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0)
    assert read(**values) == {"rope_theta": 5e5, "rope_scaling": expected, "rotary_dim": None}


def test_values_that_are_left_out():
    assert read() == {"rope_theta": 1e4, "rope_scaling": None, "rotary_dim": None}
    assert read(rope_parameters={"rope_type": "default"})["rope_scaling"] is None
    yarn = read(rope_scaling={"type": "yarn", "factor": 4.0, "beta_fast": None})["rope_scaling"]
    assert yarn == RopeScaling("yarn", 4.0, 128)  # the original context is then the model's own
    yarn = read(rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 32})["rope_scaling"]
    assert yarn.factor == 4.0
    long = {"type": "su", "short_factor": [1, 1.5, 2, 3], "long_factor": [2, 3, 4, 5]}
    found = read(rope_scaling=long, original_max_position_embeddings=64)["rope_scaling"]
    assert found == RopeScaling("longrope", 2.0, 64, short_factors=(1.0, 1.5, 2.0, 3.0),
                                long_factors=(2.0, 3.0, 4.0, 5.0))


def test_partly_turned_heads():
    assert read(partial=0.5)["rotary_dim"] == 4
    assert read(partial=0.5, partial_rotary_factor=1.0)["rotary_dim"] is None
    assert read(partial=1.0, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.75})["rotary_dim"] == 6
    assert read(partial_rotary_factor=1.0)["rotary_dim"] is None


@pytest.mark.parametrize(("values", "words"), [
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type='mrope' is not supported; supported: 'def"),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, r"rope_scaling: mrope_section=\[1\]"),
    ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "type='linear' is not supported"),
    ({"rope_scaling": {"type": "linear"}}, "factor=None is not supported; supported: numbers from 1"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast=3"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}}, "original_max.*128"),
    ({"rope_scaling": {"type": "llama3", "factor": 2.0, "high_freq_factor": 4.0}}, "'low_freq_factor' is missing"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4}}, "'long_factor' is missing"),
    ({"rope_scaling": {"type": "longrope", "short_factor": "x", "long_factor": [1.0] * 4}}, "short_factor='x'"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True}}, "finetuned=True"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' is not supported; supported: a JSON object"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "both alike"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, "rope_theta=10000.0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; supported: 1.0 in this family"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention="),
])
def test_refused_scalings(values, words):
    with pytest.raises(UserError, match=words):
        read(**values)


def test_a_base_for_each_kind_of_layer():
    def layered(**values):
        f = Fields(values)
        found = rope_fields.read_layered(f, 128, 1e6, 1e4)
        f.finish()
        return found

    linear = {"rope_type": "linear", "factor": 8.0}
    expected = {"rope_theta": 1e6, "rope_scaling": RopeScaling("linear", 8.0), "local_rope_theta": 1e4}
    assert layered(rope_scaling=linear) == expected
    assert layered(rope_theta=1e6, rope_local_base_freq=10000, rope_scaling=linear) == expected
    assert layered(rope_parameters={"full_attention": linear | {"rope_theta": 1e6},
                                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}) == expected
    assert layered(rope_parameters={"full_attention": linear}) == expected
    with pytest.raises(UserError, match="rope_type='linear' is not supported"):
        layered(rope_parameters={"sliding_attention": linear})
    with pytest.raises(UserError, match="rope_theta=5"):
        layered(rope_parameters={"rope_theta": 5.0})


def test_written_fractions_are_read_back():
    """Whoever reads a fraction multiplies and rounds down."""
    for head_dim in range(2, 258, 2):
        for rotary in range(2, head_dim + 1, 2):
            config = ModelConfig(8, 1, 8, 1, 1, head_dim, 8, 8, rotary_dim=rotary)
            fraction = json.loads(json.dumps(rope_fields.write(config)))["partial_rotary_factor"]
            assert int(head_dim * fraction) == rotary and fraction <= 1
