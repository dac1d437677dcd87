"""From text as it was written to documents as they are learnt: line ends, control characters, length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# Control characters (Unicode category Cc) but for tab and newline; carriage returns are line ends, dealt with first.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BLANK_LINE = re.compile(r"\n[ \t\u3000]*\n")
# A full stop of a script without spaces ends a sentence by itself; a Latin one must be followed by white space.
_SENTENCE_END = re.compile("[。！？．…][”’」』）]*|[.!?][\"')”’]*(?=\\s)")
_SEPARATOR_TEXT = "<|endoftext|>"
_SEPARATOR = re.compile(r"^[ \t]*<\|endoftext\|>[ \t]*(?:\n|\Z)", re.MULTILINE)
_LONGEST_SEPARATOR_LINE = 64


def normalise(text: str) -> str:
    """`text` with every line end as a newline and without control characters other than tab and newline."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub("", text) if _CONTROL.search(text) else text


def documents_of(blocks: Iterable[str], max_chars: int) -> Iterator[str]:
    """Cuts a stream of normalised text into documents, holding no more than a block and a document in memory.

    A line that says `<|endoftext|>` and nothing else ends a document, as in published collections of short texts, and
    is itself dropped. What is longer than 1.25 × `max_chars` is cut at the last paragraph end (blank line) of its first
    `max_chars` characters, else at the last line end, else after the last sentence, else at white space, else there:
    so no document is longer than 1.25 × `max_chars`, and none that came of a cut is shorter than a quarter of it.
    Apart from separators, the documents joined are the text.

    Args:
      blocks: pieces of one text, in order, cut anywhere except inside a line end.
      max_chars: wanted length of a document, in characters.
    """
    longest = max_chars + max_chars // 4
    pending = ""
    for block in blocks:
        pending += block
        if _SEPARATOR_TEXT in pending:
            *whole, pending = _split_at_separators(pending)
            for text in whole:
                yield from _cut(text, max_chars, longest)
        start = 0
        while len(pending) - start > longest + _LONGEST_SEPARATOR_LINE:
            end = _cut_position(pending, start, start + max_chars)
            yield pending[start:end]
            start = end
        pending = pending[start:]
    if _SEPARATOR_TEXT in pending:  # the last line, which has no end
        pending = _SEPARATOR.sub("", pending)
    yield from _cut(pending, max_chars, longest)


def _split_at_separators(text: str) -> list[str]:
    """The parts of `text` between separator lines; the last one may still grow."""
    parts, start = [], 0
    for match in _SEPARATOR.finditer(text):
        if match.end() == len(text) and not match.group().endswith("\n"):
            break  # the rest of this line has not been read yet
        parts.append(text[start:match.start()])
        start = match.end()
    return [*parts, text[start:]]


def _cut(text: str, max_chars: int, longest: int) -> Iterator[str]:
    start = 0
    while len(text) - start > longest:
        end = _cut_position(text, start, start + max_chars)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _cut_position(text: str, start: int, end: int) -> int:
    """Where to cut `text[start:end]`, at the best kind of boundary that its last three quarters offer."""
    earliest = start + (end - start) // 4
    position = text.rfind("\n\n", earliest, end)
    if position >= 0:
        return position + 2
    if blank := list(_BLANK_LINE.finditer(text, earliest, end)):
        return blank[-1].end()
    position = text.rfind("\n", earliest, end)
    if position >= 0:
        return position + 1
    if sentences := list(_SENTENCE_END.finditer(text, earliest, end)):
        return sentences[-1].end()
    position = max(text.rfind(space, earliest, end) for space in " \t\u3000")
    return position + 1 if position >= 0 else end
