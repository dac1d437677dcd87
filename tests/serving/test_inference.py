"""The project's own service at the door, through the project's own client."""

from __future__ import annotations

import grpc
import pytest

from llm_jax.errors import UserError
from llm_jax.inference.generation_config import SamplingDefaults
from llm_jax.inference.request import Delta, SamplingParams, Usage
from serving.client import Client, RequestFailed
from tests.serving.doubles import BOS, EOS, CharacterTokenizer, wait_until


@pytest.fixture
def client(server):
    with Client(server.address) as client:
        yield client


def test_every_sampling_field_arrives(server, client):
    list(client.generate("ab", max_tokens=3, temperature=0.7, top_k=40, top_p=0.9, seed=2**64 - 1, stop=["\n", "结束"],
                         ignore_eos=True, num_samples=2, priority=-5))
    expected = {"max_tokens": 3, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "seed": 2**64 - 1,
                "stop": ("\n", "结束"), "ignore_eos": True}
    assert [(params, priority) for _, params, priority in server.service.submitted] == [
        (SamplingParams(sample=i, **expected), -5) for i in range(2)]


def test_a_single_stop_string_may_be_given_as_it_is(server, client):
    list(client.generate("ab", max_tokens=1, stop="ab"))
    assert server.service.submitted[0][1].stop == ("ab",)


def test_defaults_are_greedy_and_as_many_as_fit(server, client):
    stream = client.generate("ab")
    next(stream)
    stream.close()
    assert server.service.submitted[0][1] == SamplingParams(max_tokens=server.service.max_context - 3)
    assert wait_until(lambda: server.service.cancelled == [0])


def test_what_a_request_does_not_say_is_as_the_model_came(server, client):
    server.service.defaults = SamplingDefaults(0.6, 20, 0.9, ("\n\n",), max_tokens=7)
    list(client.generate("ab", max_tokens=2))
    list(client.generate("ab", max_tokens=2, temperature=0.0, top_k=0, top_p=1.0, stop="x"))
    list(client.decode("ab", max_tokens=2))
    came = SamplingParams(max_tokens=2, temperature=0.6, top_k=20, top_p=0.9, stop=("\n\n",))
    assert [params for _, params, _ in server.service.submitted] == [
        came, SamplingParams(max_tokens=2, stop=("x",)), came]


def test_a_model_that_expects_no_bos_gets_none(server, client):
    tokenizer = CharacterTokenizer()
    tokenizer.adds_bos, tokenizer.bos_id = False, None
    server.service.tokenizer = tokenizer
    assert not client.model().HasField("bos_id") and list(client.model().end_ids) == [EOS]
    list(client.decode([7, 8], max_tokens=1))
    assert server.service.submitted[-1][0] == (7, 8)


def test_chunks_end_with_reason_and_counts(client):
    chunks = list(client.generate("你好", max_tokens=5, logprobs=True))
    assert "".join(c.text for c in chunks) == "你好你好你"
    assert [i for c in chunks for i in c.token_ids] == [ord(c) + 3 for c in "你好你好你"]
    assert [p for c in chunks for p in c.logprobs] == [-0.5] * 5
    assert (chunks[-1].finish_reason, chunks[-1].prompt_tokens, chunks[-1].completion_tokens) == ("length", 3, 5)
    assert all(c.finish_reason is None and c.prompt_tokens is None for c in chunks[:-1])


def test_logprobs_are_sent_only_when_asked_for(client):
    assert not any(c.logprobs for c in client.generate("ab", max_tokens=3))


def test_token_prompts_are_used_as_they_are(server, client):
    list(client.generate([7, 8, 9], max_tokens=1))
    list(client.generate("a", max_tokens=1))
    assert [prompt for prompt, _, _ in server.service.submitted] == [(7, 8, 9), (BOS, ord("a") + 3)]


def test_samples_end_each_for_itself(server, client):
    server.service.faults["stops"] = Delta(text="!", token_ids=(36,), logprobs=(-1.0,), finish_reason="stop",
                                           usage=Usage(6, 1))
    chunks = list(client.generate("stops", num_samples=3))
    assert sorted(c.sample for c in chunks) == [0, 1, 2]
    assert all((c.text, c.finish_reason, c.completion_tokens) == ("!", "stop", 1) for c in chunks)


@pytest.mark.parametrize(("fields", "said"), [
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 100}, "stop"),
    ({"stop": ["x" * 1025]}, "strings of 1 to 1024 characters"),
    ({"stop": ["é" * 1024] * 17}, "stop"),
    ({"num_samples": 65}, "num_samples"),
])
def test_values_out_of_range_are_refused_by_name(client, fields, said):
    with pytest.raises(RequestFailed) as caught:
        list(client.generate("ab", **fields))
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert said in str(caught.value)


@pytest.mark.parametrize(("prompt", "fields"), [
    ("a\ud800b", {}),
    ([2**40], {}),
    ("ab", {"seed": -1}),
    ("ab", {"max_tokens": 2**40}),
    ("ab", {"temperature": "hot"}),
])
def test_what_no_message_can_hold_is_told_before_it_is_sent(client, prompt, fields):
    with pytest.raises(UserError, match="can't be sent"):
        list(client.generate(prompt, **fields))


def test_empty_prompts(client):
    assert "".join(c.text for c in client.generate("", max_tokens=2)) == "xx"
    with pytest.raises(RequestFailed, match="INVALID_ARGUMENT: the prompt has no tokens"):
        list(client.generate([], max_tokens=2))


def test_model_tells_the_limits(server, client):
    model = client.model()
    assert (model.max_context, model.max_prompt_tokens, model.bos_id, list(model.end_ids)) == (10_000, 9_999, 1, [2])
    assert model.vocab_size == server.service.tokenizer.vocab_size


def test_health(server, client):
    assert client.health()
    server.service.is_live = False
    assert not client.health()


def test_jetstream_through_the_client(client):
    chunks = list(client.decode("ab", max_tokens=4, num_samples=2))
    assert "".join(c.text for c in chunks if c.sample == 1) == "abab"
    assert [i for c in client.decode([100, 101], max_tokens=3) for i in c.token_ids] == [100, 101, 100]
