"""`/v1/completions`, `/v1/embeddings`, `/v1/models` and `/tokenize`: what arrives at the engine, what comes back."""

from __future__ import annotations

import asyncio
import base64
import dataclasses

import httpx
import numpy as np
import pytest

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.inference.generation_config import SamplingDefaults
from llm_jax.inference.request import Constraint, Delta, InvalidRequest, PromptLogprob, SamplingParams, Usage
from serving.client import Client
from serving.http.completions import CompletionRequest, _Choices
from serving.http.logprobs import CompletionLogprobs, spelled
from serving.http.prompts import Prompt
from tests.serving.access.keyring import Keyring
from tests.serving.doubles import BOS, CharacterTokenizer, FakeService, Left
from tests.serving.http.chat_doubles import ChatService
from tests.serving.http.conftest import MODEL, running_app
from tests.serving.http.test_app import COMPLETIONS, complete, error_of, events


def gathered(text: str) -> tuple[list[dict], dict | None]:
    """The choices of a stream put together, and its usage."""
    found: dict[int, dict] = {}
    usage = None
    *chunks, done = events(text)
    assert done == "[DONE]"
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            one = found.setdefault(choice["index"], choice | {"text": "", "logprobs": None})
            assert one["finish_reason"] is None or choice is chunk["choices"][0] and not one["text"]
            one["text"] += choice["text"]
            one["finish_reason"] = choice["finish_reason"]
            if choice["logprobs"]:
                one["logprobs"] = {name: (one["logprobs"] or {}).get(name, []) + values
                                   for name, values in choice["logprobs"].items()}
    return [found[i] for i in sorted(found)], usage


@pytest.fixture(scope="module")
def common():
    """A client of an app that tests share which leave nothing behind."""
    with running_app() as app, httpx.Client(base_url=app.url, timeout=30) as http:
        yield http


def test_every_field_arrives(app, http):
    answer = complete(http, model=MODEL, max_tokens=3, temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, n=2, best_of=3,
                      repetition_penalty=1.1, presence_penalty=-0.5, frequency_penalty=0.25, min_tokens=2,
                      logit_bias={"5": -100, "7": 2.5}, seed=2**64 - 1, stop=["\n", "结束"], stop_token_ids=[9, 8],
                      ignore_eos=True, guided_regex="(ab|你)*", logprobs=4, echo=True, priority=-5,
                      deadline_seconds=7.5, user="me", stream=False)
    assert answer.status_code == 200
    asked = {"max_tokens": 3, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1,
             "presence_penalty": -0.5, "frequency_penalty": 0.25, "min_tokens": 2, "logprobs": 4,
             "logit_bias": ((5, -100), (7, 2.5)), "seed": 2**64 - 1, "stop": ("\n", "结束"), "stop_ids": (9, 8),
             "ignore_eos": True, "constraint": Constraint("regex", "(ab|你)*")}
    expected = [SamplingParams(sample=i, prompt_logprobs=None if i else 4, **asked) for i in range(3)]
    assert [(params, priority) for _, params, priority in app.service.submitted] == [(p, -5) for p in expected]
    assert app.service.terms == [("", Left(7.5))]


@pytest.mark.parametrize(("sent", "constraint"), [
    ({"guided_grammar": "start: /a+/"}, Constraint("grammar", "start: /a+/")),
    ({"guided_json": {"type": "integer"}}, Constraint("json_schema", '{"type": "integer"}')),
    ({"guided_json": '{"const": "你"}'}, Constraint("json_schema", '{"const": "你"}')), ({"guided_json": None}, None)])
def test_constraints_arrive(app, http, sent, constraint):
    assert complete(http, **sent).status_code == 200
    assert app.service.submitted[0][1].constraint == constraint


