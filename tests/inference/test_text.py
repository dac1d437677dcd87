"""Streamed text is final: whole characters, nothing of a stop string, nothing missing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.inference.text import TextStream


class Bytes:
    """Token i is the byte i: every split of every character."""

    stripped_spaces = 0

    def token_bytes(self, i: int) -> bytes:
        return bytes([i])


def stream(data: bytes, stop):
    s, pieces = TextStream(Bytes(), stop), []
    for byte in data:
        pieces.append(s.push(byte))
        if s.stopped:
            return pieces, True
    pieces.append(s.flush())
    return pieces, s.stopped


alphabet = st.text(st.sampled_from("ab停止。\n🙂"), max_size=30)


@settings(max_examples=500, deadline=None)
@given(alphabet, st.lists(st.text(st.sampled_from("ab停止"), min_size=1, max_size=4), max_size=3))
def test_stream_is_the_text_up_to_the_first_stop(text, stop):
    pieces, stopped = stream(text.encode(), stop)
    # The first stop string to be complete ends the text, at the earliest place one that ends there begins.
    ends = [(text.index(s) + len(s)) for s in stop if s in text]
    if ends:
        end = min(ends)
        begins = [text[:end].index(s) for s in stop if s in text[:end]]
        assert stopped and "".join(pieces) == text[:min(begins)]
    else:
        assert not stopped and "".join(pieces) == text
    assert all("\ufffd" not in p for p in pieces)


def test_text_is_not_held_longer_than_needed():
    s = TextStream(Bytes(), ["END"])
    assert [s.push(b) for b in b"aENxE"] == ["a", "", "", "ENx", ""]
    assert s.flush() == "E"


def test_incomplete_character_at_the_end_is_marked():
    assert "".join(stream("好".encode()[:2], [])[0]) == "\ufffd"
