"""Evaluation sees every token of every document but its BOS as a target once, after what came before it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.documents import read_documents
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.data.windows import evaluation_windows, read_text_document
from llm_jax.errors import UserError


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 12), st.integers(1, 4))
def test_every_token_but_bos_is_a_target_once(lengths, row_length, batch_size):
    ends = np.cumsum([0, *lengths])
    documents = [(str(i), np.arange(ends[i], ends[i + 1], dtype=np.uint32)) for i in range(len(lengths))]
    targets = []
    for batch in evaluation_windows(documents, row_length, batch_size):
        assert all(array.shape == (batch_size, row_length) for array in batch.values())
        assert batch["weights"].dtype == np.float32
        assert all(batch[name].dtype == np.int32 for name in batch if name != "weights")
        assert ((batch["segment_ids"] > 0) == (batch["weights"] == 1)).all() and batch["weights"].any()
        used = batch["weights"] == 1
        assert (batch["targets"][used] == batch["tokens"][used] + 1).all()  # tokens are numbered consecutively
        for row, segments in enumerate(batch["segment_ids"]):
            for segment in range(1, segments.max() + 1):
                window = segments == segment
                assert batch["positions"][row, window].tolist() == list(range(window.sum()))
                assert (np.diff(batch["tokens"][row, window]) == 1).all()
        targets += batch["targets"][used].tolist()
    assert targets == [t for i, n in enumerate(lengths) for t in range(ends[i] + 1, ends[i] + n)]


def test_windows_overlap_by_one_token():
    (batch,) = evaluation_windows([("a", np.arange(10, 20)), ("b", np.array([1, 5, 2]))], 4, 4)
    assert batch["tokens"].tolist() == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 1, 5, 0], [0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[11, 12, 13, 14], [15, 16, 17, 18], [19, 5, 2, 0], [0, 0, 0, 0]]
    assert batch["segment_ids"].tolist()[2:] == [[1, 2, 2, 0], [0, 0, 0, 0]]
    assert batch["positions"].tolist()[2] == [0, 0, 1, 0]


def test_bytes_of_targets_are_the_text(prepared):
    tokenizer = Tokenizer.load(prepared)
    bytes_seen = sum((tokenizer.byte_lengths[batch["targets"]] * batch["weights"]).sum()
                     for batch in evaluation_windows(read_documents(prepared, "test"), 64, 4))
    from llm_jax.data.manifest import load_manifest
    assert bytes_seen == load_manifest(prepared)["splits"]["test"]["bytes"]


def test_a_text_file_is_one_document(prepared, tmp_path):
    tokenizer = Tokenizer.load(prepared)
    (tmp_path / "a.txt").write_bytes("\ufeffthe cat\r\n\x07天地▁\n".encode())
    (name, tokens), size = read_text_document(tmp_path / "a.txt", tokenizer)
    assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id and tokens.dtype == np.uint32
    assert tokenizer.decode(tokens) == "the cat\n天地▁\n" and len(name) == 16
    assert size == len("the cat\n天地▁\n".encode())


@pytest.mark.parametrize(("content", "message"), [
    (None, "cannot read"), (b"", "holds no text"), (b"a\xff", "not UTF-8 text: .* at byte 1")])
def test_a_text_file_that_cannot_be_used_is_one_message(prepared, tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text_document(tmp_path / "a.txt", Tokenizer.load(prepared))