def test_what_is_absent_or_null_is_as_the_model_came(app, http):
    app.service.defaults = SamplingDefaults(0.6, 20, 0.9, ("\n\n",), max_tokens=7, min_p=0.1, repetition_penalty=1.2,
                                            min_tokens=5)
    nothing = dict.fromkeys(("model", "max_tokens", "temperature", "top_p", "n", "best_of", "echo", "logprobs", "stop",
                             "stream", "stream_options", "seed", "suffix", "logit_bias", "user", "presence_penalty",
                             "frequency_penalty", "top_k", "priority", "guided_json", "stop_token_ids", "min_tokens"))
    for sent in ({}, nothing):
        answer = http.post(COMPLETIONS, json={"prompt": "ab"} | sent)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"][0]["text"]) == 16  # as OpenAI's
    came = SamplingParams(max_tokens=16, temperature=0.6, top_k=20, top_p=0.9, stop=("\n\n",), min_p=0.1,
                          repetition_penalty=1.2, min_tokens=5)
    assert [params for _, params, _ in app.service.submitted] == [came, came]


def test_values_that_are_off_or_negative_have_their_meaning(app, http):
    complete(http, top_k=-1, seed=-1, stop="x")
    params = app.service.submitted[0][1]
    assert (params.top_k, params.seed, params.stop) == (0, 2**64 - 1, ("x",))


@pytest.mark.parametrize(("prompt", "ids"), [
    ("你好", [[BOS, ord("你") + 3, ord("好") + 3]]), ([100, 101], [[100, 101]]),
    (["a", "你"], [[BOS, 100], [BOS, ord("你") + 3]]), ([[100], [101, 102]], [[100], [101, 102]])])
def test_prompts_are_texts_or_tokens_or_several(app, http, prompt, ids):
    answer = complete(http, prompt=prompt, n=2).json()
    assert sorted(list(found) for found, _, _ in app.service.submitted) == sorted(ids * 2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(ids)))
    texts = ["".join(chr(i - 3) for i in one if i > 2) for one in ids]
    assert [choice["text"] for choice in answer["choices"]] == [(text * 2)[:2] for text in texts for _ in range(2)]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["usage"]["completion_tokens"] == 4 * len(ids)


def test_a_text_may_go_without_what_the_model_puts_before_it(app, http):
    complete(http, add_special_tokens=False)
    assert app.service.submitted[0][0] == (100, 101)


@pytest.mark.parametrize("stream", [False, True])
def test_more_prompts_than_the_queue_has_room_for_take_turns(http, stream):
    with running_app(FakeService(max_running=4)) as app:
        app.service.max_requests = 4
        prompts = [f"{i:02}" for i in range(30)]
        answer = http.post(f"{app.url}{COMPLETIONS}", json={"prompt": prompts, "n": 2, "max_tokens": 2,
                                                            "stream": stream})
    choices = gathered(answer.text)[0] if stream else answer.json()["choices"]
    assert [choice["text"] for choice in choices] == [prompt for prompt in prompts for _ in range(2)]


def test_one_bad_prompt_of_several_is_named_and_nothing_runs(app, http):
    for stream in (False, True):
        answer = complete(http, prompt=["a", "b" * 20_000, "c"], stream=stream)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "prompt[1]")
        assert "9999" in error_of(answer)["message"]
    assert not app.service.submitted


@pytest.mark.parametrize(("path", "sent", "field"), [
    ("completions", {"prompt": "a" * 10_000}, "prompt"), ("completions", {"prompt": [100] * 10_000}, "prompt"),
    ("completions", {"prompt": "a" * 100_000}, "prompt"), ("completions", {"prompt": ["a", "b" * 10_000]}, "prompt[1]"),
    ("embeddings", {"input": "a" * 10_000}, "input"), ("embeddings", {"input": [[7], [8] * 10_000]}, "input[1]")])
def test_a_prompt_that_does_not_fit_has_openais_code(common, path, sent, field):
    answer = common.post(f"/v1/{path}", json=sent)
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, field, "context_length_exceeded")
    assert "at most 9999 fit" in error["message"]


@pytest.mark.parametrize("sent", [{"n": 5}, {"best_of": 5}, {"n": 2, "best_of": 5}])
def test_samples_are_as_many_as_the_server_takes_at_once(app, http, sent):
    app.service.max_requests = 4
    answer = complete(http, **sent)
    assert (answer.status_code, error_of(answer)["param"]) == (400, next(reversed(sent)))
    assert "and 4" in error_of(answer)["message"] and not app.service.submitted
    assert len(complete(http, n=4).json()["choices"]) == 4


