"""Tools: shown to the template, called by the model, told as OpenAI's clients expect it, enforced where asked for."""

from __future__ import annotations

import contextlib
import json

import httpx
import openai
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.errors import UserError
from llm_jax.inference.constraints import Grammars
from llm_jax.inference.request import Constraint, Delta
from serving.http.tool_formats import FORMATS
from serving.http.tool_parsing import gathered
from serving.http.tools import Function, Toolbox, ToolSyntax
from serving.http.turn import Turn
from tests.serving.http.chat_doubles import HERMES, MISTRAL, PLAIN, ChatService, ChatTokenizer
from tests.serving.http.conftest import MODEL, running_app

PARAMETERS = {"type": "object", "properties": {"城市": {"$ref": "#/$defs/name"}, "days": {"type": "integer"}},
              "required": ["城市"], "additionalProperties": False, "$defs": {"name": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "查天气", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
CALLS = ('好的。\n<tool_call>\n{"name": "weather", "arguments": {"城市": "北京", "days": 3}}\n</tool_call>\n'
         '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
EXPECTED = [("weather", '{"城市": "北京", "days": 3}'), ("now", "{}")]
MESSAGES = [{"role": "user", "content": "北京天气如何？"}]


@contextlib.contextmanager
def talking(answer, template=HERMES, **service_options):
    """A service that gives `answer`, a plain client and OpenAI's."""
    with (running_app(ChatService(answer, template, **service_options)) as app,
          httpx.Client(base_url=app.url, timeout=30) as http,
          openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0, timeout=30) as client):
        yield app.service, http, client


@pytest.fixture(scope="module")
def hermes():
    with talking(CALLS) as found:
        yield found


def told(choice) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]


def test_calls_are_found_and_the_template_shows_the_tools(hermes):
    service, _, client = hermes
    choice = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[WEATHER, NOW]).choices[0]
    assert (choice.message.content, told(choice), choice.finish_reason) == ("好的。", EXPECTED, "tool_calls")
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == 2 and all(i.startswith("call_") for i in ids)
    assert service.submitted[-1][1].constraint is None
    shown = [json.loads(line) for line in service.prompts[-1].splitlines() if line.startswith('{"type"')]
    assert [one["function"]["name"] for one in shown] == ["weather", "now"]
    assert shown[0] == WEATHER and shown[1]["function"]["parameters"] == {"type": "object", "properties": {}}


def test_a_stream_tells_index_id_name_and_arguments(hermes):
    _, http, client = hermes
    body = {"messages": MESSAGES, "tools": [WEATHER, NOW], "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        choices = [json.loads(line[6:])["choices"][0] for line in answer.iter_lines() if line.startswith("data: {")]
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": None, "refusal": None}
    assert "".join(delta.get("content") or "" for delta in deltas) == "好的。"
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    first = [call for call in calls if "id" in call]
    assert [(c["index"], c["type"], c["function"]) for c in first] == [
        (i, "function", {"name": name, "arguments": ""}) for i, (name, _) in enumerate(EXPECTED)]
    for i, (_, arguments) in enumerate(EXPECTED):
        pieces = [c["function"]["arguments"] for c in calls if c["index"] == i]
        assert len(pieces) > 2 or i and "".join(pieces) == arguments  # it comes piece by piece
        assert "".join(pieces) == arguments
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["tool_calls"]
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=[WEATHER, NOW]) as stream:
        assert told(stream.get_final_completion().choices[0]) == EXPECTED


def test_the_conversation_goes_on_with_what_a_call_returned(hermes):
    service, _, client = hermes
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[WEATHER, NOW]).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": f"结果{i}"}
               for i, call in enumerate(first.tool_calls)]
    client.chat.completions.create(model=MODEL, messages=[*MESSAGES, first, *results], tools=[WEATHER, NOW])
    assert service.prompts[-1].endswith(
        '<|im_start|>assistant\n好的。\n<tool_call>\n{"name": "weather", "arguments": {"城市": "北京", "days": 3}}\n'
        '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool weather\n结果0<|im_end|>\n<|im_start|>tool now\n结果1<|im_end|>\n<|im_start|>assistant\n")


def test_openais_client_parses_arguments(hermes):
    class Weather(pydantic.BaseModel):
        city: str = pydantic.Field(alias="城市")
        days: int

    _, _, client = hermes
    tool = openai.pydantic_function_tool(Weather, name="weather")
    found = client.chat.completions.parse(model=MODEL, messages=MESSAGES, tools=[tool])
    assert found.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(城市="北京", days=3)


@pytest.mark.parametrize("fields, calls", [
    ({"parallel_tool_calls": False}, EXPECTED[:1]), ({"parallel_tool_calls": True}, EXPECTED),
    ({"tool_choice": "auto"}, EXPECTED)])
def test_one_call_or_several(hermes, fields, calls):
    _, _, client = hermes
    choice = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[WEATHER, NOW], **fields).choices[0]
    assert told(choice) == calls
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=[WEATHER, NOW], **fields) as stream:
        assert told(stream.get_final_completion().choices[0]) == calls


