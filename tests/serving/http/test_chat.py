"""`/v1/chat/completions`: the template's prompt, the same answer streamed and whole, and every field's meaning."""

from __future__ import annotations

import json

import httpx
import openai
import pydantic
import pytest

from llm_jax.inference.request import QueueFull
from tests.serving.doubles import Left, wait_until
from tests.serving.http.chat_doubles import PLAIN, ChatService
from tests.serving.http.conftest import MODEL, running_app

ANSWER = "你好！ I am here.\n"
MESSAGES = [{"role": "system", "content": "简短。"},
            {"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]}]
PROMPT = "<|im_start|>system\n简短。<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def service():
    return ChatService(ANSWER)


@pytest.fixture(scope="module")
def running(service):
    with running_app(service) as app:
        yield app


@pytest.fixture
def http(running):
    with httpx.Client(base_url=running.url, timeout=30) as client:
        yield client


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def ask(http, **fields):
    return http.post("/v1/chat/completions", json={"messages": MESSAGES} | fields)


def streamed(http, **fields) -> list[dict]:
    """The events of a stream, which must end with [DONE]."""
    with http.stream("POST", "/v1/chat/completions", json={"messages": MESSAGES, "stream": True} | fields) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_an_answer_in_one_piece(http, service):
    body = ask(http, model=MODEL, max_completion_tokens=100).json()
    assert service.prompts[-1] == PROMPT
    choice, = body.pop("choices")
    assert choice == {"index": 0, "message": {"role": "assistant", "content": ANSWER, "refusal": None},
                      "logprobs": None, "finish_reason": "stop"}
    assert body.pop("id").startswith("chatcmpl-") and body.pop("created") > 1_700_000_000
    assert body == {"object": "chat.completion", "model": MODEL, "usage": {
        "prompt_tokens": len(service.submitted[-1][0]), "completion_tokens": len(ANSWER),
        "total_tokens": len(service.submitted[-1][0]) + len(ANSWER), "prompt_tokens_details": {"cached_tokens": 2}}}


def test_a_stream_says_the_same(http):
    events = streamed(http, n=2, stream_options={"include_usage": True})
    *chunks, last = events
    assert {(e["id"], e["object"], e["model"]) for e in events} == {(last["id"], "chat.completion.chunk", MODEL)}
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 2 * len(ANSWER)
    for i in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == i]
        assert mine[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert "".join(one["delta"].get("content") or "" for one in mine) == ANSWER
        assert [one["finish_reason"] for one in mine if one["finish_reason"]] == ["stop"] and mine[-1]["delta"] == {}
    assert all(chunk["usage"] is None for chunk in chunks) and "usage" not in streamed(http)[0]


def test_openais_client_talks(client):
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=2, seed=3)
    assert [choice.message.content for choice in whole.choices] == [ANSWER] * 2
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert len(pieces) > 1 and "".join(pieces) == final.choices[0].message.content == ANSWER
    # What was said comes back as the client's own objects have it.
    client.chat.completions.create(model=MODEL, messages=[
        *MESSAGES, whole.choices[0].message.model_dump(), {"role": "user", "content": "再见"}])


def test_limits_end_it_early(http, service):
    choice = ask(http, max_completion_tokens=3).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER[:3], "length")
    choice = ask(http, max_tokens=100, stop=["am"]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("你好！ I ", "stop")
    ask(http)
    assert service.submitted[-1][1].max_tokens == service.max_context - len(service.submitted[-1][0])


def test_sampling_fields_reach_the_engine(http, service):
    ask(http, temperature=0.5, top_p=0.9, seed=7, presence_penalty=1, frequency_penalty=-1, logit_bias={"70": 5},
        top_k=4, min_p=0.1, repetition_penalty=1.5, stop_token_ids=[9], min_tokens=2, ignore_eos=True, priority=3,
        deadline_seconds=60, max_tokens=5, user="我", metadata={"a": "b"}, store=False, service_tier="auto")
    _, params, priority = service.submitted[-1]
    assert priority == 3 and service.terms[-1][1] == Left(60)
    assert (params.temperature, params.top_p, params.seed, params.presence_penalty, params.frequency_penalty,
            params.logit_bias, params.top_k, params.min_p, params.repetition_penalty, params.stop_ids,
            params.min_tokens, params.ignore_eos, params.max_tokens) == (
                0.5, 0.9, 7, 1, -1, ((70, 5.0),), 4, 0.1, 1.5, (9,), 2, True, 5)


def test_logprobs_are_of_the_tokens_streamed_and_whole(http):
    whole = ask(http, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in whole] == list(ANSWER)
    assert whole[0] == {"token": "你", "logprob": -0.5, "bytes": list("你".encode()), "top_logprobs": [
        {"token": "a", "logprob": -1.0, "bytes": [97]}, {"token": "b", "logprob": -2.0, "bytes": [98]}]}
    pieces = [e["choices"][0] for e in streamed(http, logprobs=True, top_logprobs=2)]
    assert [one for piece in pieces if piece["logprobs"] for one in piece["logprobs"]["content"]] == whole
    assert ask(http, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert ask(http).json()["choices"][0]["logprobs"] is None


SCHEMA = {"type": "object", "properties": {"城市": {"type": "string"}}, "required": ["城市"]}


@pytest.mark.parametrize("asked, constraint", [
    ({"type": "text"}, None), ({"type": "json_object"}, {"type": "object"}),
    ({"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}, SCHEMA)])
def test_response_format_is_enforced(http, service, asked, constraint):
    assert ask(http, response_format=asked).status_code == 200
    found = service.submitted[-1][1].constraint
    assert (found and (found.kind, json.loads(found.text))) == (constraint and ("json_schema", constraint))


def test_openais_client_parses_an_answer():
    class Place(pydantic.BaseModel):
        city: str

    with (running_app(ChatService('{"city": "北京"}')) as app,
          openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as client):
        found = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Place)
        assert found.choices[0].message.parsed == Place(city="北京")
        assert json.loads(app.service.submitted[-1][1].constraint.text)["required"] == ["city"]
        with client.chat.completions.stream(model=MODEL, messages=MESSAGES, response_format=Place) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == Place(city="北京")


def test_what_the_template_reads(http, service):
    ask(http, chat_template_kwargs={"enable_thinking": False})
    assert service.prompts[-1] == PROMPT + "<think></think>"
    ask(http, messages=[{"role": "developer", "content": "x", "name": "boss"}, {"role": "user", "content": "<tag>"}])
    assert service.prompts[-1].startswith("<|im_start|>system boss\nx<|im_end|>\n<|im_start|>user\n<tag><|im_end|>")


# Field at fault, what is sent, what the message names.
WRONG = [
    ("messages", {"messages": []}, "1"),
    ("messages", {"messages": None}, "list"),
    ("messages[0].role", {"messages": [{"role": "robot", "content": "x"}]}, "'assistant'"),
    ("messages[0].role", {"messages": [{"content": "x"}]}, "missing"),
    ("messages[0].content", {"messages": [{"role": "user"}]}, "content"),
    ("messages[0].content", {"messages": [{"role": "assistant"}]}, "tool_calls"),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
    ("messages[0].tool_call_id", {"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "'a'"),
    ("messages[0].tool_calls[0].function.arguments", {"messages": [{"role": "assistant", "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[1"}}]}]}, "JSON object"),
    ("temperature", {"temperature": -1}, "0"),
    ("n", {"n": 65}, "64"),
    ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ("max_completion_tokens", {"max_completion_tokens": 0}, "1"),
    ("min_tokens", {"min_tokens": 5, "max_completion_tokens": 2}, "max_tokens"),
    ("top_logprobs", {"top_logprobs": 2}, "logprobs"),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}, "20"),
    ("stream_options", {"stream_options": {"include_usage": True}}, "stream"),
    ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}, "guided_regex": "a"},
     "guided_regex"),
    ("response_format.json_schema.name", {"response_format": {"type": "json_schema", "json_schema": {
        "name": "a b", "schema": {}}}}, "pattern"),
    ("response_format.type", {"response_format": {"type": "xml"}}, "json_schema"),
    ("chat_template_kwargs", {"chat_template_kwargs": {"template": "x"}}, "template"),
    ("reasoning_effort", {"reasoning_effort": "low"}, "chat template"),
    ("functions", {"functions": []}, "not supported"),
    ("colour", {"colour": 3}, "colour"),
    ("store", {"store": True}, "False"),
    ("model", {"model": "other"}, MODEL),
]