def test_a_quota_sets_aside_what_fits_and_no_more(tmp_path):
    ring = Keyring(tmp_path)
    with running_app(guard=ring.guard()) as app, httpx.Client(base_url=app.url) as http:
        app.service.faults["ab"] = [[Delta(text="c", token_ids=(102,), logprobs=(-1.0,), finish_reason="stop",
                                           usage=Usage(3, 1))]]
        http.headers["x-api-key"] = ring.add(tokens_per_day=10_000)  # the context
        assert complete(http, max_tokens=2**31 - 1).status_code == 200
        answer = complete(http, max_tokens=9_997)  # of which four are used
        assert (answer.status_code, error_of(answer)["code"]) == (429, "insufficient_quota")
        assert "may take 10,000" in error_of(answer)["message"]


def test_one_prompt_that_fails_ends_the_others(app, http):
    app.service.faults["b"] = Delta(finish_reason="error", error="the step failed")
    answer = complete(http, prompt=["a", "b", "c"], max_tokens=9000)
    assert (answer.status_code, error_of(answer)["message"]) == (500, "the step failed")
    assert len(app.service.cancelled) == 2


@pytest.mark.parametrize("more", [
    {}, {"n": 3}, {"echo": True}, {"logprobs": 2}, {"logprobs": 0}, {"n": 2, "best_of": 4}, {"prompt": ["a", "你好吗"]},
    {"prompt": [100, 101, 200], "echo": True}, {"echo": True, "logprobs": 1, "n": 3, "prompt": ["你", "ab"]},
    {"echo": True, "logprobs": 1, "max_tokens": 0}, {"echo": True, "logprobs": 1, "prompt": "你a" * 1000, "n": 2}])
def test_a_stream_says_the_same_as_one_piece(common, more):
    asked = {"max_tokens": 20, "stream_options": {"include_usage": True}, "stream": True} | more
    streamed, usage = gathered(complete(common, **asked).text)
    whole = complete(common, **{key: value for key, value in asked.items() if not key.startswith("stream")}).json()
    assert streamed == whole["choices"] and usage == whole["usage"]
    assert all(choice["text"] for choice in streamed) and {c["finish_reason"] for c in streamed} == {"length"}


def test_the_shape_of_an_answer_and_of_a_stream(common):
    whole = complete(common, n=2).json()
    assert whole["object"] == "text_completion" and whole["model"] == MODEL and whole["id"].startswith("cmpl-")
    assert whole["choices"][1] == {"index": 1, "text": "ab", "logprobs": None, "finish_reason": "length"}
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
                              "prompt_tokens_details": {"cached_tokens": 2}}
    *chunks, last, done = events(complete(common, stream=True, stream_options={"include_usage": True}).text)
    assert done == "[DONE]" and last["choices"] == [] and last["usage"]["total_tokens"] == 5
    assert all(chunk["usage"] is None and chunk["object"] == "text_completion" for chunk in chunks)
    assert len({(chunk["id"], chunk["created"]) for chunk in (*chunks, last)}) == 1
    assert "usage" not in events(complete(common, stream=True).text)[0]


def test_best_of_sends_the_likeliest(app, http):
    def sample(text: str, logprob: float) -> list[Delta]:
        return [Delta(text=text, token_ids=(5,), logprobs=(logprob,), finish_reason="stop", usage=Usage(3, 1))]

    app.service.faults["ab"] = [sample("so", -2), sample("best", -0.1), sample("worst", -9), sample("good", -0.5)]
    for stream in (False, True):
        answer = complete(http, n=2, best_of=4, stream=stream)
        choices = gathered(answer.text)[0] if stream else answer.json()["choices"]
        assert [choice["text"] for choice in choices] == ["best", "good"]


