"""The project's own service at the door, through the project's own client."""

from __future__ import annotations

import dataclasses

import grpc
import pytest

from llm_jax.errors import UserError
from llm_jax.inference.generation_config import SamplingDefaults
from llm_jax.inference.request import Constraint, Delta, PromptLogprob, SamplingParams, Usage
from serving import inference, messages
from serving.client import Client, RequestFailed
from tests.serving.doubles import BOS, EOS, CharacterTokenizer, Left, wait_until


@pytest.fixture
def client(server):
    with Client(server.address) as client:
        yield client


def test_every_sampling_field_arrives(server, client):
    asked = {"max_tokens": 3, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1,
             "presence_penalty": -0.5, "frequency_penalty": 0.25, "logit_bias": {5: -100.0, 7: 2.5},
             "seed": 2**64 - 1, "stop": ("\n", "结束"), "stop_ids": (9, 8), "min_tokens": 2, "ignore_eos": True,
             "constraint": Constraint("regex", "(ab|你)*")}
    list(client.generate("ab", num_samples=2, priority=-5, tenant="我", deadline_seconds=7.5, top_logprobs=3,
                         prompt_logprobs=0, **asked))
    expected = [SamplingParams(sample=i, logprobs=3, prompt_logprobs=None if i else 0, **asked) for i in range(2)]
    got = [(dataclasses.replace(params, logit_bias=tuple(sorted(params.logit_bias))), priority)
           for _, params, priority in server.service.submitted]
    assert got == [(params, -5) for params in expected]
    assert server.service.terms == [("我", Left(7.5))]
    for kind in ("json_schema", "grammar"):
        list(client.generate("ab", max_tokens=1, constraint=Constraint(kind, "{}")))
        assert server.service.submitted[-1][1].constraint == Constraint(kind, "{}")


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
    server.service.defaults = SamplingDefaults(0.6, 20, 0.9, ("\n\n",), max_tokens=7, min_p=0.1,
                                               repetition_penalty=1.2, min_tokens=5)
    list(client.generate("ab", max_tokens=2))
    list(client.generate("ab", max_tokens=2, temperature=0.0, top_k=0, top_p=1.0, stop="x", min_p=0.0,
                         repetition_penalty=1.0, min_tokens=0))
    list(client.decode("ab", max_tokens=2))
    came = SamplingParams(max_tokens=2, temperature=0.6, top_k=20, top_p=0.9, stop=("\n\n",), min_p=0.1,
                          repetition_penalty=1.2, min_tokens=2)
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
    last = chunks[-1]
    assert (last.finish_reason, last.prompt_tokens, last.completion_tokens, last.cached_tokens) == ("length", 3, 5, 2)
    assert all(c.finish_reason is None and c.prompt_tokens is None for c in chunks[:-1])


def test_logprobs_are_sent_only_when_asked_for(client):
    assert not any(c.logprobs for c in client.generate("ab", max_tokens=3))


def test_the_likeliest_tokens_arrive_whole_however_many_they_are(client, monkeypatch):
    """More than one message may hold: their tokens are still in order, their text complete."""
    monkeypatch.setattr(inference, "PIECE", 16)
    count = 3 * 16 + 5
    chunks = list(client.generate("ab" * 20, max_tokens=count, top_logprobs=2, prompt_logprobs=1, num_samples=2,
                                  best_of=3))
    for sample in range(2):
        mine = [c for c in chunks if c.sample == sample]
        assert [i for c in mine for i in c.token_ids] == [ord(c) + 3 for c in ("ab" * count)[:count]]
        assert [t for c in mine for t in c.top_logprobs] == [((0, 0.0), (1, -1.0))] * count
        assert "".join(c.text for c in mine) == ("ab" * count)[:count]
        assert all(len(c.logprobs) == len(c.token_ids) == len(c.top_logprobs) <= 16 for c in mine)
        assert max(len(c.token_ids) for c in mine) == max(len(c.prompt_logprobs) for c in chunks) == 16
        assert [p for c in mine for p in c.prompt_logprobs] == ([] if sample else [
            PromptLogprob(i, -0.25 * i, ((0, 0.0),)) for i in range(1, 41)])
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["length"]


