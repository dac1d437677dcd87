"""Prompt look-up proposes what a scan of the whole sequence would."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.inference.lookup import Lookup, propose


def scan(tokens, most, max_ngram, min_ngram):
    """The definition, without an index."""
    for n in range(max_ngram, min_ngram - 1, -1):
        for begin in range(len(tokens) - n - 1, -1, -1):
            if n <= len(tokens) and tokens[begin:begin + n] == tokens[len(tokens) - n:]:
                text = list(tokens)
                for i in range(most):  # what it proposes continues the sequence that is copied from
                    text.append(text[begin + n + i])
                return text[len(tokens):]
    return []


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40), st.integers(0, 6), st.integers(1, 4), st.data())
def test_the_index_finds_what_a_scan_finds(tokens, prompt, most, max_ngram, data):
    min_ngram = data.draw(st.integers(1, max_ngram))
    lookup = Lookup(tokens[:prompt], max_ngram=max_ngram, min_ngram=min_ngram)
    assert lookup.propose(most) == scan(tokens[:prompt], most, max_ngram, min_ngram)
    for end in range(prompt, len(tokens)):
        lookup.extend(tokens[end])
        assert lookup.propose(most) == scan(tokens[:end + 1], most, max_ngram, min_ngram)
    assert len(lookup) == len(tokens)


def test_by_hand():
    prompt = [7, 1, 2, 3, 4, 5, 9, 2, 3, 8]
    assert propose([*prompt, 2, 3], 3) == [8, 2, 3]  # the latest "2 3", not the first
    assert propose([*prompt, 1, 2, 3], 3) == [4, 5, 9]  # "1 2 3" is longer than "2 3"
    assert propose([*prompt, 6, 3], 3) == []  # a single token is not enough
    assert propose([*prompt, 6, 3], 3, min_ngram=1) == [8, 6, 3]
    assert propose([5, 5, 5], 4) == [5, 5, 5, 5]
    assert propose([], 4) == [] and propose(prompt, 0) == []


def test_sizes_are_checked():
    for sizes in ({"max_ngram": 2, "min_ngram": 3}, {"min_ngram": 0}):
        with pytest.raises(ValueError, match="min_ngram"):
            Lookup(**sizes)
