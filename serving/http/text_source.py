"""Text that is read while it arrives: every reader is a generator, which stops where the text ends for now."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import TypeVar

SPACE = " \t\r\n"
_T = TypeVar("_T")
Step = Generator[None, None, _T]  # to be resumed when there is more text


class Source:
    """The text from the last `forget` on.

    Attributes:
      text: what has arrived since then.
      at: how much of it was read; setting it back reads it again.
      ended: whether nothing more will come.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False

    def feed(self, piece: str) -> None:
        self.text += piece

    def forget(self) -> None:
        """What was read will not be asked for again. Positions count from here."""
        self.text = self.text[self.at:]
        self.at = 0

    def rest(self) -> str:
        """What has arrived and was not read."""
        return self.text[self.at:]

    def peek(self) -> Step[str]:
        """The next character; "" at the end."""
        while self.at == len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def take(self) -> Step[str]:
        """The next character, read; "" at the end."""
        c = yield from self.peek()
        self.at += len(c)
        return c

    def skip_space(self) -> Step[None]:
        while (c := (yield from self.peek())) and c in SPACE:
            self.at += 1

    def literal(self, wanted: str) -> Step[bool]:
        """Reads `wanted` if it comes next, else nothing."""
        start = self.at
        for expected in wanted:
            if (yield from self.take()) != expected:
                self.at = start
                return False
        return True

    def closing(self, wanted: str) -> Step[bool]:
        """Reads `wanted` if it comes next, or as much of it as there is if the text ends in it; else nothing."""
        start = self.at
        for expected in wanted:
            c = yield from self.take()
            if c and c != expected:
                self.at = start
                return False
        return True

    def until(self, end: str, most: int | None = None) -> Step[str | None]:
        """Reads up to and with `end`; what lies before it, or None if it does not come (in `most` characters)."""
        start = self.at
        while True:
            found = self.text.find(end, start)
            if found >= 0 and (most is None or found - start <= most):
                self.at = found + len(end)
                return self.text[start:found]
            if self.ended or found >= 0 or most is not None and len(self.text) - start > most + len(end):
                self.at = start
                return None
            self.at = len(self.text)
            yield

    def json_string(self) -> Step[str | None]:
        """Reads a JSON string; None if what comes next is none."""
        start = self.at
        c = yield from self.take()
        closed = False
        if c == '"':
            while (c := (yield from self.take())) and c != '"':
                if c == "\\":
                    yield from self.take()
            closed = c == '"'
        try:
            value = json.loads(self.text[start:self.at], strict=False) if closed else None
        except ValueError:
            value = None
        if value is None:
            self.at = start
            return None
        return value.encode("utf-8", errors="replace").decode()  # an escape may spell half a surrogate pair

    def json_value(self, give: Callable[[str], None] | None = None) -> Step[str]:
        """Reads a JSON value up to where its brackets close, handing its text to `give` as it comes.

        What was given can't be read again. Without `give` the whole text is returned.
        """
        start = self.at
        depth, quoted, escaped, closed = 0, False, False, False
        while (yield from self.peek()):
            i = self.at
            while i < len(self.text) and not closed:
                c = self.text[i]
                if not depth and not quoted and c in ",}]" + SPACE:  # behind a number or a word
                    closed = True
                    break
                i += 1
                if escaped:
                    escaped = False
                elif quoted:
                    escaped, quoted = c == "\\", c != '"'
                    closed = not quoted and not depth
                elif c == '"':
                    quoted = True
                elif c in "{[":
                    depth += 1
                elif c in "}]":
                    depth -= 1
                    closed = depth <= 0
            if give is not None:
                give(self.text[self.at:i])
            self.at = i
            if give is not None:
                self.forget()
            if closed:
                break
        return self.text[start:self.at] if give is None else ""