@pytest.mark.parametrize("field, fields, named", WRONG, ids=[f"{i} {one[0]}" for i, one in enumerate(WRONG)])
def test_bad_fields_are_named(http, service, field, fields, named):
    before = len(service.submitted)
    for stream in ({}, {} if "stream_options" in fields else {"stream": True}):
        answer = ask(http, **fields, **stream)
        error = answer.json()["error"]
        assert answer.status_code == (404 if field == "model" else 400)
        assert error["type"] == "invalid_request_error" and error["param"] == field and named in error["message"], error
    assert len(service.submitted) == before


def test_too_long_a_conversation_is_refused_by_its_own_name(http):
    error = ask(http, messages=[{"role": "user", "content": "长" * 10_000}]).json()["error"]
    assert error["param"] == "messages" and "9999" in error["message"]
    assert error["code"] == "context_length_exceeded"


def test_a_full_queue_is_told_before_the_stream_begins(http, service):
    service.faults["".join(chr(i - 3) for i in service.tokenizer.encode(PROMPT, special=True))] = QueueFull("full")
    try:
        for stream in (False, True):
            answer = ask(http, stream=stream)
            assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
    finally:
        service.faults.clear()


def test_a_model_without_a_template_says_what_to_do():
    with running_app(ChatService(template=None)) as app, httpx.Client(base_url=app.url) as http:
        answer = ask(http)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
        assert "/v1/completions" in answer.json()["error"]["message"]
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_what_a_template_refuses_is_the_requests_fault_and_names_no_file():
    template = PLAIN + "{{ raise_exception('roles must alternate') }}"
    with running_app(ChatService(template=template)) as app, httpx.Client(base_url=app.url) as http:
        answer = ask(http)
        message = answer.json()["error"]["message"]
        assert answer.status_code == 400 and "roles must alternate" in message and "secret" not in message


