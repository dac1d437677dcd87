"""Every field that OpenAI documents is taken, or known to change nothing, or refused by its name; docs/http.md says so.

The fields are those of the `openai` package's own types, so one that a new version adds makes this fail until it is
decided what becomes of it.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import httpx
import pytest
import typing_extensions
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from tests.serving.http.chat_doubles import ChatService
from tests.serving.http.conftest import running_app
from tests.serving.http.test_app import error_of

DOCS = pathlib.Path(__file__).resolve().parents[3] / "docs" / "http.md"
STREAM = {"stream": True}
CHAT = {"messages": [{"role": "user", "content": "你好"}]}
CACHE = {"prompt_cache_key": "k", "prompt_cache_options": {"mode": "implicit", "ttl": "30m"},
         "prompt_cache_retention": "24h"}
HARMLESS = {"user": "me", "stream_options": {"include_obfuscation": False}}
IDENTITY = CACHE | HARMLESS | {"metadata": {"a": "b"}, "safety_identifier": "me", "service_tier": "auto"}
TOOL = {"type": "function", "function": {"name": "look"}}

# By path: what a request must have, the openai package's types, values that are accepted and change nothing, and values
# that are refused. All other fields are taken.
ENDPOINTS: dict[str, tuple[dict[str, Any], Any, dict[str, Any], dict[str, Any]]] = {
    "/v1/completions": (
        {"prompt": "ab"}, (completion_create_params.CompletionCreateParamsNonStreaming,
                           completion_create_params.CompletionCreateParamsStreaming),
        HARMLESS, {"suffix": "end"}),
    "/v1/chat/completions": (
        CHAT, (chat_create_params.CompletionCreateParamsNonStreaming,
               chat_create_params.CompletionCreateParamsStreaming),
        IDENTITY | {"modalities": ["text"], "store": False, "verbosity": "medium"},
        {"audio": {"format": "wav", "voice": "ash"}, "function_call": "auto", "functions": [{"name": "look"}],
         "modalities": ["text", "audio"], "moderation": {"model": "omni"},
         "prediction": {"type": "content", "content": "a"}, "service_tier": "flex", "store": True, "verbosity": "low",
         "web_search_options": {}}),
    "/v1/embeddings": (
        {"input": "ab"}, (embedding_create_params.EmbeddingCreateParams,), {"user": "me"}, {"dimensions": 8}),
    "/v1/responses": (
        {"input": "你好"}, (response_create_params.ResponseCreateParamsNonStreaming,
                          response_create_params.ResponseCreateParamsStreaming),
        IDENTITY | {"truncation": "disabled"},
        {"access_programs": {"cyber": "standard"}, "background_options": {"completion_window": "2h"},
         "context_management": [{"type": "compaction"}], "conversation": "conv_1",
         "image": {"context_compression": "auto"}, "max_tool_calls": 3, "moderation": {"model": "omni"},
         "prompt": {"id": "pmpt_1"}, "service_tier": "flex", "truncation": "auto"}),
}

# Values inside of fields that would change an answer and can't here, or that change nothing.
INSIDE = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "messages[0].content[0]"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}]}, "messages[0].content[0]"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
     "messages[0].content[0]"),
    ("/v1/chat/completions", {"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]},
     "messages[0].function_call"),
    ("/v1/chat/completions", {"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type"),
    ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": {"type": "custom", "custom": {"name": "c"}}},
     "tool_choice.type"),
    ("/v1/responses", {"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ("/v1/responses", {"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading"),
    ("/v1/responses", {"tools": [{"type": "function", "name": "f", "async": True}]}, "tools[0].async"),
    ("/v1/responses", {"tools": [{"type": "function", "name": "f", "allowed_callers": ["programmatic"]}]},
     "tools[0].allowed_callers"),
    ("/v1/responses", {"tools": [{"type": "function", "name": "f"}],
                       "tool_choice": {"type": "mcp", "server_label": "s"}}, "tool_choice.type"),
    ("/v1/responses", {"include": ["reasoning.encrypted_content"]}, "include[0]"),
    ("/v1/responses", {"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ("/v1/responses", {"reasoning": {"generate_summary": "auto"}}, "reasoning.generate_summary"),
    ("/v1/responses", {"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ("/v1/responses", {"reasoning": {"context": "all_turns"}}, "reasoning.context"),
    ("/v1/responses", {"text": {"verbosity": "low"}}, "text.verbosity"),
    ("/v1/responses", {"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
    ("/v1/responses", {"prompt_cache_options": {"comparison_response_id": "r"}},
     "prompt_cache_options.comparison_response_id"),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": "i"}]}, "input[0]"),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
     "input[0].content[0].type"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "你好", "prompt_cache_breakpoint": {"mode": "explicit"}}]}]}, None),
    ("/v1/responses", {"input": [{"role": "user", "content": [
        {"type": "input_text", "text": "你好", "prompt_cache_breakpoint": {"mode": "explicit"}}]}]}, None),
]


def documented(types: tuple[Any, ...]) -> set[str]:
    """Names of all fields of the openai package's types."""
    return {name for one in types for name in typing_extensions.get_type_hints(one)}


