"""Tool calls are found in each family's text, however it is cut, and what is no call stays what it was."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.http.tool_formats import FORMATS, PLAIN, detected
from serving.http.tool_parsing import Content, gathered, parse

CITY = {"type": "object", "properties": {"城市": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = {"weather": CITY, "now": {}}
HELD = '{"城市": "北京 \\"旧\\" {[", "days": [3, {"a": "}"}]}'
PAIR = [("weather", HELD), ("now", "{}")]

# Format, text, its content, its calls.
EXAMPLES = {
    "hermes": ("hermes", f'好的。\n\n<tool_call>\n{{"name": "weather", "arguments": {HELD}}}\n</tool_call>\n'
               '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "好的。", PAIR),
    "hermes, keys turned round, no end": (
        "hermes", f'<tool_call>{{"id": 1, "arguments": {HELD} , "name":"weather"}}', "", PAIR[:1]),
    "hermes, no arguments; text behind": (
        "hermes", '<tool_call>{"name": "now"}</tool_call>\n再见 ', "再见 ", PAIR[1:]),
    "hermes, arguments as text": (
        "hermes", '<tool_call>{"name": "weather", "arguments": "{\\"days\\": 1}"}</tool_call>', "",
        [("weather", '{"days": 1}')]),
    "hermes, two in one": (
        "hermes", '<tool_call>{"name": "now", "arguments": null}\n{"name": "now", "parameters": {}}</tool_call>', "",
        [("now", "{}")] * 2),
    "llama": ("llama3_json", f'{{"name": "weather", "parameters": {HELD}}}; {{"name": "now", "parameters": {{}}}}', "",
              PAIR),
    "llama with its tag": (
        "llama3_json", f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {HELD}}}', "", PAIR[:1]),
    "mistral": ("mistral", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {HELD}}}, {{"arguments": {{}}, '
                '"name": "now"}]', "", PAIR),
    "mistral since 2025": (
        "mistral", f"我看看 [TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{HELD}[TOOL_CALLS]now[ARGS]{{}}",
        "我看看", PAIR),
    "granite": ("granite", f'<|tool_call|>[{{"name": "weather", "arguments": {HELD}}}, {{"name": "now", "arguments": '
                '{}}]', "", PAIR),
    "phi": ("granite", f'<|tool_call|>[{{"name": "weather", "arguments": {HELD}}}]<|/tool_call|>', "", PAIR[:1]),
    "qwen coder": (
        "qwen3_coder", "查一下\n<tool_call>\n<function=weather>\n<parameter=城市>\n12\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n<parameter=more>\n{'a'}\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n"
        "</function>\n</tool_call>", "查一下",
        [("weather", '{"城市": "12", "days": 3, "more": "{\'a\'}"}'), ("now", "{}")]),
    "glm": ("glm", "<tool_call>weather\n<arg_key>城市</arg_key>\n<arg_value>北京</arg_value>\n<arg_key>days</arg_key>\n"
            "<arg_value>True</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>", "",
            [("weather", '{"城市": "北京", "days": true}'), ("now", "{}")]),
    "deepseek v3": (
        "deepseek", "行<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n" + HELD
        + "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "行", PAIR),
    "deepseek v3.1": (
        "deepseek", f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{HELD}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "", PAIR),
}

# Text that is no call, or stops being one: nothing of it may be lost.
NO_CALLS = [
    ("hermes", "<tool_call>"), ("hermes", " <tool_call>\n{'name': 'f'}</tool_call> x"), ("hermes", "a <tool_call"),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'), ("hermes", '{"name": "now", "arguments": {}}'),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'), ("hermes", " \n 你好 \n\n"), ("hermes", ""),
    ("llama3_json", '{"name": "Ann", "parameters": {}}'), ("llama3_json", '{"answer": [1, 2]}'),
    ("llama3_json", '  {"name"'), ("llama3_json", 'See {"name": "now", "parameters": {}}'),
    ("llama3_json", "<|python_tag|>print(1)"), ("mistral", "[TOOL_CALLS]"), ("mistral", "[TOOL_CALLS] [1]"),
    ("mistral", "[TOOL_CALLS]now[ARGS]3"), ("granite", "<|tool_call|>[]"), ("qwen3_coder", "<tool_call>\n<function=\n"),
    ("glm", "<tool_call>now and then"), ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>x"),
]


def _cut(parser, text: str, places: list[int]):
    """What `parser` gives for the text in pieces."""
    bounds = [0, *sorted(places), len(text)]
    events = [event for start, end in zip(bounds, bounds[1:], strict=False) for event in parser.push(text[start:end])]
    return gathered(events + parser.finish())


@pytest.mark.parametrize("kind, text, content, calls", EXAMPLES.values(), ids=EXAMPLES)
def test_calls_of_each_family(kind, text, content, calls):
    assert parse(FORMATS[kind].parser(TOOLS), text) == (content, calls)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("kind, text", NO_CALLS)
def test_what_is_no_call_is_content_as_it_was_written(kind, text):
    assert parse(FORMATS[kind].parser(TOOLS), text) == (text, [])
    assert _cut(FORMATS[kind].parser(TOOLS), text, list(range(len(text)))) == (text, [])


@pytest.mark.parametrize("kind, text, content, calls", EXAMPLES.values(), ids=EXAMPLES)
def test_character_by_character_and_cut_off_anywhere(kind, text, content, calls):
    """Every character alone gives the same; a text that ends early has no other calls, and whole arguments only once
    the model had written them to their end. A marker that is cut off behind the last call is no content."""
    assert _cut(FORMATS[kind].parser(TOOLS), text, list(range(len(text)))) == (content, calls)
    for end in range(len(text)):
        whole = parse(FORMATS[kind].parser(TOOLS), text[:end])
        assert whole == _cut(FORMATS[kind].parser(TOOLS), text[:end], list(range(end)))
        for (name, arguments), (real_name, real_arguments) in zip(whole[1], calls, strict=False):
            assert name == real_name and real_arguments.startswith(arguments)
        if whole[1] == calls:
            assert content.startswith(whole[0]), text[:end]


_SNIPPETS = st.sampled_from([
    *(piece for one in FORMATS.values() for piece in (*one.markers, *one.signs)), "[TOOL_CALLS]", "<function=", ">",
    "{", "}", "[", "]", '"', "\\", ":", ", ", "; ", "\n", " ", '"name": ', '"arguments": ', '"parameters": ',
    '"weather"',
    "weather", "now", "{}", "null", "3", "<parameter=a>", "</parameter>", "</function>", "```json\n", "```", "ü",
    "北京", '{"name": "now", "arguments": {}}', '{"name": "weather", "parameters": {"days": 3}}', "\\ud800"])


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([*FORMATS.values(), PLAIN]), st.lists(_SNIPPETS | st.text(max_size=3), max_size=14), st.data())
def test_any_cut_of_any_text_gives_the_same(one, snippets, data):
    text = "".join(snippets)
    expected = parse(one.parser(TOOLS), text)
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert _cut(one.parser(TOOLS), text, places) == expected
    assert _cut(one.parser(TOOLS), text, list(range(len(text)))) == expected
    if not expected[1]:
        assert expected[0] == text


def test_content_and_arguments_are_given_as_they_come():
    parser = FORMATS["hermes"].parser(TOOLS)
    assert parser.push("Hello wor") == [Content("Hello wor")]
    assert parser.push("ld <tool") == [Content("ld")]
    assert parser.push("box>") == [Content(" <toolbox>")]
    assert [*map(str, parser.push('<tool_call>{"name": "weather", "arguments": {"da'))] == [
        "Call(index=0, name='weather')", "Arguments(index=0, text='{\"da')"]
    assert [*map(str, parser.push('ys": 1'))] == ["Arguments(index=0, text='ys\": 1')"]


def test_a_format_is_known_by_the_template():
    found = {name: detected([f"{{% if tools %}}{' '.join(one.signs)}{{% endif %}}"]) for name, one in FORMATS.items()}
    assert {name: one.name for name, one in found.items()} == {name: name for name in FORMATS}
    assert detected(["{% for m in messages %}{{ m.content }}{% endfor %}"]) is None


def test_long_answers_are_read_in_linear_time():
    """A megabyte of arguments, and of text that keeps beginning a call, in pieces of a few characters."""
    parser = FORMATS["hermes"].parser(TOOLS)
    count = 0
    for piece in ['<tool_call>{"name": "now", "arguments": {"x": "', *["abcd"] * 50_000, '"}}</tool_call>',
                  *["<tool_"] * 50_000]:
        count += sum(len(getattr(event, "text", "")) for event in parser.push(piece))
    parser.finish()
    assert count > 400_000
