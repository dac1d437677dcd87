"""Line ends, control characters, and where long texts are cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.cleaning import documents_of, normalise


def test_normalise():
    assert normalise("a\r\nb\rc\n\r\nd") == "a\nb\nc\n\nd"
    assert normalise("a\x00\x07b\x0c\x1b[0m\x7f\x9fc\tä") == "ab[0mc\tä"
    assert normalise("▁ \u3000\ufeff\u2028天") == "▁ \u3000\ufeff\u2028天"


def test_short_text_is_one_document():
    assert list(documents_of(["one\n\ntwo\n"], 100)) == ["one\n\ntwo\n"]
    assert list(documents_of([], 100)) == []
    assert list(documents_of(["x" * 125], 100)) == ["x" * 125]


def test_cuts_at_the_best_boundary():
    filler = "w" * 30
    assert list(documents_of([f"{filler}\n\n{filler}\n{filler}. {'z' * 60}"], 100))[0] == f"{filler}\n\n"
    assert list(documents_of([f"{filler}\n \t\n{filler}\n{filler}. {'z' * 60}"], 100))[0] == f"{filler}\n \t\n"
    assert list(documents_of([f"{filler}\n{filler}. {'z' * 90}"], 100))[0] == f"{filler}\n"
    assert list(documents_of([f"{filler}。{filler}？”{'z' * 90}"], 100))[0] == f"{filler}。{filler}？”"
    assert list(documents_of([f"{filler} {filler}.\" {'z' * 90}"], 100))[0] == f"{filler} {filler}.\""
    assert list(documents_of([f"{filler} {filler} {'z' * 90}"], 100))[0] == f"{filler} {filler} "
    assert list(documents_of(["z" * 240], 100)) == ["z" * 100, "z" * 100, "z" * 40]


def test_separator_lines_end_documents():
    text = "first story\n<|endoftext|>\nsecond\n  <|endoftext|> \nthird with <|endoftext|> inside\n<|endoftext|>"
    assert list(documents_of([text], 100)) == ["first story\n", "second\n", "third with <|endoftext|> inside\n"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["word ", "a. ", "\n", "\n\n", "句子。", "x" * 30, "\n<|endoftext|>\n", "<|endoftext|>"])),
    st.lists(st.integers(0, 400)))
def test_documents_depend_on_the_text_and_not_on_how_it_was_read(parts, cuts):
    text = "".join(parts)
    ends = sorted({*(min(cut, len(text)) for cut in cuts), 0, len(text)})
    blocks = [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    whole = list(documents_of([text], 80))
    assert list(documents_of(blocks, 80)) == whole
    assert all(0 < len(document) <= 100 for document in whole)
    lines = text.split("\n")
    kept = [line for line in lines if line.strip(" \t") != "<|endoftext|>"]
    assert "".join(whole).replace("\n", "") == "".join(kept)


def test_memory_is_bounded_by_the_block():
    def blocks():
        for _ in range(300):
            yield "some words here " * 4096

    lengths = [len(document) for document in documents_of(blocks(), 1000)]
    assert sum(lengths) == 300 * 16 * 4096
    assert max(lengths) <= 1250 and min(lengths) >= 250