@pytest.fixture(scope="module")
def http():
    service = ChatService()
    service.defaults = type(service.defaults)(max_tokens=3)
    with running_app(service) as app, httpx.Client(base_url=app.url, timeout=30) as http:
        yield http


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_is_refused_is_named_and_what_is_accepted_changes_nothing(http, path):
    right, types, accepted, refused = ENDPOINTS[path]
    fields = set(http.get("/openapi.json").json()["components"]["schemas"][
        {"/v1/completions": "CompletionRequest", "/v1/chat/completions": "ChatRequest",
         "/v1/embeddings": "EmbeddingRequest", "/v1/responses": "ResponseRequest"}[path]]["properties"])
    assert documented(types) <= fields, "each is taken or refused on purpose, none only because nobody knows it"
    for name, value in refused.items():
        answer = http.post(path, json=right | {name: value})
        assert answer.status_code == 400, name
        error = error_of(answer)
        assert error["param"].partition("[")[0] == name and name in error["message"], error
        assert error["code"] != "unknown_parameter" and http.post(path, json=right | {name: None}).status_code == 200
    plain = said(http.post(path, json=right).json())
    for name, value in accepted.items():
        if name == "stream_options":
            assert http.post(path, json=right | {name: value} | STREAM).status_code == 200
            continue
        answer = http.post(path, json=right | {name: value})
        assert answer.status_code == 200, (name, answer.text)
        assert said(answer.json()) == plain


def said(answer: dict[str, Any]) -> Any:
    """What an answer says, without its ids and times."""
    if "output" in answer:
        return [part["text"] for item in answer["output"] for part in item["content"]]
    return answer.get("choices") or answer["data"]


@pytest.mark.parametrize(("path", "sent", "field"), INSIDE)
def test_what_is_inside_of_a_field_likewise(http, path, sent, field):
    answer = http.post(path, json=ENDPOINTS[path][0] | sent)
    if field is None:
        assert answer.status_code == 200, answer.text
    else:
        assert (answer.status_code, error_of(answer)["param"]) == (400, field), answer.text
        assert field in error_of(answer)["message"]


def test_the_documents_table_is_true():
    rows = {}
    for line in DOCS.read_text().splitlines():
        if line.startswith("| `/v1/") and line.count("|") == 5:
            path, *columns = [column.strip() for column in line.strip("|").split("|")]
            rows[path.strip("`")] = [set(re.findall(r"`([a-z_]+)[`:.]", column)) for column in columns]
    assert set(rows) == set(ENDPOINTS)
    for path, (_, types, accepted, refused) in ENDPOINTS.items():
        taken = documented(types) - set(accepted) - set(refused) | {"stream_options"} & documented(types)
        if path == "/v1/responses":  # it has no include_usage there
            taken.discard("stream_options")
        assert rows[path] == [taken, set(accepted), set(refused)], path