def test_echo_and_logprobs_tell_of_the_prompt(common):
    choice = complete(common, prompt="你b", max_tokens=1, echo=True, logprobs=1).json()["choices"][0]
    assert choice["text"] == "你b你"
    assert choice["logprobs"] == {
        "tokens": ["<1>", "你", "b", "你"], "text_offset": [0, 0, 1, 2], "token_logprobs": [None, -0.25, -0.5, -0.5],
        "top_logprobs": [None, {"<0>": 0, "你": -0.25}, {"<0>": 0, "b": -0.5}, {"<0>": 0, "你": -0.5}]}


def test_max_tokens_of_0_tells_of_the_prompt_alone(common):
    answer = complete(common, max_tokens=0, echo=True, logprobs=0).json()
    assert answer["choices"] == [{"index": 0, "text": "ab", "finish_reason": "length", "logprobs": {
        "tokens": ["<1>", "a", "b"], "text_offset": [0, 0, 1], "token_logprobs": [None, -0.25, -0.5],
        "top_logprobs": [None, {"a": -0.25}, {"b": -0.5}]}}]
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["total_tokens"] == 3
    refused = complete(common, max_tokens=0)
    assert (refused.status_code, error_of(refused)["param"]) == (400, "max_tokens")


def test_no_sample_begins_before_the_prompt_it_echoes_is_known():
    """The engine tells of the prompt with sample 0, whatever comes first."""
    choices = _Choices(0, Prompt([BOS, 100], "a"), CompletionRequest(prompt="a", n=2, echo=True, logprobs=0),
                       CharacterTokenizer())
    assert asyncio.run(choices.told({1: Delta(text="x", token_ids=(5,), logprobs=(-1.0,))})) == []
    more = Delta(text="y", token_ids=(6,), logprobs=(-2.0,))
    told = asyncio.run(choices.told({0: dataclasses.replace(more, prompt_logprobs=(PromptLogprob(100, -3.0),))}))
    assert sorted((one["index"], one["text"], one["logprobs"]["token_logprobs"]) for one in told) == [
        (0, "ay", [None, -3.0, -2.0]), (1, "ax", [None, -3.0, -1.0])]
    assert [one["text"] for one in asyncio.run(choices.told({1: more}))] == ["y"]


