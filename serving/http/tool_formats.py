"""How models write tool calls: one format a family, found by the model's chat template."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serving.http.text_source import SPACE, Step
from serving.http.tool_parsing import MAX_NAME, Parser

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class JsonInTags(Parser):
    """Hermes, Qwen 2.5 and 3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once for each call."""

    _openers = ("<tool_call>",)

    def _body(self, opener: str) -> Step[bool]:
        source = self._source
        while True:
            yield from source.skip_space()
            if not (yield from self._call_object()):
                return False
            yield from source.skip_space()
            if (yield from source.closing("</tool_call>")) or (yield from source.peek()) != "{":
                return True


class JsonList(Parser):
    """Granite and Phi 4: `<|tool_call|>[{"name": …, "arguments": {…}}, …]`."""

    _openers = ("<|tool_call|>", "<tool_call>")
    _closers = ("<|/tool_call|>", "</tool_call>")

    def _body(self, opener: str) -> Step[bool]:
        if not (yield from self._call_list()):
            return False
        yield from self._source.skip_space()
        for closer in self._closers:
            if (yield from self._source.closing(closer)):
                break
        return True

    def _call_list(self) -> Step[bool]:
        source = self._source
        yield from source.skip_space()
        if not (yield from source.literal("[")):
            return False
        while True:
            yield from source.skip_space()
            if not (yield from self._call_object()):
                return False
            yield from source.skip_space()
            if not (yield from source.literal(",")):
                yield from source.literal("]")
                return True


class Mistral(JsonList):
    """`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or since 2025 `[TOOL_CALLS]name[ARGS]{…}` for each call."""

    _openers = ("[TOOL_CALLS]",)
    _closers = ()

    def _body(self, opener: str) -> Step[bool]:
        source = self._source
        yield from source.skip_space()
        if (yield from source.peek()) == "[":
            return (yield from self._call_list())
        name = ""
        while (c := (yield from source.peek())) and c not in "[{" + SPACE and len(name) < MAX_NAME:
            name += c
            source.at += 1
        if (yield from source.literal("[CALL_ID]")):
            while (c := (yield from source.peek())).isalnum():
                source.at += 1
        yield from source.literal("[ARGS]")
        yield from source.skip_space()
        if not name or (yield from source.peek()) != "{":
            return False
        self._begin(name)
        yield from self._argument_value()
        return True


class LlamaJson(Parser):
    """Llama 3: the answer is `{"name": …, "parameters": {…}}`, more of them behind semicolons, or it is content.

    `<|python_tag|>` may stand in front. Since an answer in JSON looks much the same, a call must name a known function.
    """

    def _run(self) -> Step[None]:
        source = self._source
        start = "<|python_tag|>"
        yield from source.skip_space()
        yield from source.literal(start)
        keys = frozenset(("type", "id"))
        while True:
            yield from source.skip_space()
            if (yield from source.peek()) != "{" or not (yield from self._call_object(keys)):
                break
            source.forget()
            yield from source.skip_space()
            if not (yield from source.literal(";")):
                break
        source.at = 0


class QwenCoder(Parser):
    """Qwen3-Coder: `<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>`."""

    _openers = ("<tool_call>", "<function=")

    def _body(self, opener: str) -> Step[bool]:
        source = self._source
        if opener == "<tool_call>":
            yield from source.skip_space()
            if not (yield from source.literal("<function=")):
                return False
        name = yield from source.until(">", MAX_NAME)
        if not name or not name.strip():
            return False
        name = name.strip()
        self._begin(name)
        many = 0
        while True:
            yield from source.skip_space()
            if not (yield from source.literal("<parameter=")):
                break
            key = yield from source.until(">", MAX_NAME)
            value = None if key is None else (yield from source.until("</parameter>"))
            if key is None or value is None:
                return self._cut_off()
            value = value.removeprefix("\n").removesuffix("\n")
            self._arguments(("{" if not many else ", ") + f"{json.dumps(key, ensure_ascii=False)}: "
                            + self._typed(name, key, value))
            source.forget()
            many += 1
        ends = yield from source.literal("</function>")
        if source.ended and not ends:
            return self._cut_off()
        self._arguments("}" if many else "")
        self._end()
        yield from source.skip_space()
        if not (yield from source.literal("</tool_call>")) and source.ended:
            return self._cut_off()
        return True


class Glm(Parser):
    """GLM 4.5: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>…</tool_call>`."""

    _openers = ("<tool_call>",)

    def _body(self, opener: str) -> Step[bool]:
        source = self._source
        yield from source.skip_space()
        name = ""
        while (c := (yield from source.peek())) and c not in "<{" + SPACE and len(name) < MAX_NAME:
            name += c
            source.at += 1
        yield from source.skip_space()
        if not name or (yield from source.peek()) not in ("<", ""):
            return False
        if (yield from source.literal("</tool_call>")):
            self._begin(name)
            self._end()
            return True
        many = 0
        while (yield from source.literal("<arg_key>")):
            key = yield from source.until("</arg_key>", MAX_NAME)
            yield from source.skip_space()
            opened = key is not None and (yield from source.literal("<arg_value>"))
            value = (yield from source.until("</arg_value>")) if opened else None
            if key is None or value is None:
                return many > 0 and self._cut_off()
            key = key.strip()
            if not many:
                self._begin(name)
            self._arguments(("{" if not many else ", ") + f"{json.dumps(key, ensure_ascii=False)}: "
                            + self._typed(name, key, value))
            source.forget()
            many += 1
            yield from source.skip_space()
        if not many:
            return False
        if not (yield from source.literal("</tool_call>")) and source.ended:
            return self._cut_off()
        self._arguments("}")
        return True


class DeepSeek(Parser):
    """DeepSeek: V3 and R1 write `…function<｜tool▁sep｜>name` and a block of JSON, V3.1 `…name<｜tool▁sep｜>{…}`."""

    _openers = ("<｜tool▁calls▁begin｜>",)

    def _body(self, opener: str) -> Step[bool]:
        source = self._source
        any_call = False
        while True:
            yield from source.skip_space()
            if not (yield from source.literal("<｜tool▁call▁begin｜>")):
                yield from source.closing("<｜tool▁calls▁end｜>")
                return any_call
            name = yield from source.until("<｜tool▁sep｜>", MAX_NAME)
            if name is None:
                return False
            if (yield from source.peek()) != "{":
                name = yield from source.until("\n", MAX_NAME)
                yield from source.literal("```json")
                yield from source.skip_space()
            if not name or not name.strip() or (yield from source.peek()) != "{":
                return False
            self._begin(name.strip())
            yield from self._argument_value()
            any_call = True
            yield from source.skip_space()
            yield from source.closing("```")
            yield from source.closing("<｜tool▁call▁end｜>")
            source.forget()


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How calls that the model is made to write are spelt, around each function's name and arguments.

    Attributes:
      prompt: put behind the prompt; the model goes on from there.
      begin, between, end: before the first call, between two, behind the last.
      before_name, before_arguments, after: around the name (spelt as in a JSON string) and the arguments.
    """

    prompt: str = ""
    begin: str = ""
    before_name: str = '{"name": "'
    before_arguments: str = '", "arguments": '
    after: str = "}"
    between: str = ""
    end: str = ""