def test_without_tools_nothing_is_looked_for(hermes):
    service, _, client = hermes
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = client.chat.completions.create(model=MODEL, messages=MESSAGES, **fields).choices[0]
        assert (choice.message.content, choice.finish_reason) == (CALLS, "stop")
        assert choice.message.tool_calls is None and "查天气" not in service.prompts[-1]


def test_a_limit_in_the_middle_of_a_call(hermes):
    _, _, client = hermes
    choice = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[WEATHER], max_completion_tokens=CALLS.index("北京")).choices[0]
    assert (told(choice), choice.finish_reason) == ([("weather", '{"城市": "')], "length")


def test_control_tokens_of_the_syntax_are_seen():
    """Decoding drops them, and a call must be found all the same, wherever text lags behind tokens."""
    answer = '看看[TOOL_CALLS][{"name": "weather", "arguments": {"城市": "北京"}}]'
    control = ("[TOOL_CALLS]", "[INST]", "[/INST]", "<|bos|>")
    with talking(answer, MISTRAL, control=control) as (service, _, client):
        create = client.chat.completions.create
        choice = create(model=MODEL, messages=MESSAGES, tools=[WEATHER], stop=["看着"]).choices[0]
        assert (choice.message.content, told(choice)) == ("看看", [("weather", '{"城市": "北京"}')])
        with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=[WEATHER]) as stream:
            assert told(stream.get_final_completion().choices[0]) == told(choice)
        # Its template takes ids of nine characters and no others.
        result = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "晴"}
        create(model=MODEL, messages=[*MESSAGES, choice.message, result], tools=[WEATHER])
        assert create(model=MODEL, messages=MESSAGES).choices[0].message.content == answer.replace("[TOOL_CALLS]", "")


@settings(max_examples=100, deadline=None)
@given(st.text("a…[北", max_size=4), st.data())
def test_control_tokens_are_seen_however_tokens_and_text_are_merged(before, data):
    """A delta may bring many tokens, and their text in a later one: what stop strings might take is held back."""
    tokenizer = ChatTokenizer(MISTRAL, ("[TOOL_CALLS]",))
    syntax = ToolSyntax.of(tokenizer)
    assert list(syntax.tokens.values()) == ["[TOOL_CALLS]"]
    ids = tokenizer.encode(f'{before}[TOOL_CALLS][{{"name": "f", "arguments": {{"x": "北"}}}}]', special=True)
    text = tokenizer.decode(ids)
    cuts = data.draw(st.lists(st.tuples(st.integers(0, len(ids)), st.integers(0, len(text))), max_size=6))
    tokens_at, text_at = sorted(a for a, _ in cuts), sorted(b for _, b in cuts)
    turn, events, token, told = Turn(tokenizer, Toolbox(syntax, (Function("f"),))), [], 0, 0
    for next_token, next_text in [*zip(tokens_at, text_at, strict=True), (len(ids), len(text))]:
        next_text = max(told, min(next_text, len(tokenizer.decode(ids[:next_token]))))  # text is never ahead of tokens
        if next_token == len(ids):
            next_text = len(text)
        events += turn.push(Delta(text[told:next_text], tuple(ids[token:next_token])))
        token, told = next_token, next_text
    events += turn.push(Delta(finish_reason="stop"))
    assert gathered(events) == (before, [("f", '{"x": "北"}')]) and turn.finish_reason == "tool_calls"