def test_parts_of_characters_are_spelled_in_bytes_and_counted_when_whole():
    class Bytes(CharacterTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            return bytes([token_id])

    assert [spelled(Bytes(), i) for i in (97, 0xe4)] == ["a", r"bytes:\xe4"]
    told = CompletionLogprobs(Bytes(), "xx").of(Delta(token_ids=tuple("你a".encode()), logprobs=(0.0,) * 4))
    assert told["text_offset"] == [2, 2, 2, 3] and told["tokens"][3] == "a"


def test_a_logprob_that_json_lacks_is_the_least(app, http):
    app.service.faults["ab"] = [[Delta(
        text="a", token_ids=(100,), logprobs=(-np.inf,), top_logprobs=(((101, -np.inf),),), finish_reason="stop",
        prompt_logprobs=(PromptLogprob(5, -np.inf),) * 2, usage=Usage(3, 1))]]
    told = complete(http, logprobs=1, echo=True).json()["choices"][0]["logprobs"]
    assert told["token_logprobs"] == [None, -9999, -9999, -9999]


@pytest.mark.parametrize(("reason", "told"), [("stop", "stop"), ("length", "length"), ("deadline", "deadline"),
                                              ("content_filter", "content_filter")])
def test_finish_reasons(app, http, reason, told):
    app.service.faults["ab"] = [[Delta(text="a", token_ids=(100,), logprobs=(-1.0,), finish_reason=reason,
                                       usage=Usage(3, 1))]]
    assert complete(http).json()["choices"][0]["finish_reason"] == told


def test_the_tenant_of_an_open_server_is_the_one_that_the_request_names(app, http):
    http.post(COMPLETIONS, json={"prompt": "ab", "max_tokens": 1}, headers={"x-tenant": "one"})
    refused = http.post(COMPLETIONS, json={"prompt": "ab"}, headers={"x-tenant": "x" * 300})
    assert app.service.terms == [("one", None)]
    assert (refused.status_code, error_of(refused)["param"]) == (400, "tenant")


REFUSED = [
    ({"prompt": None}, "prompt", "2048"), ({"prompt": []}, "prompt", "2048"), ({"prompt": ["a", 5]}, "prompt", "2048"),
    ({"prompt": [-1]}, "prompt", "token ids"), ({"prompt": [[]]}, "prompt", "token ids"), ({"prompt": 5}, "prompt", ""),
    ({"prompt": "a" * 10_000}, "prompt", "9999"), ({"max_tokens": "5"}, "max_tokens", "integer"),
    ({"max_tokens": 2.5}, "max_tokens", "integer"), ({"max_tokens": True}, "max_tokens", "integer"),
    ({"max_tokens": -1}, "max_tokens", "0"), ({"max_tokens": 2**31}, "max_tokens", str(2**31 - 1)),
    ({"temperature": -1}, "temperature", "0"), ({"temperature": 101}, "temperature", "100"),
    ({"temperature": "hot"}, "temperature", "number"), ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.1}, "top_p", "1"), ({"min_p": 2}, "min_p", "1"), ({"top_k": -2}, "top_k", "-1"),
    ({"n": 0}, "n", "1"), ({"n": 65}, "n", "64"), ({"n": 3, "best_of": 2}, "best_of", "n (3)"),
    ({"best_of": 65}, "best_of", "64"), ({"prompt": ["a"] * 33, "n": 64}, "prompt", "2048"),
    ({"logprobs": 21}, "logprobs", "20"), ({"stop": ["a"] * 17}, "stop", "16"), ({"stop": ["a", ""]}, "stop[1]", "1"),
    ({"stop": [5]}, "stop[0]", "string"), ({"stop": "x" * 1025}, "stop", "1024"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", "64"), ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "0"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"), ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "300"), ({"seed": 2**64}, "seed", str(2**64 - 1)),
    ({"presence_penalty": 101}, "presence_penalty", "100"), ({"repetition_penalty": 0}, "repetition_penalty", "0"),
    ({"min_tokens": 5}, "min_tokens", "max_tokens (2)"), ({"suffix": "end"}, "suffix", "not supported"),
    ({"deadline_seconds": 0}, "deadline_seconds", "0"), ({"priority": 2**31}, "priority", str(2**31 - 1)),
    ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "guided_json"),
    ({"guided_regex": ""}, "guided_regex", "1"),
    ({"stop": ["a"] * 17}, "stop", "must have at most 16 items, not 17"),
    ({"stream_options": {}}, "stream_options", "stream"), ({"model": "other"}, "model", MODEL),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown"), ({"foo": 1}, "foo", "unknown"),
    ({"functions": []}, "functions", "unknown")]


@pytest.fixture(scope="module")
def shared():
    with running_app() as app, httpx.Client(base_url=app.url, timeout=30, verify=False) as app.http:
        yield app


@pytest.mark.parametrize(("sent", "field", "limit"), REFUSED)
def test_bad_fields_are_named_with_their_limits(shared, sent, field, limit):
    answer = complete(shared.http, **sent)
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (404 if field == "model" else 400, field)
    assert error["type"] == "invalid_request_error" and error["code"]
    assert field.partition("[")[0].partition(".")[0] in error["message"] and limit in error["message"]
    assert not shared.service.submitted


@pytest.mark.parametrize(("field", "sent", "named"), [
    ("stop_ids", {"stop_token_ids": [1]}, "stop_token_ids"), ("regex", {"guided_regex": "("}, "guided_regex"),
    ("json_schema", {"guided_json": {}}, "guided_json"), ("temperature", {}, "temperature"), (None, {}, None)])
def test_what_the_engine_refuses_is_named_as_it_was_sent(app, http, field, sent, named):
    app.service.faults["ab"] = InvalidRequest(f"{field} is bad", field)
    error = error_of(complete(http, **sent))
    assert error["param"] == named and error["message"] == f"{named or field} is bad"


