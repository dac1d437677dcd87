"""How a model wants to be sampled is obeyed where nobody says otherwise, and what is not supported is said."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

from llm_jax.errors import UserError
from llm_jax.inference import generation_config
from llm_jax.inference.generation_config import SamplingDefaults
from llm_jax.inference.request import SamplingParams
from llm_jax.inference.service import Service
from llm_jax.interop.importing import import_run


def read(folder, fields):
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return generation_config.read(folder)


def test_without_a_file_nothing_changes(tmp_path):
    assert generation_config.read(tmp_path) == SamplingDefaults()
    assert SamplingDefaults().params() == SamplingParams()
    assert SamplingDefaults().params(max_tokens=5, temperature=None, seed=3) == SamplingParams(max_tokens=5, seed=3)


def test_sampling_as_the_file_says_and_transformers_for_the_rest(tmp_path):
    found = read(tmp_path, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]})
    assert found == SamplingDefaults(0.6, 50, 0.9)
    assert read(tmp_path, {"do_sample": True, "top_k": 0}) == SamplingDefaults(1.0, 0, 1.0)
    assert found.params(temperature=0.0) == SamplingParams(temperature=0.0, top_k=50, top_p=0.9)
    assert found.params(top_k=0, top_p=1.0) == SamplingParams(temperature=0.6)


def test_do_sample_false_is_greedy_whatever_the_temperature(tmp_path):
    assert read(tmp_path, {"do_sample": False, "temperature": 0.6, "top_k": 20}) == SamplingDefaults(0.0, 20, 1.0)
    assert read(tmp_path, {"temperature": 0.6}).temperature == 0
    assert read(tmp_path, {"_from_model_config": True, "transformers_version": "5.0", "eos_token_id": 2}).params() == (
        SamplingParams())


def test_lengths_and_stop_strings(tmp_path):
    found = read(tmp_path, {"max_new_tokens": 7, "max_length": 20, "stop_strings": ["\n\n"]})
    assert found.params() == SamplingParams(max_tokens=7, stop=("\n\n",)) and not found.notes
    assert found.params(max_tokens=9, stop=()) == SamplingParams(max_tokens=9)


def test_penalty_min_p_and_least_length(tmp_path):
    """The penalty and the least length count for greedy requests too."""
    found = read(tmp_path, {"repetition_penalty": 1.05, "min_p": 0.1, "min_new_tokens": 200, "do_sample": False})
    assert not found.notes
    assert found.params(max_tokens=300) == SamplingParams(
        max_tokens=300, repetition_penalty=1.05, min_p=0.1, min_tokens=200)
    assert found.params(max_tokens=20).min_tokens == 20 and found.params().min_tokens == 128
    assert found.params(min_tokens=0, repetition_penalty=1.0, min_p=0.0) == SamplingParams()
    assert read(tmp_path, {"min_new_tokens": 3, "max_new_tokens": 5}).params() == SamplingParams(
        max_tokens=5, min_tokens=3)


def test_what_would_change_the_tokens_is_said_once_each_and_what_would_not_is_not(tmp_path):
    found = read(tmp_path, {"no_repeat_ngram_size": 3, "num_beams": 4, "min_length": 9, "typical_p": 0.5, "new": 3,
                            "encoder_repetition_penalty": 1.5, "do_sample": True})
    assert [note.split("asks for ")[1].split("=")[0] for note in found.notes] == [
        "no_repeat_ngram_size", "num_beams", "min_length", "typical_p", "new", "encoder_repetition_penalty"]
    quiet = {"repetition_penalty": 1.0, "num_beams": 1, "typical_p": 0.5, "length_penalty": 2.0, "pad_token_id": 0,
             "suppress_tokens": None, "bad_words_ids": [], "min_length": 0}
    assert not read(tmp_path, quiet).notes


@pytest.mark.parametrize("fields, says", [
    ([], "JSON object"), ({"do_sample": "yes"}, "do_sample"),
    ({"do_sample": True, "temperature": "hot"}, "temperature"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"min_p": "x"}, "min_p"),
    ({"min_new_tokens": -1}, "min_tokens"), ({"min_new_tokens": "x"}, "min_tokens"),
    ({"min_new_tokens": 9, "max_new_tokens": 5}, "min_tokens"),
    ({"top_p": 7}, "top_p"), ({"top_k": -1}, "top_k"), ({"max_new_tokens": 0}, "max_tokens"),
    ({"stop_strings": 3}, "stop_strings"), ({"stop_strings": [3]}, "stop"),
])
def test_damaged_values_are_one_error_that_names_the_file(tmp_path, fields, says):
    with pytest.raises(UserError, match=f"generation_config.json.*{says}"):
        read(tmp_path, fields)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json cannot be read"):
        generation_config.read(tmp_path)


@pytest.mark.parametrize("content, says", [
    ('{"do_sample": true, "temperature": -1}', "temperature"), ("not json", "cannot be read")])
def test_an_import_refuses_what_could_not_be_used_and_writes_nothing(tmp_path, content, says):
    golden = pathlib.Path(__file__).parents[1] / "golden" / "llama2"
    source = shutil.copytree(golden, tmp_path / "hf", ignore=shutil.ignore_patterns("*.npz"))
    (source / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=f"generation_config.json.*{says}"):
        import_run(source, tmp_path / "run")
    assert list(tmp_path.iterdir()) == [source]


def test_the_server_names_what_is_not_obeyed_once(tmp_path):
    golden = pathlib.Path(__file__).parents[1] / "golden" / "llama2"
    source, said = shutil.copytree(golden, tmp_path / "hf", ignore=shutil.ignore_patterns("*.npz")), []
    (source / "generation_config.json").write_text('{"no_repeat_ngram_size": 3, "do_sample": true}')
    import_run(source, tmp_path / "run")
    with pytest.raises(UserError, match="no tokenizer"):  # which comes later
        Service.from_run(tmp_path / "run", on_event=said.append)
    assert len(said) == 1 and said[0].startswith("note: ") and "no_repeat_ngram_size=3" in said[0]


def test_where_answers_begin_and_end(tmp_path):
    """The first file that says it, for an encoder–decoder's folder and for a run made of one."""

    def found(generation, config, at="config.json"):
        shutil.rmtree(tmp_path)
        (tmp_path / at).parent.mkdir(parents=True)
        (tmp_path / at).write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return generation_config.answer_tokens(tmp_path)

    config = {"decoder_start_token_id": 0, "eos_token_id": 1}
    assert found(None, config) == found(None, config, "huggingface/config.json") == (0, (1,))
    assert found({"top_k": 3}, config) == (0, (1,))
    assert found({"decoder_start_token_id": 5, "eos_token_id": [2, 3]}, config) == (5, (2, 3))
    assert found({}, {"bos_token_id": 4}) == (4, ())
    bad_end = {"eos_token_id": "x", "bos_token_id": 1}
    for generation, says in (({}, "decoder_start_token_id"), (bad_end, "eos_token_id")):
        with pytest.raises(UserError, match=says):
            found(generation, {})
