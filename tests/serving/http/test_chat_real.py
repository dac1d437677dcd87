"""A real engine of random weights can say nothing but what a chat's tools and formats ask for."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from tests.serving.doubles import wait_until
from tests.serving.http.chat_doubles import PLAIN
from tests.serving.http.conftest import MODEL, RunningApp

TEMPLATE = PLAIN + "{% if tools %}{{ tools | length }} <tool_call>{% endif %}"
SCHEMA = {"type": "object", "properties": {"天": {"type": "integer", "minimum": 1, "maximum": 40},
                                           "unit": {"enum": ["度", "K"]}},
          "required": ["天", "unit"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "climate")]
MESSAGES = [{"role": "user", "content": "def main"}]


@pytest.fixture(scope="module")
def client(service):
    service.tokenizer.files.contents["chat_template.jinja"] = TEMPLATE.encode()
    running = RunningApp(service, MODEL, {}, {})
    try:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
            yield found
    finally:
        running.stop()
        del service.tokenizer.files.contents["chat_template.jinja"]
    assert wait_until(lambda: not any(service.stats()[name] for name in ("pages_used", "running", "waiting")))


def fits(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"天", "unit"} and 1 <= value["天"] <= 40 and value["unit"] in ("度", "K")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "climate"}}])
def test_calls_that_must_come_do_come_and_follow_their_schema(client, choice):
    for seed in range(4):
        fields = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "temperature": 1,
                  "seed": seed, "max_completion_tokens": 300}
        found = client.chat.completions.create(**fields, parallel_tool_calls=False).choices[0]
        call, = found.message.tool_calls
        assert found.finish_reason == "tool_calls" and fits(call.function.arguments)
        assert call.function.name in (("weather", "climate") if choice == "required" else ("climate",))
        with client.chat.completions.stream(**fields, parallel_tool_calls=False) as stream:
            again, = stream.get_final_completion().choices[0].message.tool_calls
        assert again.function.arguments == call.function.arguments  # the same seed, streamed


def test_an_answer_follows_its_schema_in_both_interfaces(client):
    for seed in range(3):
        asked = {"name": "weather", "schema": SCHEMA, "strict": True}
        chat = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, seed=seed, temperature=1, max_completion_tokens=200,
            response_format={"type": "json_schema", "json_schema": asked}).choices[0].message.content
        assert fits(chat)
        response = client.responses.create(
            model=MODEL, input="def main", temperature=1, max_output_tokens=200, extra_body={"seed": seed},
            text={"format": {"type": "json_schema", **asked}})
        assert response.output_text == chat and response.status == "completed"


def test_free_text_is_the_same_streamed_and_whole_in_both_interfaces(client):
    fields = {"model": MODEL, "temperature": 1, "extra_body": {"ignore_eos": True, "seed": 5}}
    whole = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=60, **fields)
    stream = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=60, stream=True, **fields)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    response = client.responses.create(input="def main", max_output_tokens=60, **fields)
    events = client.responses.create(input="def main", max_output_tokens=60, stream=True, **fields)
    pieces = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.choices[0].message.content == response.output_text == pieces
    assert whole.usage.completion_tokens == response.usage.output_tokens == 60


def test_a_schema_that_cannot_be_is_named(client):
    url = str(client.base_url)
    with httpx.Client(base_url=url, timeout=30) as http:
        error = http.post("chat/completions", json={"messages": MESSAGES, "response_format": {
            "type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "牛"}}}}).json()["error"]
        assert error["param"] == "response_format" and "schema" in error["message"]
        error = http.post("chat/completions", json={"messages": MESSAGES, "tool_choice": "required", "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/$defs/none"}}}]}).json()["error"]
        assert error["param"] == "tools"