def test_models(common):
    model = {"id": MODEL, "object": "model", "created": 1_700_000_000, "owned_by": "llm_jax",
             "max_model_len": 10_000, "has_chat_template": False}
    assert common.get("/v1/models").json() == {"object": "list", "data": [model]}
    assert common.get(f"/v1/models/{MODEL}").json() == model
    missing = common.get("/v1/models/gpt-4")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


def embed(http, **fields):
    return http.post("/v1/embeddings", json=fields)


@pytest.mark.parametrize(("given", "ids"), [("你", [[BOS, ord("你") + 3]]), ([7, 8], [[7, 8]]),
                                            (["a", "b"], [[BOS, 100], [BOS, 101]]), ([[7], [8, 9]], [[7], [8, 9]])])
def test_embeddings_of_texts_and_tokens(app, http, given, ids):
    answer = embed(http, input=given, model=MODEL, pooling="last", normalize=False, user="me", priority=3).json()
    assert [one["embedding"] for one in answer["data"]] == [list(map(float, one)) for one in ids]
    assert [one["index"] for one in answer["data"]] == list(range(len(ids)))
    assert answer["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
    assert [(kind, priority) for _, kind, priority in app.service.submitted] == [("last", 3)] * len(ids)


def test_embeddings_have_length_1_and_come_as_base64_if_asked_for(common):
    plain = np.array(embed(common, input="你好").json()["data"][0]["embedding"], np.float32)
    assert np.linalg.norm(plain) == pytest.approx(1)
    packed = embed(common, input="你好", encoding_format="base64").json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == plain.tolist()


def test_many_embeddings_take_turns(http):
    with running_app(FakeService(max_running=4)) as app:
        app.service.max_requests = 4
        found = embed(http, input="x").json()["data"]
        answer = http.post(f"{app.url}/v1/embeddings", json={"input": [[i] for i in range(3, 103)], "normalize": False})
    assert len(found) == 1 and [one["embedding"] for one in answer.json()["data"]] == [[i] for i in range(3, 103)]


@pytest.mark.parametrize(("sent", "field"), [
    ({}, "input"), ({"input": []}, "input"), ({"input": ["a"] * 2049}, "input"), ({"input": [["a"]]}, "input"),
    ({"input": "a" * 10_000}, "input"), ({"input": ["a", "b" * 10_000]}, "input[1]"), ({"input": "a", "n": 2}, "n"),
    ({"input": "a", "dimensions": 8}, "dimensions"), ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ({"input": "a", "model": "other"}, "model"), ({"input": "a", "pooling": "max"}, "pooling")])
def test_bad_requests_for_embeddings(shared, sent, field):
    answer = embed(shared.http, **sent)
    assert (answer.status_code, error_of(answer)["param"]) == (404 if field == "model" else 400, field)


def test_tokenize_and_back(common):
    ids = [BOS, ord("你") + 3, ord("a") + 3]
    answer = common.post("/tokenize", json={"prompt": "你a", "return_token_strs": True}).json()
    assert answer == {"count": 3, "max_model_len": 10_000, "tokens": ids, "token_strs": ["<1>", "你", "a"]}
    plain = common.post("/tokenize", json={"prompt": "你a", "add_special_tokens": False, "model": MODEL}).json()
    assert (plain["tokens"], plain["token_strs"]) == (ids[1:], None)
    assert common.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "你a"}
    assert common.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_tokenize_a_conversation_as_the_chat_template_writes_it():
    with running_app(ChatService()) as app, httpx.Client(base_url=app.url) as http:
        asked = {"messages": [{"role": "user", "content": "你好"}], "tools": [
            {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]}
        counted = http.post("/tokenize", json=asked).json()
        http.post("/v1/chat/completions", json=asked | {"max_completion_tokens": 1})
        assert counted["tokens"] == list(app.service.submitted[0][0]) and counted["count"] == len(counted["tokens"])
        without = http.post("/tokenize", json=asked | {"add_generation_prompt": False}).json()["tokens"]
        assert without == counted["tokens"][:len(without)] and len(without) < counted["count"]
        bad = http.post("/tokenize", json={"messages": [{"role": "nobody", "content": "x"}]})
        assert (bad.status_code, error_of(bad)["param"]) == (400, "messages[0].role")


def test_a_conversation_with_a_model_that_has_no_template_is_refused(common):
    answer = common.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]})
    assert answer.status_code == 400 and "chat template" in error_of(answer)["message"]