def test_best_of_sends_the_likeliest_when_all_have_finished(server, client):
    def sample(text, *logprobs, reason="stop"):
        return [Delta(c, (ord(c),), (p,)) for c, p in zip(text, logprobs, strict=False)] + [
            Delta(finish_reason=reason, usage=Usage(2, len(text)))]

    server.service.faults["x"] = [sample("ab", -1.0, -3.0), sample("c", -1.5), sample("", reason="length"),
                                  sample("defg", -1.0, -1.0, -1.0, -1.1)]
    chunks = list(client.generate("x", num_samples=2, best_of=4))
    assert [(c.sample, c.text, c.finish_reason, c.completion_tokens) for c in chunks] == [
        (0, "defg", "stop", 4), (1, "c", "stop", 1)]
    assert [params.sample for _, params, _ in server.service.submitted] == [0, 1, 2, 3]
    assert [c.text for c in client.generate("x", best_of=4)] == ["defg"]


def test_a_deadline_ends_a_sample_with_what_it_has(server, client):
    server.service.faults["slow"] = [[Delta("a", (100,), (-1.0,)), Delta(finish_reason="deadline", usage=Usage(4, 1))]]
    assert [(c.text, c.finish_reason) for c in client.generate("slow", deadline_seconds=1)][-1][1] == "deadline"
    server.service.faults["slow"] = [[Delta(finish_reason="deadline", usage=Usage(4, 0))]]
    with pytest.raises(RequestFailed, match="before its first token") as caught:
        list(client.generate("slow"))
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED


def test_embeddings(server, client):
    assert client.embed(["ab", [7, 8, 9]], priority=4) == [(BOS, 100, 101), (7, 8, 9)]
    client.embed(["你"], "last")
    assert [(pooling, priority) for _, pooling, priority in server.service.submitted] == [
        ("mean", 4), ("mean", 4), ("last", 0)]
    server.service.faults["ab"] = Delta(finish_reason="error", error="went wrong")
    for prompts, code, said in (([], "INVALID_ARGUMENT", "0 inputs"), (["a"] * 65, "INVALID_ARGUMENT", "1 to 64"),
                                (["a", []], "INVALID_ARGUMENT", "an input has no tokens"),
                                ([[5] * 10_000], "INVALID_ARGUMENT", "at most 9999"),
                                (["x", "ab"], "INTERNAL", "wrong")):
        with pytest.raises(RequestFailed, match=f"{code}.*{said}"):
            client.embed(prompts)
    with pytest.raises(UserError, match="pooling must be one of mean, last"):
        client.embed(["a"], "max")
    request = messages.EmbedRequest(inputs=[messages.Prompt(text="a")], pooling=7)
    with pytest.raises(RequestFailed, match="pooling=7"):
        client._call(messages.INFERENCE, "Embed", request, messages.EmbedResponse)
    assert not server.service.stats()["running"] and server.server.calls.running == 0


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
    ({"best_of": 65}, "best_of"),
    ({"num_samples": 3, "best_of": 2}, "best_of=2 must lie between num_samples"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"presence_penalty": float("inf")}, "presence_penalty"),
    ({"frequency_penalty": -101.0}, "frequency_penalty"),
    ({"logit_bias": {3: 101.0}}, "logit_bias"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias"),
    ({"stop_ids": [-1]}, "stop_ids"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": -1}, "top_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"deadline_seconds": 0.0}, "deadline_seconds"),
    ({"deadline_seconds": float("nan")}, "deadline_seconds"),
    ({"tenant": "x" * 257}, "tenant"),
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
    ("ab", {"logit_bias": {2**40: 1.0}}),
    ("ab", {"stop_ids": ["x"]}),
])
def test_what_no_message_can_hold_is_told_before_it_is_sent(client, prompt, fields):
    with pytest.raises(UserError, match="can't be sent|must be a"):
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
