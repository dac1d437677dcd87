"""`/v1/responses`: items and typed events, one answer streamed and whole, what is kept and who may have it."""

from __future__ import annotations

import json

import httpx
import openai
import pydantic
import pytest

from llm_jax.inference.request import Delta
from serving.errors import Rejected
from serving.http.response_store import Kept, ResponseStore
from tests.serving.doubles import wait_until
from tests.serving.http.chat_doubles import ChatService
from tests.serving.http.conftest import MODEL, running_app

ANSWER = "你好！ I am here."
CALLS = ('我查查。\n<tool_call>\n{"name": "weather", "arguments": {"城市": "北京"}}\n</tool_call>')
TOOL = {"type": "function", "name": "weather", "description": "查天气",
        "parameters": {"type": "object", "properties": {"城市": {"type": "string"}}}, "strict": None}


@pytest.fixture(scope="module")
def running():
    with running_app(ChatService(ANSWER)) as app:
        yield app


@pytest.fixture
def service(running):
    running.service.answer = lambda prompt, sample: ANSWER
    return running.service


@pytest.fixture
def http(running):
    with httpx.Client(base_url=running.url, timeout=30) as client:
        yield client


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def says(service, text: str) -> None:
    service.answer = lambda prompt, sample: text


def events_of(http, **fields) -> list[dict]:
    with http.stream("POST", "/v1/responses", json={"stream": True} | fields) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line for line in answer.iter_lines() if line]
    assert [line.removeprefix("event: ") for line in lines[::2]] == [
        json.loads(line.removeprefix("data: "))["type"] for line in lines[1::2]]
    return [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]


def without_ids(value):
    """What two answers to the same question have in common."""
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in (
            "id", "item_id", "call_id", "created_at", "completed_at", "usage")}
    return [without_ids(one) for one in value] if isinstance(value, list) else value