def test_a_text_that_does_not_fit_is_tokenized_all_the_same(common):
    assert common.post("/tokenize", json={"prompt": "a" * 20_000}).json()["count"] == 20_001


@pytest.mark.parametrize(("path", "sent", "field"), [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": ""}]}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"), ("/tokenize", {"messages": []}, "messages"),
    ("/detokenize", {"tokens": [0x110003]}, "tokens"), ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": [], "x": 1}, "x")])
def test_bad_requests_for_tokens(shared, path, sent, field):
    answer = shared.http.post(path, json=sent)
    assert (answer.status_code, error_of(answer)["param"]) == (400, field)


@pytest.mark.parametrize("more", [{"max_tokens": 2**31 - 1}, {"max_tokens": 2**31 - 1, "min_tokens": 2**31 - 1}])
def test_max_tokens_is_an_upper_bound_and_the_context_another(service, monkeypatch, more):
    monkeypatch.setattr(service, "close", lambda: None)
    prompt = [5] * (service.max_context - 7)
    with running_app(service) as app, httpx.Client(base_url=app.url, timeout=60) as http:
        answer = complete(http, prompt=prompt, ignore_eos=True, **more).json()
        assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 7
        assert complete(http, prompt=prompt, ignore_eos=True, max_tokens=6).json()["usage"]["completion_tokens"] == 6
        refused = complete(http, prompt=[5] * service.max_context, max_tokens=1)
        assert error_of(refused)["code"] == "context_length_exceeded"


def test_the_real_engine_says_the_same_however_it_is_asked(service, real_server, monkeypatch):
    """In one piece, as a stream, of tokens, over gRPC: greedy, seeded, stopped, constrained, with log-probabilities."""
    monkeypatch.setattr(service, "close", lambda: None)  # other tests want it, too
    assert isinstance(service.tokenizer, Tokenizer)
    cases = [{}, {"temperature": 1.0, "seed": 5, "n": 3}, {"logprobs": 3, "echo": True}, {"stop": ["e", "\n"]},
             {"guided_regex": "(ab|cd){1,5}", "temperature": 1.0, "seed": 1}, {"best_of": 4, "n": 2, "seed": 2,
                                                                               "temperature": 1.0}]
    with running_app(service) as app, httpx.Client(base_url=app.url, timeout=60) as http:
        for case in cases:
            asked = {"prompt": "def 你", "max_tokens": 24} | case
            whole = complete(http, **asked).json()["choices"]
            streamed, _ = gathered(complete(http, **asked, stream=True).text)
            ids = service.encode("def 你")
            of_tokens = complete(http, **asked | {"prompt": ids}).json()["choices"]
            assert streamed == whole == of_tokens
        with Client(real_server.address) as grpc:
            chunks = list(grpc.generate("def 你", max_tokens=24, temperature=1.0, seed=5, num_samples=3))
        of_grpc = ["".join(chunk.text for chunk in chunks if chunk.sample == i) for i in range(3)]
        of_http = complete(http, prompt="def 你", max_tokens=24, temperature=1.0, seed=5, n=3).json()["choices"]
        assert of_grpc == [choice["text"] for choice in of_http] and len(set(of_grpc)) == 3
        told = complete(http, prompt="def 你", max_tokens=24, logprobs=1, echo=True, add_special_tokens=True).json()
        told = told["choices"][0]
        for offset, token in zip(told["logprobs"]["text_offset"], told["logprobs"]["tokens"], strict=True):
            assert token.startswith(("bytes:", "<")) or told["text"][offset:].startswith(token)
        assert len(embed(http, input=["def", "你好"]).json()["data"][1]["embedding"]) == 32
        counted = http.post("/tokenize", json={"prompt": "def 你"}).json()
        assert counted["tokens"] == ids
        assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "def 你"}