@pytest.mark.parametrize("choice, calls", [
    ("required", EXPECTED), ({"type": "function", "function": {"name": "weather"}}, EXPECTED[:1]),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
        {"type": "function", "function": {"name": "weather"}}]}}, EXPECTED[:1])])
def test_calls_that_must_come_are_begun_in_the_prompt_and_held_to_a_grammar(choice, calls):
    answer = CALLS.removeprefix("好的。\n<tool_call>") if len(calls) > 1 else (
        '\n{"name": "weather", "arguments": {"城市": "北京", "days": 3}}\n</tool_call>')
    with talking(answer) as (service, _, client):
        fields = {"model": MODEL, "messages": MESSAGES, "tools": [WEATHER, NOW], "tool_choice": choice}
        found = client.chat.completions.create(**fields).choices[0]
        assert (found.message.content, told(found), found.finish_reason) == (None, calls, "tool_calls")
        assert service.prompts[-1].endswith("<|im_start|>assistant\n<tool_call>") and "查天气" in service.prompts[-1]
        assert service.submitted[-1][1].constraint.kind == "grammar"
        with client.chat.completions.stream(**fields) as stream:
            assert told(stream.get_final_completion().choices[0]) == calls


WRONG = [
    ("tools", {"tools": [WEATHER, WEATHER]}, "twice"),
    ("tools", {"tools": []}, "1"),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "pattern"),
    ("tools[0].function.colour", {"tools": [{"type": "function", "function": {"name": "a", "colour": 1}}]}, "colour"),
    ("tools[0].type", {"tools": [{"type": "custom"}]}, "function"),
    ("tool_choice", {"tool_choice": "required"}, "no tools"),
    ("tool_choice", {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "'f'"),
    ("tools", {"tools": [NOW], "guided_regex": "a"}, "guided_regex"),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {
        "description": "长" * 100_000}}}], "tool_choice": "required"}, "100000"),
]


