"""A lossless SentencePiece tokenizer, and the decoder that streams its tokens as whole characters."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable

import numpy as np
import sentencepiece

from llm_jax import storage
from llm_jax.errors import UserError

FILE_NAME = "tokenizer.model"
# SentencePiece writes spaces as U+2581 inside its pieces and reads a literal U+2581 back as a space, so the character
# itself is spelt with the byte tokens of its UTF-8 form.
_SPACE_MARK = "\u2581"


class Tokenizer:
    """A SentencePiece model with byte fallback: `decode(encode(text)) == text` for every valid Unicode text.

    Attributes:
      vocab_size: number of tokens, special ones included.
      pad_id, bos_id, eos_id: the special tokens; no text encodes to them.
      end_ids: tokens at which generation ends.
      byte_lengths: int32 [vocab_size], UTF-8 bytes that each token stands for (0 for special tokens).
    """

    def __init__(self, model: bytes) -> None:
        """Makes a tokenizer of a serialized SentencePiece model.

        Raises:
          UserError: the bytes are not a SentencePiece model, or one that lacks byte fallback, BOS or EOS.
        """
        self._model = model
        self._processor = processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = processor.LoadFromSerializedProto(model)
        except Exception as error:  # sentencepiece raises bare RuntimeError and its own subclasses of it
            raise UserError(f"not a SentencePiece model: {error}") from error
        if not loaded or processor.vocab_size() == 0:
            raise UserError("not a SentencePiece model: it holds no tokens")
        self.vocab_size: int = processor.vocab_size()
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        self.pad_id: int = max(processor.pad_id(), 0)
        self._bytes, byte_ids = _token_table(processor)
        if len(byte_ids) != 256 or self.bos_id < 0 or self.eos_id < 0:
            raise UserError("the SentencePiece model lacks byte fallback, BOS or EOS")
        if self._bytes[processor.piece_to_id(_SPACE_MARK)] != b" ":
            raise UserError("the SentencePiece model has no token for a space, so spaces would not survive decoding")
        self.end_ids: tuple[int, ...] = (self.eos_id,)
        self.byte_lengths = np.array([len(b) for b in self._bytes], np.int32)
        self._space_mark_ids = [byte_ids[b] for b in _SPACE_MARK.encode()]

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Reads `tokenizer.model`, given as a file or as the directory (local or a bucket) that holds it."""
        try:
            location = storage.as_path(path)
            if location.is_dir():
                location = location / FILE_NAME
            model = location.read_bytes()
        except OSError as error:
            raise UserError(f"no tokenizer at {path}: {error.strerror or error}; experiments/prepare.py writes "
                            f"{FILE_NAME}") from error
        try:
            return cls(model)
        except UserError as error:
            raise UserError(f"{location}: {error}") from error

    def save(self, directory: str | os.PathLike) -> None:
        """Writes `tokenizer.model` into `directory`, whole or not at all."""
        storage.write_atomically(storage.as_path(directory) / FILE_NAME, self._model)

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without BOS or EOS.

        Raises:
          UserError: the text holds a lone surrogate, which no UTF-8 text can.
        """
        try:
            content = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"text is not valid Unicode: a lone surrogate at character {error.start}") from error
        if _SPACE_MARK not in text:
            return self._processor.encode(content)
        first, *others = content.split(_SPACE_MARK.encode())
        ids = self._processor.encode(first)
        for part in others:
            ids += self._space_mark_ids
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are dropped and invalid UTF-8 becomes U+FFFD."""
        return b"".join([self.token_bytes(i) for i in ids]).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, possibly part of a character, that a token stands for.

        Special tokens stand for nothing, and so do ids past the vocabulary, which a model with more rows may emit.
        """
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        return self._bytes[token_id] if token_id < self.vocab_size else b""


class StreamDecoder:
    """Decodes tokens one at a time without ever splitting a character.

    The pieces of text that `push` and `flush` return, joined, are `tokenizer.decode` of the same tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the characters it completes, which may be none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Ends the text: a character left incomplete comes out as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _token_table(processor: sentencepiece.SentencePieceProcessor) -> tuple[list[bytes], dict[int, int]]:
    """The bytes of every token, and the id of every byte token."""
    table: list[bytes] = []
    byte_ids: dict[int, int] = {}
    for i in range(processor.vocab_size()):
        piece = processor.id_to_piece(i)
        if processor.is_byte(i):
            value = int(piece[3:5], 16)  # spelt "<0xE2>"
            byte_ids[value] = i
            table.append(bytes([value]))
        elif processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            table.append(b"")
        else:
            table.append(piece.replace(_SPACE_MARK, " ").encode())
    return table, byte_ids
