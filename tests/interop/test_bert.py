"""BERT's files as they are on disk; what its models compute, test_golden.py shows."""

from __future__ import annotations

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from llm_jax import hf, models
from llm_jax.errors import UserError
from llm_jax.interop import families
from llm_jax.interop.families import bert
from llm_jax.interop.safetensors import Folder, Writer
from llm_jax.models import Head
from tests.interop.golden import GOLDEN
from tests.models import test_encoder
from tests.models.drawn import drawn_params

BERT = GOLDEN / "bert"
FILE = json.loads((BERT / "config.json").read_text())
ALL = ("masked_lm", "pooler", "next_sentence")


def write(directory: pathlib.Path, rename, architecture: str, drop: str = "nothing") -> pathlib.Path:
    """The golden checkpoint under other names."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(FILE | {"architectures": [architecture]}))
    with Folder(BERT) as folder:
        names = {name: rename(name) for name in folder.tensors if not re.search(drop, name)}
        with Writer(directory, [(names[n], folder.tensors[n].dtype, folder.tensors[n].shape) for n in names]) as out:
            for name in names:
                out.write(names[name], folder.read(name))
    return directory


def early(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_early_names_and_a_bare_model_load_as_the_same(tmp_path):
    _, expected, _, _ = hf.load(BERT)
    _, params, config, _ = hf.load(write(tmp_path / "early", early, "BertForPreTraining"))
    jax.tree.map(np.testing.assert_array_equal, params, expected)

    directory = write(tmp_path / "bare", lambda name: early(name.removeprefix("bert.")), "BertModel", drop="cls.")
    _, params, config, _ = hf.load(directory)
    assert config.encoder_heads == ("pooler",) and config.tie_embeddings
    jax.tree.map(np.testing.assert_array_equal, params, {name: expected[name] for name in params})


@pytest.mark.parametrize("architecture, drop, heads", [
    ("BertForMaskedLM", "nothing", ALL),  # what bert-base-uncased calls itself, and what it holds
    ("BertForMaskedLM", "seq_relationship", ("masked_lm", "pooler")),
    ("BertForPreTraining", "nothing", ALL), ("BertForNextSentencePrediction", "predictions", ALL[1:]),
    ("BertModel", "cls.", ("pooler",)), ("BertModel", "cls|pooler", ())])
def test_the_heads_are_those_the_file_holds(tmp_path, architecture, drop, heads):
    directory = write(tmp_path / "hf", str, architecture, drop)
    model, params, config, _ = hf.load(directory)
    assert config.encoder_heads == heads
    hf.save(tmp_path / "out", params, config)
    assert hf.load(tmp_path / "out")[2] == config
    with Folder(directory) as a, Folder(tmp_path / "out") as b:
        assert set(a.tensors) == set(b.tensors)
    # A class that loads the written folder has no weight that the folder lacks; every class of the bare model has one.
    (named,) = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    assert set(bert._HEADS[named]) <= set(heads) or (named, heads) == ("BertModel", ())


@pytest.mark.parametrize("architecture, drop, said", [
    ("BertForPreTraining", "cls.predictions.", "5 tensors missing: cls.predictions.transform.dense.weight, "),
    ("BertForPreTraining", "cls.predictions.bias", "1 tensor missing: cls.predictions.bias"),
    ("BertForPreTraining", "seq_relationship", "2 tensors missing: cls.seq_relationship.weight, "),
    ("BertForPreTraining", "pooler", "2 tensors missing: bert.pooler.dense.weight, "),
    ("BertForMaskedLM", "cls.predictions.", "5 tensors missing: cls.predictions.transform.dense.weight, "),
    ("BertForNextSentencePrediction", "pooler", "2 tensors missing: bert.pooler.dense.weight, "),
    ("BertForSequenceClassification", "cls.", "2 tensors missing: classifier.weight, classifier.bias"),
    ("BertForSequenceClassification", "pooler", "4 tensors missing: bert.pooler.dense.weight, .*classifier.bias")])
def test_heads_that_the_name_promises_must_be_there(tmp_path, architecture, drop, said):
    with pytest.raises(UserError, match=said):
        hf.load(write(tmp_path / "hf", str, architecture, drop))


def test_copies_of_tied_tensors_are_compared(tmp_path):
    def with_copy(directory: pathlib.Path, change: float) -> pathlib.Path:
        write(directory, str, "BertForPreTraining")
        with Folder(directory) as folder:
            arrays = {name: folder.read(name) for name in folder.tensors}
        arrays["cls.predictions.decoder.weight"] = arrays["bert.embeddings.word_embeddings.weight"] + change
        arrays["cls.predictions.decoder.bias"] = arrays["cls.predictions.bias"]
        with Writer(directory, [(name, "F32", array.shape) for name, array in arrays.items()]) as out:
            for name, array in arrays.items():
                out.write(name, array)
        return directory

    assert hf.load(with_copy(tmp_path / "same", 0))[2] == hf.read_config(BERT)
    with pytest.raises(UserError, match="cls.predictions.decoder.weight"):
        hf.load(with_copy(tmp_path / "other", 1))


@pytest.mark.parametrize("key, value", [
    ("position_embedding_type", "relative_key"), ("is_decoder", True), ("add_cross_attention", True),
    ("hidden_act", "mish"), ("num_attention_heads", 5), ("architectures", ["BertForQuestionAnswering"]),
    ("some_new_switch", True), ("model_type", "roberta")])
def test_what_is_not_supported_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        families.config_from_hf(FILE | {key: value})


def test_fields_that_change_nothing_are_let_be():
    extra = {"gradient_checkpointing": False, "position_embedding_type": "absolute", "directionality": "bidi",
             "pooler_fc_size": 768, "pooler_type": "first_token_transform", "is_decoder": False}
    assert families.config_from_hf(FILE | extra) == families.config_from_hf(FILE)


@pytest.mark.parametrize("head", [None, Head("sequence_classification", 3), Head("regression", 2), Head("reward"),
                                  Head("token_classification", 5), Head("value")])
@pytest.mark.parametrize("tied", [True, False])
def test_every_leaf_has_its_tensor_and_comes_back(tmp_path, head, tied):
    heads = ALL if head is None else ("pooler",) if head.per_sequence else ()
    config = test_encoder.config(head=head, encoder_heads=heads, tie_embeddings=tied, activation="gelu_tanh")
    params = drawn_params(config)
    hf.save(tmp_path, params, config)
    model, again, found, _ = hf.load(tmp_path)
    assert found == config and isinstance(model, models.Encoder)
    jax.tree.map(np.testing.assert_array_equal, again, params)
