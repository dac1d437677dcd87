"""Trains a tokenizer on a sample of the training documents."""

from __future__ import annotations

import collections
import io
import re
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.data.tokenizers.sentencepiece_model import SentencePieceTokenizer
from llm_jax.errors import UserError

# 256 byte tokens and padding, BOS, EOS and unknown; a few more leave room for the commonest characters.
SMALLEST_VOCAB = 272
_RESERVED = 260
# Longest stretch of text handed over at once. SentencePiece drops what is longer than a limit it is given, so what is
# longer is cut here.
_STRETCH_CHARS = 2000
_COVERAGE = 0.9995


def sample_records(records: np.ndarray, max_bytes: int) -> np.ndarray:
    """A sample of at most about `max_bytes` of text, drawn by content hash, in the order of `records`."""
    order = np.argsort(records["check"], kind="stable")
    sizes = np.cumsum(records["bytes"][order].astype(np.int64))
    return records[np.sort(order[:max(1, int(np.searchsorted(sizes, max_bytes, side="right")))])]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a lossless byte-pair tokenizer (Sennrich et al. 2016, arXiv:1508.07909) with SentencePiece.

    Nothing is normalised: spaces, tabs and line ends are learnt as they stand, so that line ends and indentation get
    tokens of their own. Every byte has a token; characters too rare for one are spelt in bytes, and single characters
    take at most half of what the bytes leave, so that Chinese gets words too.

    Args:
      texts: documents, held in memory together: bound them first (`sample_records`).
      vocab_size: most tokens to make; fewer come out when the texts hold too few different pairs.

    Raises:
      UserError: `vocab_size` is too small, or there is no text.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(f"VOCAB_SIZE={vocab_size} is too small: bytes and special tokens alone need {SMALLEST_VOCAB}")
    stretches = _without_rare([stretch for text in texts for stretch in _stretches(text)],
                              (vocab_size - _RESERVED) // 2)
    if not stretches:
        raise UserError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(stretches), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, character_coverage=1.0, required_chars="\u2581",
            byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
            max_sentence_length=8 * _STRETCH_CHARS, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2)
    except RuntimeError as error:
        raise UserError(f"SentencePiece could not train a tokenizer of {vocab_size} tokens: {error}") from error
    return SentencePieceTokenizer.of_model(model.getvalue())


def _stretches(text: str) -> Iterator[str]:
    """Cuts a document at line ends into stretches short enough to be taken whole."""
    start = 0
    while len(text) - start > _STRETCH_CHARS:
        end = text.rfind("\n", start, start + _STRETCH_CHARS) + 1 or start + _STRETCH_CHARS
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _without_rare(stretches: list[str], most: int) -> list[str]:
    """The stretches cut at rare characters, which keeps those from getting tokens of their own.

    At most `most` characters stay, the commonest, and no more than it takes to cover 99.95 % of the text. The option
    that SentencePiece has for this, `character_coverage`, refuses values under 98 %.
    """
    counts: collections.Counter[str] = collections.Counter()
    for stretch in stretches:
        counts.update(stretch)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    covered = np.cumsum([count for _, count in ordered])
    needed = int(np.searchsorted(covered, _COVERAGE * counts.total())) + 1
    rare = "".join(character for character, _ in ordered[min(most, needed):])
    if not rare:
        return stretches
    cut = re.compile(f"[{re.escape(rare)}]+")
    return [part for stretch in stretches for part in cut.split(stretch) if part]
