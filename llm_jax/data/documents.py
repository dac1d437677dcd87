"""Reads prepared documents back: in order (`read_documents`) or any at all (`DocumentStore`)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from llm_jax.data import fetching
from llm_jax.data.manifest import load_manifest, verify_shards
from llm_jax.data.shards import INDEX
from llm_jax.data.splits import SPLITS
from llm_jax.errors import UserError

__all__ = ["DocumentStore", "document_id", "load_manifest", "read_documents", "read_index", "verify_shards"]

_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # single documents: nothing to read ahead
_READ_AT_ONCE = 64


def document_id(number: int) -> str:
    """A document's id as it is printed: 16 hexadecimal digits."""
    return f"{int(number):016x}"


def read_index(data_dir: str | os.PathLike, split: str) -> np.ndarray:
    """A split's index: array [documents] of `shards.INDEX`, in the order of the records in its shards.

    Raises:
      UserError: an unknown split, or an index that is missing or damaged.
    """
    if split not in SPLITS:
        raise UserError(f"no split is called {split!r}; there are {', '.join(SPLITS)}")
    path = fetching.local_folder(data_dir) / f"{split}.index.npy"
    try:
        index = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read the index {path}: {error}") from error
    if index.dtype != INDEX:
        raise UserError(f"{path} is not an index of this version; prepare {data_dir} again with --gin.FORCE=True")
    return index


def read_documents(data_dir: str | os.PathLike, split: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields `(id, tokens)` of every document of a split; tokens are uint32 [n], BOS first and EOS last.

    Raises:
      UserError: missing or damaged data.
    """
    store = DocumentStore(data_dir, load_manifest(data_dir), split)
    try:
        for start in range(0, len(store.index), _READ_AT_ONCE):
            documents = range(start, min(start + _READ_AT_ONCE, len(store.index)))
            for document, tokens in zip(documents, store.read(documents), strict=True):
                yield document_id(store.index["id"][document]), tokens
    finally:
        store.close()


class DocumentStore:
    """Random access to the documents of one split, from any number of threads.

    Attributes:
      index: array [documents] of `shards.INDEX`.
    """

    def __init__(self, data_dir: str | os.PathLike, manifest: dict, split: str) -> None:
        self.index = read_index(data_dir, split)
        shards = manifest["splits"][split]["shards"]
        self._paths = [str(fetching.local_folder(data_dir) / shard["file"]) for shard in shards]
        self._starts = np.cumsum([0, *(shard["documents"] for shard in shards)])
        if self._starts[-1] != len(self.index):
            raise UserError(f"{data_dir}: the {split} shards hold {self._starts[-1]} documents and the index "
                            f"{len(self.index)}; prepare it again with --gin.FORCE=True")
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()
        self._closed = False

    def read(self, documents: Sequence[int]) -> list[np.ndarray]:
        """The tokens, uint32 [n] each, of documents given by their place in the index."""
        wanted = np.asarray(documents, np.int64)
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        found: list[np.ndarray] = [None] * len(wanted)  # type: ignore[list-item]
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            records = (wanted[places] - self._starts[shard]).tolist()
            try:
                contents = self._reader(int(shard)).read(records)
            except (RuntimeError, IndexError, ValueError) as error:
                raise UserError(f"{self._paths[shard]} is damaged: {error}") from error
            for place, content in zip(places, contents, strict=True):
                found[place] = np.frombuffer(content, "<u4")
        return found

    def close(self) -> None:
        """Lets go of the shards. They close when the reads that other threads are in have ended, not under them."""
        with self._lock:
            self._closed = True
            self._readers.clear()

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if self._closed:
                raise UserError("documents cannot be read after they were closed")
            if shard not in self._readers:
                self._readers[shard] = ArrayRecordReader(self._paths[shard], _READER_OPTIONS)
            return self._readers[shard]