def test_effort_is_the_templates_own_variable():
    template = PLAIN + "{{ reasoning_effort | default('none said') }}"
    with running_app(ChatService(template=template)) as app, httpx.Client(base_url=app.url) as http:
        assert ask(http, reasoning_effort="high").status_code == 200
        assert app.service.prompts[-1].endswith("assistant: high")


def test_a_client_that_leaves_frees_the_engine(http, service):
    service.answer = lambda prompt, sample: "说" * 9_000
    try:
        before = len(service.cancelled)
        with http.stream("POST", "/v1/chat/completions", json={"messages": MESSAGES, "stream": True}) as answer:
            next(answer.iter_lines())
        assert wait_until(lambda: len(service.cancelled) == before + 1)
    finally:
        service.answer = lambda prompt, sample: ANSWER


def test_the_document_describes_it(http):
    document = http.get("/openapi.json").json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert {"messages", "tools", "top_k", "response_format"} <= set(
        document["components"]["schemas"]["ChatRequest"]["properties"])


def test_the_template_is_the_models_own():
    with running_app(ChatService("ok", template=PLAIN)) as app, httpx.Client(base_url=app.url) as http:
        assert ask(http).json()["choices"][0]["message"]["content"] == "ok"
        assert app.service.prompts == ["system: 简短。\nuser: 你好\nassistant: "]
