"""Tokenizes documents and writes them as ArrayRecord shards, one task a shard, in any number of processes."""

from __future__ import annotations

import dataclasses
import functools
import math
import os

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from llm_jax import storage
from llm_jax.data import spool
from llm_jax.data.splits import SPLITS
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError

# One record of a split's index. `length` counts BOS and EOS, `bytes` is the UTF-8 text's.
INDEX = np.dtype([("length", "<u4"), ("id", "<u8"), ("source", "<u4"), ("bytes", "<u4")])
# One document a chunk, so that any of them is read alone.
WRITER_OPTIONS = "group_size:1,zstd:1"
_MIN_SHARD_TEXT = 2 << 20
_MAX_SHARD_TEXT = 256 << 20
_WANTED_SHARDS = 64


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to write; plain values and arrays, so that it travels to a worker process."""

    split: str
    path: str
    records: np.ndarray
    spools: tuple[str, ...]
    tokenizer: str


@dataclasses.dataclass
class ShardResult:
    """What was written: the shard's part of the index, and how often each token occurs in it (the first left out)."""

    split: str
    path: str
    sha256: str
    size: int
    index: np.ndarray
    token_counts: np.ndarray
    text_bytes: int


def shard_name(split: str, number: int, of: int) -> str:
    return f"{split}-{number:05d}-of-{of:05d}.array_record"


def plan(records: np.ndarray, sides: np.ndarray, spools: list[str], folder: str, tokenizer: str) -> list[ShardTask]:
    """Divides each split, in corpus order, into shards of about equal text; a pure function of the documents."""
    _tokenizer.cache_clear()  # another preparation of this process may have left another tokenizer at the same path
    target = min(max(int(records["bytes"].sum(dtype=np.int64)) // _WANTED_SHARDS, _MIN_SHARD_TEXT), _MAX_SHARD_TEXT)
    tasks = []
    for side, split in enumerate(SPLITS):
        members = records[sides == side]
        ends = np.cumsum(members["bytes"], dtype=np.int64)
        count = math.ceil(int(ends[-1]) / target) if len(ends) else 0
        bounds = np.searchsorted(ends, [int(ends[-1]) * i // count for i in range(1, count)]) if count else []
        parts = [part for part in np.split(members, bounds) if len(part)]
        for i, part in enumerate(parts):
            path = os.path.join(folder, shard_name(split, i, len(parts)))
            tasks.append(ShardTask(split, path, part, tuple(spools), tokenizer))
    return tasks


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer.load(path)


def write_shard(task: ShardTask) -> ShardResult:
    """Writes one shard under a temporary name and renames it when it is whole."""
    tokenizer = _tokenizer(task.tokenizer)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    index = np.empty(len(task.records), INDEX)
    for field in ("id", "source", "bytes"):
        index[field] = task.records[field]
    temporary = task.path + ".tmp"
    writer = ArrayRecordWriter(temporary, WRITER_OPTIONS)
    for i, text in enumerate(spool.read_spooled(task.records, task.spools)):
        tokens = np.array(tokenizer.document_ids(text), "<u4")
        counts += np.bincount(tokens[1:], minlength=len(counts))
        index["length"][i] = len(tokens)
        writer.write(tokens.tobytes())
    writer.close()
    _check_whole(temporary, len(index))
    sha256 = storage.sha256_of(temporary)
    os.replace(temporary, task.path)
    return ShardResult(task.split, task.path, sha256, os.path.getsize(task.path), index, counts,
                       int(task.records["bytes"].sum(dtype=np.int64)))


def _check_whole(path: str, records: int) -> None:
    """A full disk does not always fail the write itself."""
    try:
        reader = ArrayRecordReader(path)
        found = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise UserError(f"could not write {path}: {error}") from error
    if found != records:
        raise UserError(f"could not write {path}: only {found} of {records} documents arrived; is the disk full?")


def unigram_bits_per_byte(train_counts: np.ndarray, counts: np.ndarray, text_bytes: int) -> float:
    """Cross-entropy of tokens under the unigram model of the training tokens with add-one smoothing.

    Args:
      train_counts: int64 [V], how often each token occurs in training documents, EOS counted and BOS not.
      counts: int64 [V], the same of the documents to predict.
      text_bytes: UTF-8 bytes of the documents to predict.

    Returns:
      Bits per byte: Σ_v counts_v · −log2((train_v + 1) / (Σ train + V)) / text_bytes.
    """
    smoothed = train_counts + 1.0
    return float(-(counts * np.log2(smoothed / smoothed.sum())).sum() / text_bytes)
