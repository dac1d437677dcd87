"""The tokenizer loses nothing, and streams whole characters."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_jax.data.tokenizer import StreamDecoder, Tokenizer
from llm_jax.data.tokenizer_training import train_tokenizer
from llm_jax.errors import UserError

TEXTS = ["the river sees the house\n    and then again\n" * 40, "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。" * 40]
TOKENIZER = train_tokenizer(TEXTS, 400)
# Knows no space, no digit and no line end of its own: all of them must come out of bytes and required tokens.
POOR = train_tokenizer(["天地玄黄" * 30], 300)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, POOR], ids=["usual", "poor"])
@pytest.mark.parametrize("text", [
    "", " ", "  two spaces  ", "\t\ttabs\t", "a\r\nb\rc\n", "\x00nul\x00", "▁", "▁▁ ▁the▁ river▁", "🧑‍🚀 emoji 🎉",
    "\ufeffmark", "full-width：，。！", "<s></s><pad><unk><0x41>", "▅ \u2047", "é e\u0301", "\U0010ffff\ue000",
])
def test_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text("▁ \n\ta天") | st.text("<s>/0x41▁"))
@example("▁")
def test_lossless_for_any_text(text):
    for tokenizer in (TOKENIZER, POOR):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_code_point_survives():
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    for start in range(0, len(points), 1 << 16):
        text = "".join(points[start:start + (1 << 16)])
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_special_tokens_come_from_no_text_and_leave_none():
    special = {TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id}
    assert len(special) == 3 and TOKENIZER.pad_id == 0
    assert TOKENIZER.end_ids == (TOKENIZER.eos_id,)
    assert not special & set(TOKENIZER.encode("<s> </s> <pad> \x00"))
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("house"), TOKENIZER.eos_id, TOKENIZER.pad_id]
    assert TOKENIZER.decode(ids) == "house"
    assert all(TOKENIZER.token_bytes(i) == b"" for i in special)


def test_lone_surrogates_are_refused():
    for text in ("a\ud800b", "▁\udfff"):
        with pytest.raises(UserError, match="lone surrogate"):
            TOKENIZER.encode(text)


def test_token_bytes_and_lengths():
    text = "the 天地 ▁🎉"
    ids = TOKENIZER.encode(text)
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()
    assert TOKENIZER.byte_lengths[ids].sum() == len(text.encode())
    assert TOKENIZER.byte_lengths.shape == (TOKENIZER.vocab_size,)
    assert TOKENIZER.token_bytes(TOKENIZER.vocab_size + 5) == b""
    with pytest.raises(ValueError, match="negative"):
        TOKENIZER.token_bytes(-1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_streaming_joins_to_decode_for_any_tokens(ids):
    decoder = StreamDecoder(TOKENIZER)
    assert "".join([decoder.push(i) for i in ids] + [decoder.flush()]) == TOKENIZER.decode(ids)


def test_streaming_gives_whole_characters_alone():
    decoder = StreamDecoder(TOKENIZER)
    pieces = [decoder.push(i) for i in TOKENIZER.encode("🎉é")]
    assert pieces == ["", "", "", "🎉", "", "é"]
    assert decoder.push(TOKENIZER.encode("🎉")[0]) == ""
    assert decoder.flush() == "\ufffd"


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model", str(tmp_path)):
        assert Tokenizer.load(path).encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]


def test_missing_or_damaged_model_is_one_message(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    for content in (b"", b"not a model", TOKENIZER._model[:50]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.model"):
            Tokenizer.load(tmp_path)


def test_vocabulary_shrinks_to_fit_and_never_exceeds():
    assert train_tokenizer(["hello world"], 4096).vocab_size < 300
    assert TOKENIZER.vocab_size <= 400
    assert train_tokenizer(TEXTS, 100_000).vocab_size < 1000
    with pytest.raises(UserError, match="VOCAB_SIZE=100"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 400)


def test_chinese_gets_words_even_in_a_small_vocabulary():
    # 2,000 different characters would fill any small vocabulary if each were given a token.
    rare = "".join(chr(0x4E00 + i) for i in range(2000))
    tokenizer = train_tokenizer([rare + "宇宙洪荒日月盈昃" * 300], 320)
    assert tokenizer.vocab_size == 320
    assert len(tokenizer.encode("宇宙洪荒日月盈昃")) <= 2
    assert tokenizer.decode(tokenizer.encode(rare)) == rare


def test_long_lines_are_learnt_from():
    word = "abcdefghijklmnop"
    tokenizer = train_tokenizer([f"{word} " * 5000], 400)  # one line of 85,000 bytes
    assert len(tokenizer.encode(word)) == 1