@dataclasses.dataclass(frozen=True)
class Format:
    """One way of writing tool calls.

    Attributes:
      name: as `--tool_format` has it.
      parser: made anew for each answer, with the JSON schemas of the functions' parameters by name.
      signs: texts, all of which the chat templates of such models hold.
      markers: texts of its syntax that are control tokens in some tokenizers, which decoding drops.
      spelling: of calls that are asked for; None where they are not JSON, and `PLAIN` takes their place.
      arguments_as_text: whether templates want the arguments of earlier calls as text, and not as an object.
    """

    name: str
    parser: Callable[[Mapping[str, Mapping[str, Any]]], Parser]
    signs: tuple[str, ...]
    markers: tuple[str, ...]
    spelling: Spelling | None = None
    arguments_as_text: bool = False

    def make_id(self) -> str:
        """An id for a call. Mistral's templates take nine letters and digits and nothing else."""
        return secrets.token_hex(5)[:9] if self.name == "mistral" else f"call_{secrets.token_hex(12)}"


_DEEPSEEK = tuple(f"<｜tool▁{name}｜>" for name in (
    "calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))
_LLAMA = Spelling(before_arguments='", "parameters": ', between="; ")

# The first whose signs are all there is a model's.
FORMATS = {one.name: one for one in (
    Format("deepseek", DeepSeek, ("<｜tool▁calls▁begin｜>",), _DEEPSEEK, arguments_as_text=True),
    Format("mistral", Mistral, ("[TOOL_CALLS]",), ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
           Spelling("[TOOL_CALLS]", "[", between=", ", end="]")),
    Format("qwen3_coder", QwenCoder, ("<function=", "<parameter="), ("<tool_call>", "</tool_call>")),
    Format("glm", Glm, ("<arg_key>", "<arg_value>"), (
        "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")),
    Format("granite", JsonList, ("<|tool_call|>",), ("<|tool_call|>", "<|/tool_call|>", "<tool_call>", "</tool_call>"),
           Spelling("<|tool_call|>", "[", between=", ", end="]")),
    Format("hermes", JsonInTags, ("<tool_call>",), ("<tool_call>", "</tool_call>"),
           Spelling("<tool_call>", "\n", between="\n</tool_call>\n<tool_call>\n", end="\n</tool_call>")),
    Format("llama3_json", LlamaJson, ('"parameters": ',), ("<|python_tag|>",), _LLAMA),
)}
PLAIN = dataclasses.replace(FORMATS["llama3_json"], name="plain", markers=())


def detected(templates: Sequence[str]) -> Format | None:
    """The format that a model's chat templates are written for; None if none of the known ones is."""
    source = "\n".join(templates)
    return next((one for one in FORMATS.values() if all(sign in source for sign in one.signs)), None)
