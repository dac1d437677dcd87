"""T5's files as they are on disk; what its models compute, test_golden.py shows."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from llm_jax import hf, models
from llm_jax.errors import UserError
from llm_jax.interop import families
from tests.interop.folders import read_all, write
from tests.interop.golden import GOLDEN
from tests.models import test_encoder_decoder
from tests.models.drawn import drawn_params

FILE = json.loads((GOLDEN / "t5" / "config.json").read_text())
FLAN = json.loads((GOLDEN / "flan_t5" / "config.json").read_text())
TIED, APART = ["shared.weight"], ["shared.weight", "lm_head.weight"]


@pytest.mark.parametrize("fields, tensors, tied, scaled", [
    ({}, TIED, True, True),  # t5-small
    ({}, APART, True, True),  # the same, with a copy of the embedding in the file
    ({"tie_word_embeddings": False}, APART, False, False),  # T5 1.1 and Flan
    ({"tie_word_embeddings": False}, TIED, False, False),  # a damaged one
    ({"tie_word_embeddings": False, "scale_decoder_outputs": False}, TIED, False, False),
    ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, APART, False, False),  # saved by transformers 5
    ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, TIED, True, False),
    ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, TIED, True, True)])
def test_whether_outputs_are_scaled_and_projected_apart(fields, tensors, tied, scaled):
    bare = {key: value for key, value in FILE.items() if key not in ("tie_word_embeddings", "scale_decoder_outputs")}
    config = families.config_from_hf(bare | fields, tensors=tensors)
    assert config.tie_embeddings == tied
    assert config.logit_scale == (FILE["d_model"] ** -0.5 if scaled else None)


def test_a_projection_that_is_missing_is_missed(tmp_path):
    """A file of transformers 4 says itself that there must be one."""
    folder = GOLDEN / "flan_t5"
    tensors = {name: array for name, array in read_all(folder).items() if name != "lm_head.weight"}
    write(tmp_path, tensors)
    shutil.copy(folder / "config_v4.json", tmp_path / "config.json")
    with pytest.raises(UserError, match="1 tensor missing: lm_head.weight"):
        hf.load(tmp_path)


def test_layers_of_either_side_and_the_feed_forward_part():
    config = families.config_from_hf(FILE | {"num_layers": 5, "num_decoder_layers": None})
    assert (config.encoder_layers, config.num_layers) == (5, 5)
    config = families.config_from_hf(FILE | {"num_layers": 5, "num_decoder_layers": 2})
    assert (config.encoder_layers, config.num_layers) == (5, 2)
    bare = {key: value for key, value in FILE.items() if key not in ("dense_act_fn", "is_gated_act")}
    for name, expected in {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True), "gelu": ("gelu", False),
                           "gated-silu": ("silu", True)}.items():
        config = families.config_from_hf(bare | {"feed_forward_proj": name})
        assert (config.activation, config.gated_mlp) == expected


@pytest.mark.parametrize("key, value", [
    ("feed_forward_proj", "gated-mish"), ("dense_act_fn", "gelu"), ("is_gated_act", True), ("is_decoder", True),
    ("is_encoder_decoder", False), ("architectures", ["T5ForQuestionAnswering"]), ("some_new_switch", 1),
    ("model_type", "mt5"),
    ("relative_attention_num_buckets", "many"), ("d_kv", 0)])
def test_what_is_not_supported_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        families.config_from_hf(FILE | {key: value})


def test_what_transformers_cannot_be_told_is_refused():
    for changes, named in (({"activation": "gelu_tanh"}, "activation"), ({"attention_scale": None}, "attention_scale"),
                           ({"norm": "layer"}, "norm"), ({"logit_scale": 0.5}, "logit_scale")):
        with pytest.raises(UserError, match=named):
            families.config_to_hf(test_encoder_decoder.config(**changes))


@pytest.mark.parametrize("changes", [
    {}, {"tie_embeddings": False, "logit_scale": None, "gated_mlp": True, "activation": "gelu_tanh"},
    {"logit_scale": None}])
def test_every_leaf_has_its_tensor_and_comes_back(tmp_path, changes):
    config = test_encoder_decoder.config(**changes)
    params = drawn_params(config)
    hf.save(tmp_path, params, config)
    model, again, found, _ = hf.load(tmp_path)
    assert found == config and isinstance(model, models.EncoderDecoder)
    jax.tree.map(np.testing.assert_array_equal, again, params)
