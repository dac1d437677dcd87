"""Text that arrives in pieces, read for tool calls.

A parser is a generator over characters: it stops wherever the text so far ends and goes on with the next piece, so what
it gives can't depend on how the text was cut. Nothing is given before no later character can change it, and what turns
out to be no call after all is content, as it was written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from serving.http.text_source import SPACE, Source, Step

MAX_NAME = 256  # characters of a function's name


@dataclasses.dataclass(frozen=True)
class Content:
    """Text that is no call."""

    text: str


@dataclasses.dataclass(frozen=True)
class Call:
    """The beginning of a call: its number, and the function's name."""

    index: int
    name: str


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The next piece of a call's arguments, which joined are JSON as far as the model wrote it."""

    index: int
    text: str


Event = Content | Call | Arguments


class Parser:
    """Finds the calls in one answer; a format says how they look by `_openers` and `_body`.

    White space between content and a call belongs to neither and is dropped.

    Attributes:
      count: calls that have begun.
    """

    _openers: tuple[str, ...] = ()  # none is the beginning of another

    def __init__(self, tools: Mapping[str, Mapping[str, Any]]) -> None:
        """Args: JSON schema of the parameters of each function that may be called, by its name."""
        self.tools = tools
        self.count = 0
        self._source = Source()
        self._events: list[Event] = []
        self._space = ""  # held back: a call may follow
        self._after_call = False
        self._has_arguments = False  # the last call that began
        self._steps = self._run()
        self._done = False

    def push(self, text: str) -> list[Event]:
        """What `text`, the next piece, makes certain."""
        self._source.feed(text)
        return self._resume()

    def finish(self) -> list[Event]:
        """The end of the text."""
        self._source.ended = True
        events = self._resume()
        if not self._after_call and self._space:
            events.append(Content(self._space))
        self._space = ""
        return _joined(events)

    def _resume(self) -> list[Event]:
        if not self._done:
            self._done = next(self._steps, self) is self
        if self._done and self._source.rest():
            self._content(self._source.rest())
            self._source.at = len(self._source.text)
            self._source.forget()
        events, self._events = _joined(self._events), []
        return events

    def _run(self) -> Step[None]:
        while opener := (yield from self._next_opener()):
            yield from self._try(opener)

    def _try(self, opener: str) -> Step[None]:
        """Reads what follows `opener`; if it is no call, all of it but the opener is read again."""
        source, before = self._source, self.count
        if not (yield from self._body(opener)):
            if self.count == before:
                self._content(opener)
                source.at = len(opener)
            else:
                source.at = 0
        source.forget()

    def _body(self, opener: str) -> Step[bool]:
        """Reads the call or calls behind `opener`; false if they are none (then nothing has begun) or end badly."""
        raise NotImplementedError

    def _next_opener(self) -> Step[str]:
        """Gives the content before the next opener, and reads it; "" at the end."""
        source = self._source
        while True:
            text = source.rest()
            found = [(at, opener) for opener in self._openers if (at := text.find(opener)) >= 0]
            if found:
                at, opener = min(found)
                self._content(text[:at])
                source.at += at
                source.forget()
                source.at += len(opener)
                return opener
            held = 0 if source.ended else max((_overlap(text, opener) for opener in self._openers), default=0)
            self._content(text[:len(text) - held])
            source.at += len(text) - held
            source.forget()
            if source.ended:
                return ""
            yield

    # What the formats are made of.

    def _content(self, text: str) -> None:
        text = self._space + text
        if self._after_call:
            text = text.lstrip(SPACE)
        kept = text.rstrip(SPACE)
        self._space = text[len(kept):]
        if kept:
            self._after_call = False
            self._events.append(Content(kept))

    def _begin(self, name: str) -> None:
        self._events.append(Call(self.count, name))
        self.count += 1
        self._has_arguments = False
        self._space = ""
        self._after_call = True
        self._source.forget()

    def _arguments(self, text: str) -> None:
        if text:
            self._has_arguments = True
            self._events.append(Arguments(self.count - 1, text))

    def _end(self) -> None:
        """The call that has begun is complete: without any arguments it has empty ones. One that is cut off has not."""
        if not self._has_arguments:
            self._arguments("{}")

    def _cut_off(self) -> bool:
        """The text has ended in the middle of a call: its rest is no content. For `_body` to return."""
        self._source.at = len(self._source.text)
        return True

    def _argument_value(self) -> Step[None]:
        """Reads the arguments of the call that has begun: an object, or a string that spells one."""
        source = self._source
        first = yield from source.peek()
        if first and first in "{[":
            yield from source.json_value(self._arguments)
        elif first == '"':
            self._arguments((yield from source.json_string()) or "")
        else:
            self._arguments(_spelt_out((yield from source.json_value())))
        source.forget()

    def _call_object(self, keys: frozenset[str] | None = None) -> Step[bool]:
        """Reads `{"name": …, "arguments": …}`, the keys in any order ("parameters" will do); whether a call began.

        Args:
          keys: the others that may be there; None is any. With keys, the name must be that of a known function.
        """
        source, before = self._source, self.count
        name: str | None = None
        held: str | None = None
        if not (yield from source.literal("{")):
            return False
        while True:
            yield from source.skip_space()
            key = yield from source.json_string()
            yield from source.skip_space()
            if key is None or not (yield from source.literal(":")):
                break
            yield from source.skip_space()
            if key == "name" and name is None:
                name = yield from source.json_string()
                if not name or len(name) > MAX_NAME or keys is not None and name not in self.tools:
                    break
                self._begin(name)
                if held is not None:
                    self._arguments(held)
            elif key in ("arguments", "parameters") and held is None:
                if name is None:
                    if (yield from source.peek()) == '"':
                        held = (yield from source.json_string()) or ""
                    else:
                        held = _spelt_out((yield from source.json_value()))
                else:
                    held = ""
                    yield from self._argument_value()
            elif name is None and keys is not None and key not in keys:
                break
            else:
                yield from source.json_value()
            yield from source.skip_space()
            c = yield from source.take()
            if c == "}" and self.count > before:
                self._end()
            elif c == ",":
                continue
            elif c != "}":
                source.at -= len(c)
            break
        if self.count > before:
            source.forget()
        return self.count > before

    def _typed(self, name: str, key: str, text: str) -> str:
        """A value that was written as plain text, as JSON of the type that the function's schema gives `key`."""
        properties = self.tools.get(name, {}).get("properties")
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        types = schema.get("type") if isinstance(schema, Mapping) else None
        if types != "string" and not (isinstance(types, list) and "string" in types):
            spelt = text.strip()
            spelt = {"True": "true", "False": "false", "None": "null"}.get(spelt, spelt)
            try:
                return json.dumps(json.loads(spelt, parse_constant=_refuse), ensure_ascii=False)
            except (ValueError, RecursionError):
                pass  # text after all
        return json.dumps(text, ensure_ascii=False)


def parse(parser: Parser, text: str) -> tuple[str, list[tuple[str, str]]]:
    """A whole answer: its content, and the name and arguments of each call."""
    return gathered([*parser.push(text), *parser.finish()])


def gathered(events: list[Event]) -> tuple[str, list[tuple[str, str]]]:
    """What events come to: the content, and the name and arguments of each call."""
    content: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Call(_, name):
                calls.append((name, []))
            case Arguments(index, text):
                calls[index][1].append(text)
    return "".join(content), [(name, "".join(pieces)) for name, pieces in calls]


def _joined(events: list[Event]) -> list[Event]:
    """Fewer events to the same effect."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Content) and isinstance(last, Content):
            found[-1] = Content(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and event.index == last.index:
            found[-1] = Arguments(event.index, last.text + event.text)
        else:
            found.append(event)
    return found


def _spelt_out(value: str) -> str:
    """The arguments that a value stands for; the beginning of "null" stands for none yet."""
    return "{}" if value == "null" else "" if "null".startswith(value) else value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _overlap(text: str, opener: str) -> int:
    """Length of the longest end of `text` that begins `opener`."""
    return next((n for n in range(min(len(opener) - 1, len(text)), 0, -1) if text.endswith(opener[:n])), 0)