def test_a_response_in_one_piece(http, service):
    body = http.post("/v1/responses", json={
        "model": MODEL, "input": "你好", "instructions": "简短。", "metadata": {"a": "b"}, "user": "我"}).json()
    assert service.prompts[-1] == ("<|im_start|>system\n简短。<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
                                   "<|im_start|>assistant\n")
    item, = body["output"]
    assert without_ids(item) == {"type": "message", "role": "assistant", "status": "completed", "content": [
        {"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}]}
    prompt = len(service.submitted[-1][0])
    assert body["usage"] == {"input_tokens": prompt, "input_tokens_details": {"cached_tokens": 2},
                             "output_tokens": len(ANSWER), "output_tokens_details": {"reasoning_tokens": 0},
                             "total_tokens": prompt + len(ANSWER)}
    said = {"object": "response", "status": "completed", "error": None, "incomplete_details": None, "model": MODEL,
            "instructions": "简短。", "metadata": {"a": "b"}, "store": True, "background": False, "user": "我",
            "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "temperature": 0.0}
    assert {name: body[name] for name in said} == said and body["id"].startswith("resp_")


def test_a_stream_tells_the_same_by_typed_events(http, service):
    for text, fields in ((ANSWER, {}), (CALLS, {"tools": [TOOL]}), ("", {})):
        says(service, text)
        whole = http.post("/v1/responses", json={"input": "你好"} | fields).json()
        events = events_of(http, input="你好", **fields)
        assert [e["sequence_number"] for e in events] == list(range(len(events)))
        assert events[0]["type"] == "response.created" and events[0]["response"]["status"] == "in_progress"
        assert events[-1]["type"] == "response.completed"
        assert without_ids(events[-1]["response"]) == without_ids(whole)
        deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
        assert "".join(deltas) == text.split("\n")[0]
        done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
        assert done == events[-1]["response"]["output"]
        assert len([e for e in events if e["type"] == "response.output_item.added"]) == len(done)


def test_events_of_a_call_come_in_order(http, service):
    says(service, CALLS)
    events = events_of(http, input="天气？", tools=[TOOL])
    kinds = [e["type"].removeprefix("response.") for e in events]
    assert [kind for i, kind in enumerate(kinds) if not i or kinds[i - 1] != kind] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed"]
    call = events[-1]["response"]["output"][1]
    assert (call["type"], call["name"], call["arguments"], call["status"]) == (
        "function_call", "weather", '{"城市": "北京"}', "completed")
    pieces = [e for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert "".join(e["delta"] for e in pieces) == call["arguments"] and {e["item_id"] for e in pieces} == {call["id"]}


def test_openais_client_goes_on_from_a_call(client, service):
    says(service, CALLS)
    first = client.responses.create(model=MODEL, input="天气？", tools=[TOOL], instructions="好")
    call = next(item for item in first.output if item.type == "function_call")
    says(service, ANSWER)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "晴"}
    second = client.responses.create(model=MODEL, previous_response_id=first.id, input=[result], tools=[TOOL])
    expected = ('<|im_start|>user\n天气？<|im_end|>\n<|im_start|>assistant\n我查查。\n<tool_call>\n{"name": "weather", '
                '"arguments": {"城市": "北京"}}\n</tool_call><|im_end|>\n<|im_start|>tool weather\n晴<|im_end|>\n'
                "<|im_start|>assistant\n")
    assert service.prompts[-1].endswith(expected) and "好<|im_end|>" not in service.prompts[-1]
    assert second.output_text == ANSWER and second.previous_response_id == first.id
    # The same conversation, sent whole, with what the client's own objects hold.
    client.responses.create(model=MODEL, tools=[TOOL], input=[
        {"role": "user", "content": [{"type": "input_text", "text": "天气？"}]},
        *[item.model_dump(exclude_none=True) for item in first.output], result])
    assert service.prompts[-1].endswith(expected)


def test_openais_client_streams_and_parses(client, service):
    class Place(pydantic.BaseModel):
        city: str

    says(service, '{"city": "北京"}')
    assert client.responses.parse(model=MODEL, input="?", text_format=Place).output_parsed == Place(city="北京")
    constraint = service.submitted[-1][1].constraint
    assert constraint.kind == "json_schema" and json.loads(constraint.text)["required"] == ["city"]
    says(service, CALLS)
    with client.responses.stream(model=MODEL, input="天气？", tools=[TOOL]) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(pieces) == final.output_text == "我查查。"
    assert final.output[1].arguments == '{"城市": "北京"}'


def test_limits_make_it_incomplete(http, service):
    body = http.post("/v1/responses", json={"input": "x", "max_output_tokens": 3}).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["content"][0]["text"] == ANSWER[:3] and body["output"][0]["status"] == "incomplete"
    events = events_of(http, input="x", max_output_tokens=3)
    assert events[-1]["type"] == "response.incomplete" and without_ids(events[-1]["response"]) == without_ids(body)


def test_logprobs(http, service):
    fields = {"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    part = http.post("/v1/responses", json=fields).json()["output"][0]["content"][0]
    assert [one["token"] for one in part["logprobs"]] == list(ANSWER)
    assert part["logprobs"][0] == {"token": "你", "logprob": -0.5, "bytes": list("你".encode()), "top_logprobs": [
        {"token": "a", "logprob": -1.0, "bytes": [97]}]}
    events = events_of(http, **fields)
    deltas = [one for e in events if e["type"] == "response.output_text.delta" for one in e["logprobs"]]
    assert deltas == part["logprobs"] == events[-1]["response"]["output"][0]["content"][0]["logprobs"]


def test_tools_are_enforced_as_in_a_chat(http, service):
    says(service, '\n{"name": "weather", "arguments": {"城市": "北京"}}\n</tool_call>')
    for choice in ("required", {"type": "function", "name": "weather"}, {
            "type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}):
        body = http.post("/v1/responses", json={"input": "x", "tools": [TOOL], "tool_choice": choice}).json()
        assert [item["type"] for item in body["output"]] == ["function_call"] and body["tool_choice"] == choice
        assert service.submitted[-1][1].constraint.kind == "grammar"
        assert service.prompts[-1].endswith("<|im_start|>assistant\n<tool_call>")


def test_what_is_kept_is_its_tenants(http, client, service):
    first = client.responses.create(model=MODEL, input="秘密", extra_headers={"x-tenant": "first"})
    for tenant, status in (("first", 200), ("other", 404), ("", 404)):
        headers = {"x-tenant": tenant}
        assert http.get(f"/v1/responses/{first.id}", headers=headers).status_code == status
        assert http.get(f"/v1/responses/{first.id}/input_items", headers=headers).status_code == status
        answer = http.post("/v1/responses", json={"input": "x", "previous_response_id": first.id}, headers=headers)
        assert answer.status_code == (200 if status == 200 else 400)
        if status != 200:
            assert answer.json()["error"]["param"] == "previous_response_id"
            assert http.delete(f"/v1/responses/{first.id}", headers=headers).status_code == 404
    assert sum("秘密" in prompt for prompt in service.prompts) == 2  # the first, and the one that went on from it


def test_get_input_items_and_delete(http, client, service):
    items = [{"role": "user", "content": f"问{i}"} for i in range(3)]
    first = client.responses.create(model=MODEL, input=items)
    assert client.responses.retrieve(first.id).output_text == ANSWER
    listed = list(client.responses.input_items.list(first.id, limit=2, order="asc"))
    assert [one.content[0].text for one in listed] == ["问0", "问1", "问2"]
    newest_first = client.responses.input_items.list(first.id, limit=2)
    assert [one.content[0].text for one in newest_first.data] == ["问2", "问1"] and newest_first.has_more
    client.responses.delete(first.id)
    for answer in (http.get(f"/v1/responses/{first.id}"), http.delete(f"/v1/responses/{first.id}")):
        assert answer.status_code == 404 and answer.json()["error"]["type"] == "invalid_request_error"
    unkept = client.responses.create(model=MODEL, input="x", store=False)
    assert http.get(f"/v1/responses/{unkept.id}").status_code == 404


def test_in_the_background(http, client, service):
    says(service, ANSWER * 20)
    first = client.responses.create(model=MODEL, input="x", background=True)
    assert first.status == "in_progress" and first.background
    assert http.post("/v1/responses", json={"input": "y", "previous_response_id": first.id}).status_code == 400
    assert wait_until(lambda: client.responses.retrieve(first.id).output_text.startswith(ANSWER))  # as far as it is
    assert wait_until(lambda: client.responses.retrieve(first.id).status == "completed")
    assert client.responses.retrieve(first.id).output_text == ANSWER * 20
    assert http.post("/v1/responses", json={"input": "y", "previous_response_id": first.id}).status_code == 200


def test_cancel(http, client, service):
    says(service, "长" * 9_000)
    first = client.responses.create(model=MODEL, input="x", background=True)
    assert wait_until(lambda: client.responses.retrieve(first.id).output_text)
    before = len(service.cancelled)
    cancelled = client.responses.cancel(first.id)
    assert cancelled.status == "cancelled" and cancelled.output_text.startswith("长")
    assert client.responses.cancel(first.id).status == client.responses.retrieve(first.id).status == "cancelled"
    assert wait_until(lambda: len(service.cancelled) == before + 1)
    second = client.responses.create(model=MODEL, input="x", background=True)
    client.responses.delete(second.id)
    assert wait_until(lambda: len(service.cancelled) == before + 2)
    assert http.get(f"/v1/responses/{second.id}").status_code == 404
    says(service, ANSWER)
    third = client.responses.create(model=MODEL, input="x")
    answer = http.post(f"/v1/responses/{third.id}/cancel")
    assert answer.status_code == 400 and "background" in answer.json()["error"]["message"]


def test_a_fault_on_the_way_is_the_last_event_and_is_kept(http, client, service, monkeypatch):
    monkeypatch.setattr(service, "_step_s", 0.3)  # between the text and the fault: merged, they would be one refusal
    prompt = "<|im_start|>user\nbreak<|im_end|>\n<|im_start|>assistant\n"
    key = "".join(chr(i - 3) for i in service.tokenizer.encode(prompt, special=True))
    service.faults[key] = [[Delta("好", (70,), (-1.0,)), Delta(finish_reason="error", error="it broke")]]
    try:
        events = events_of(http, input="break")
        assert events[-1]["type"] == "response.failed"
        failed = events[-1]["response"]
        assert failed["status"] == "failed" and failed["error"] == {"code": "internal_error", "message": "it broke"}
        assert client.responses.retrieve(failed["id"]).status == "failed"
        first = client.responses.create(model=MODEL, input="break", background=True)
        assert wait_until(lambda: client.responses.retrieve(first.id).status == "failed")
        answer = http.post("/v1/responses", json={"input": "break"})
        assert answer.status_code == 500 and answer.json()["error"]["message"] == "it broke"
    finally:
        service.faults.clear()


WRONG = [
    ("input", {"input": None}, "missing"),
    ("input", {"input": []}, "1"),
    ("input", {"input": "长" * 10_000}, "9999"),
    ("input[0]", {"input": [{"type": "item_reference", "id": "x"}]}, "function_call_output"),
    ("input[0].content", {"input": [{"role": "user"}]}, "missing"),
    ("input[0].content[0].type", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
     "input_text"),
    ("input[0].call_id", {"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "'a'"),
    ("input[0].arguments", {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]},
     "JSON"),
    ("max_output_tokens", {"max_output_tokens": 0}, "1"),
    ("previous_response_id", {"previous_response_id": "resp_x"}, "resp_x"),
    ("text.format", {"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex"),
    ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "a"}}}, "missing"),
    ("tools[0].type", {"tools": [{"type": "web_search"}]}, "function"),
    ("tool_choice", {"tool_choice": {"type": "function", "name": "f"}}, "'f'"),
    ("reasoning.effort", {"reasoning": {"effort": "high"}}, "chat template"),
    ("include[0]", {"include": ["reasoning.encrypted_content"]}, "logprobs"),
    ("stream", {"background": True, "stream": True}, "background"),
    ("store", {"background": True, "store": False}, "background"),
    ("conversation", {"conversation": "conv_1"}, "not supported"),
    ("n", {"n": 2}, "not supported"),
    ("colour", {"colour": 1}, "colour"),
]


@pytest.mark.parametrize("field, fields, named", WRONG, ids=[f"{i} {one[0]}" for i, one in enumerate(WRONG)])
def test_bad_fields_are_named(http, service, field, fields, named):
    before = len(service.submitted)
    sent = {name: value for name, value in ({"input": "x"} | fields).items() if value is not None}
    answer = http.post("/v1/responses", json=sent)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field and named in error["message"], error
    assert len(service.submitted) == before


def test_a_model_without_a_template_says_what_to_do():
    with running_app(ChatService(template=None)) as app, httpx.Client(base_url=app.url) as http:
        error = http.post("/v1/responses", json={"input": "x"}).json()["error"]
        assert error["param"] == "input" and "/v1/completions" in error["message"]


def test_the_store_is_bounded_for_each_tenant_and_in_time():
    now = [0.0]
    store = ResponseStore(kept_s=10, max_bytes=3_000, max_tenant_bytes=1_500, clock=lambda: now[0])

    def put(tenant: str, name: str, size: int = 600) -> None:
        store.put(tenant, Kept({"id": name, "x": "x" * size}, []))
        now[0] += 1

    def has(tenant: str, name: str) -> bool:
        try:
            return bool(store.get(tenant, name))
        except Rejected:
            return False

    for i in range(4):
        put("甲", f"a{i}")
    assert [has("甲", f"a{i}") for i in range(4)] == [False, False, True, True] and not has("乙", "a3")
    put("乙", "b0"), put("丙", "c0"), put("丙", "c1")  # too much for all together: the oldest goes
    assert [has("甲", "a2"), has("甲", "a3"), has("乙", "b0"), has("丙", "c1")] == [False, True, True, True]
    put("丁", "huge", 2_000)
    assert not has("丁", "huge") and len(store) == 4
    now[0] += 8
    assert [has("甲", "a3"), has("丙", "c1")] == [False, True]
    now[0] += 10
    assert not has("丙", "c1") and len(store) == 0
