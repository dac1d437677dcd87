"""A prompt whose text has changed, as tokens: those around the change stay what they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def rewritten(prompt_ids: Sequence[int], text: str, tokenizer: Any) -> list[int]:
    """The tokens of a prompt whose text has become `text`: its own where it is the same, special ones too.

    Only what lies between the parts that both have at their beginning and end is tokenized.
    """
    pieces = [tokenizer.token_bytes(i) for i in prompt_ids]
    before, after = b"".join(pieces), text.encode("utf-8", "replace")
    most = min(len(before), len(after))
    front = _common(before, after, most)
    back = _common(before[::-1], after[::-1], most - front)
    first, begins = 0, 0  # tokens and bytes that stay at the front
    while first < len(pieces) and begins + len(pieces[first]) <= front:
        begins += len(pieces[first])
        first += 1
    while begins and not pieces[first - 1]:  # a special token that ends a text stays behind it
        first -= 1
    last, ends = len(pieces), 0  # and at the end
    while last > first and ends + len(pieces[last - 1]) <= back:
        last -= 1
        ends += len(pieces[last])
    # Half a character can't be tokenized: give back tokens until both cuts lie between two.
    while first and _inside(after, begins):
        first -= 1
        begins -= len(pieces[first])
    while last < len(pieces) and _inside(after, len(after) - ends):
        ends -= len(pieces[last])
        last += 1
    middle = after[begins:len(after) - ends].decode("utf-8", "replace")
    return [*prompt_ids[:first], *tokenizer.encode(middle), *prompt_ids[last:]]


def _common(one: bytes, other: bytes, most: int) -> int:
    low, high = 0, most  # bisected: both are compared whole in C
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _inside(data: bytes, at: int) -> bool:
    """Whether a cut there would be within a character."""
    return at < len(data) and data[at] & 0xC0 == 0x80
