"""Batches for evaluation: every token of every document but its BOS is a target exactly once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np

from llm_jax import storage
from llm_jax.data import cleaning, spool
from llm_jax.data.documents import document_id
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError

_FIELDS = {"tokens": np.int32, "targets": np.int32, "weights": np.float32, "segment_ids": np.int32,
           "positions": np.int32}


def evaluation_windows(documents: Iterable[tuple[str, np.ndarray]], row_length: int,
                       batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Cuts documents into windows that overlap by one token and lays them out in rows, in order.

    Window k of a document with tokens t holds inputs t[kT : kT + T] and their targets t[kT + 1 : kT + T + 1]. A window
    shorter than a row shares it with the next ones, as long as they fit whole.

    Args:
      documents: `(id, tokens)` pairs, tokens integer [n] with BOS first and EOS last (`read_documents`).
      row_length: inputs of a row (T).
      batch_size: rows of a batch (B); the last batch is filled up with empty rows.

    Yields:
      A dict of arrays [B, T]: `tokens` and `targets` int32; `weights` float32, 1 for every target and 0 elsewhere;
      `segment_ids` int32, 0 where a row is not full; `positions` int32, from 0 in every window.
    """
    batch, row, at, segment = _empty(batch_size, row_length), 0, 0, 0
    for _, tokens in documents:
        tokens = np.asarray(tokens)
        for start in range(0, len(tokens) - 1, row_length):
            targets = tokens[start + 1:start + row_length + 1]
            length = len(targets)
            if at + length > row_length:
                row, at, segment = row + 1, 0, 0
                if row == batch_size:
                    yield batch
                    batch, row = _empty(batch_size, row_length), 0
            segment += 1
            place = (row, slice(at, at + length))
            batch["tokens"][place] = tokens[start:start + length]
            batch["targets"][place] = targets
            batch["weights"][place] = 1.0
            batch["segment_ids"][place] = segment
            batch["positions"][place] = np.arange(length)
            at += length
    if at:
        yield batch


def read_text_document(path: str | os.PathLike, tokenizer: Tokenizer) -> tuple[tuple[str, np.ndarray], int]:
    """Reads a UTF-8 text file as one document, cleaned as training text is.

    Args:
      path: the file; it is held in memory.
      tokenizer: what makes tokens of it.

    Returns:
      `(id, tokens)`, tokens uint32 [n] with BOS first and EOS last, and the UTF-8 bytes of the cleaned text.

    Raises:
      UserError: the file cannot be read, is not UTF-8 or holds no text.
    """
    try:
        with open(storage.as_path(path), encoding="utf-8-sig", newline="") as file:
            text = cleaning.normalise(file.read())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not text:
        raise UserError(f"{path} holds no text")
    content = text.encode("utf-8")
    tokens = np.array(tokenizer.document_ids(text), np.uint32)
    return (document_id(spool.content_hash(content)[0]), tokens), len(content)


def _empty(batch_size: int, row_length: int) -> dict[str, np.ndarray]:
    return {name: np.zeros((batch_size, row_length), dtype) for name, dtype in _FIELDS.items()}
