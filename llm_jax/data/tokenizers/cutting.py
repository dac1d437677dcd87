"""Cuts added tokens out of a text before the rest is tokenized."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from llm_jax.data.tokenizers.folder import Added

_SPACE = re.compile(r"\s*")


class Cutter:
    """Finds tokens by their text: the leftmost, of several there the longest."""

    def __init__(self, tokens: Iterable[tuple[int, Added]]) -> None:
        """Takes `(id, token)` pairs."""
        self._tokens = {token.content: (i, token) for i, token in tokens}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def cut(self, text: str) -> Iterator[tuple[int, str] | int]:
        """Yields the text's parts in order: ids of tokens, and `(start, part)` of what lies between, none empty."""
        start = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            token_id, token = self._tokens[match[0]]
            begin, end = match.span()
            if token.single_word and (text[begin - 1:begin].isalnum() or text[end:end + 1].isalnum()):
                continue
            if begin < start:  # the white space that the last one took
                continue
            if token.lstrip:
                begin = start + len(text[start:begin].rstrip())
            if token.rstrip:
                end = _SPACE.match(text, end).end()  # it matches nothing, too
            if start < begin:
                yield start, text[start:begin]
            yield token_id
            start = end
        if start < len(text):
            yield start, text[start:]