@pytest.mark.parametrize("field, fields, named", WRONG, ids=[f"{i} {one[0]}" for i, one in enumerate(WRONG)])
def test_bad_fields_are_named(hermes, field, fields, named):
    service, http, _ = hermes
    before = len(service.submitted)
    answer = http.post("/v1/chat/completions", json={"messages": MESSAGES} | fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field and named in error["message"], error
    assert len(service.submitted) == before


def test_a_template_without_tools_says_so():
    with talking("x", PLAIN) as (_, http, _):
        answer = http.post("/v1/chat/completions", json={"messages": MESSAGES, "tools": [NOW]})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"
        assert "hermes" in answer.json()["error"]["message"]


def test_the_operator_may_name_the_format():
    unknown = PLAIN + "{{ tools | tojson }}"
    tokenizer = ChatService(template=unknown).tokenizer
    assert ToolSyntax.of(tokenizer) is None and ToolSyntax.of(tokenizer, "glm").format is FORMATS["glm"]
    with pytest.raises(UserError, match="tool_format must be one of .*hermes"):
        ToolSyntax.of(tokenizer, "xml")


# The grammars, followed by the engine's own matcher.

@pytest.fixture(scope="module")
def grammars():
    class Bytes:
        vocab_size, end_ids, special_ids, stripped_spaces = 257, (256,), frozenset((256,)), 0

        def token_bytes(self, i: int) -> bytes:
            return bytes([i]) if i < 256 else b""

    return Grammars(Bytes(), 257)


def belongs(grammars, constraint: Constraint, text: str) -> bool:
    """Whether `text` is a whole completion under the constraint."""
    matcher = grammars.matcher(constraint)
    for byte in [*text.encode(), 256]:
        mask = matcher.mask()
        if not mask[byte >> 5] >> (byte & 31) & 1:
            return False
        matcher.accept(byte)
    return True


FUNCTIONS = (Function("weather", "查天气", PARAMETERS, strict=True), Function("now"))
GOOD, BAD = '{"城市": "北京"}', '{"days": "3"}'


def spelled(one, arguments: str) -> str:
    spelling = (one.spelling or FORMATS["llama3_json"].spelling)
    return spelling.begin + spelling.before_name + "weather" + spelling.before_arguments + arguments + spelling.after


@pytest.mark.parametrize("one", FORMATS.values(), ids=FORMATS)
def test_required_calls_follow_the_schema_in_every_format(grammars, one):
    for choice in ("required", "weather"):
        toolbox = Toolbox(ToolSyntax(one, {}), FUNCTIONS, choice)
        end, constraint = toolbox.format.spelling.end, toolbox.constraint()
        good = spelled(one, GOOD) + end
        assert belongs(grammars, constraint, good) and not belongs(grammars, constraint, spelled(one, BAD) + end)
        assert not belongs(grammars, constraint, "hello") and not belongs(grammars, constraint, "")
        turn = Turn(None, toolbox)
        assert gathered(turn.push(Delta(good, finish_reason="stop"))) == ("", [("weather", GOOD)])
        two = spelled(one, GOOD) + toolbox.format.spelling.between + spelled(one, GOOD).removeprefix(
            toolbox.format.spelling.begin) + end
        assert belongs(grammars, constraint, two) == (choice == "required")


@pytest.mark.parametrize("kind", ["hermes", "mistral", "llama3_json"])
def test_a_strict_function_is_held_to_its_schema_where_the_model_may_answer(grammars, kind):
    one = FORMATS[kind]
    constraint = Toolbox(ToolSyntax(one, {}), FUNCTIONS).constraint()
    opener, end = one.spelling.prompt, one.spelling.end
    for text in ("", "你好", "a {b} <c>", f"{opener}{spelled(one, GOOD)}{end}"):
        assert belongs(grammars, constraint, text), text
    assert not belongs(grammars, constraint, f"{opener}{spelled(one, BAD)}{end}")
    if opener:
        assert belongs(grammars, constraint, f"好 {opener}{spelled(one, GOOD)}{end} 再见")
        assert not belongs(grammars, constraint, f"好 {opener}{spelled(one, BAD)}{end}")
    loose = [Function(f.name, f.description, f.parameters) for f in FUNCTIONS]
    assert Toolbox(ToolSyntax(one, {}), tuple(loose)).constraint() is None
    # No grammar can tell what follows a control token, which is no text.
    assert not opener or Toolbox(ToolSyntax(one, {5: opener}), FUNCTIONS).constraint() is None


@pytest.mark.parametrize("kind", ["hermes", "mistral", "llama3_json"])
def test_calls_or_an_answer_of_a_schema(grammars, kind):
    one = FORMATS[kind]
    answer = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    constraint = Toolbox(ToolSyntax(one, {}), FUNCTIONS).constraint(answer)
    for text in ('{"a": 3}', '{"a": 3, "name": "weather"}',
                 f"{one.spelling.prompt}{spelled(one, GOOD)}{one.spelling.end}"):
        assert belongs(grammars, constraint, text), text
    assert not belongs(grammars, constraint, "hello") and not belongs(grammars, constraint, '{"b": 3}')
