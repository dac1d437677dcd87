"""Batches for training: random access through Grain, the same global batches for any number of processes."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading

import grain
import numpy as np

from llm_jax import storage
from llm_jax.data.documents import DocumentStore, document_id
from llm_jax.data.manifest import load_manifest
from llm_jax.data.packing import Epoch, Packing
from llm_jax.data.splits import SPLITS
from llm_jax.errors import UserError

_ENDLESS = 1 << 60
_THREADS = 2
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data is read, and how it is laid out.

    Attributes:
      data_dir: a directory that `prepare` wrote.
      row_length: tokens of a row.
      batch_size: rows of a global batch, over all processes.
      seed: decides, with the data itself, how documents are packed and in which order rows come.
      prefetch: batches to make ahead in the background; 0 makes each when it is asked for. Changes time, never data.
    """

    data_dir: str
    row_length: int
    batch_size: int
    seed: int = 0
    prefetch: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.data_dir, (str, os.PathLike)) or not os.fspath(self.data_dir):
            raise UserError(f"DataConfig.data_dir must be the path of prepared data, not {self.data_dir!r}")
        for name, least in (("row_length", 2), ("batch_size", 1), ("seed", 0), ("prefetch", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"DataConfig.{name} must be a whole number of at least {least}, not {value!r}")


class TrainLoader:
    """An endless iterator of packed batches.

    The rows of all epochs, one after the other, are one stream; global batch n is its rows n·B to (n + 1)·B − 1, of
    which each process takes an equal, consecutive part. `next` returns a dict of int32 arrays, rows of this process by
    `row_length`:

      tokens: token ids, 0 where a row is not full;
      segment_ids: 0 where a row is not full, 1, 2, … for the pieces of documents in it;
      positions: 0, 1, … from the start of each piece.

    Attributes:
      data_hash: identifies the prepared data.
      rows_per_epoch: rows that hold every token of the split once.
      batches_per_epoch: whole global batches in an epoch, at least 1.
    """

    def __init__(self, config: DataConfig, split: str = "train", process_index: int = 0,
                 process_count: int = 1) -> None:
        """Opens the data and verifies it.

        Args:
          config: what to read.
          split: "train", "validation" or "test".
          process_index: which part of each global batch to yield.
          process_count: how many parts there are.

        Raises:
          UserError: data that is missing or damaged, or a batch that does not divide into `process_count` parts.
        """
        if split not in SPLITS:
            raise UserError(f"no split is called {split!r}; there are {', '.join(SPLITS)}")
        if not 0 <= process_index < process_count:
            raise UserError(f"process_index={process_index} is not one of {process_count} processes")
        if config.batch_size % process_count:
            raise UserError(f"batch_size={config.batch_size} does not divide into {process_count} processes; make it a "
                            f"multiple of {process_count}")
        data_dir = storage.as_path(config.data_dir)
        manifest = load_manifest(data_dir)
        self._config = config
        self._sources = list(manifest["sources"])
        self._store = DocumentStore(data_dir, manifest, split)
        self.data_hash: str = manifest["data_hash"]
        packing = Packing(self._store.index["length"], config.row_length, self.data_hash, config.seed)
        self._rows = _RowStream(packing)
        self.rows_per_epoch = packing.rows_per_epoch
        self.batches_per_epoch = max(1, packing.rows_per_epoch // config.batch_size)
        part = config.batch_size // process_count
        batches = _Batches(self._store, self._rows, config, process_index * part, part)
        threads = min(_THREADS, config.prefetch)
        self._dataset = grain.MapDataset.source(batches).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch))
        self._iterator = iter(self._dataset)
        self._state = 0

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._state += 1
        return batch

    @property
    def state(self) -> int:
        """Batches consumed: all there is to save."""
        return self._state

    def set_state(self, batches: int) -> None:
        """Continues as if `batches` batches had been consumed."""
        if batches < 0:
            raise UserError(f"the state of a loader is a number of batches, not {batches}")
        self._iterator.close()
        self._iterator = iter(self._dataset)
        self._iterator.set_state({"next_index": batches})
        self._state = batches

    def documents(self, batch: int) -> list[str]:
        """The ids of the documents in global batch `batch`, each once, in order of appearance."""
        return [document_id(self._store.index["id"][document]) for document in self._documents_in(batch)]

    def sources(self, batch: int) -> list[str]:
        """The source of each of `documents(batch)`."""
        return [self._sources[self._store.index["source"][document]] for document in self._documents_in(batch)]

    def close(self) -> None:
        """Stops reading ahead and closes the shards."""
        self._iterator.close()
        self._store.close()

    def _documents_in(self, batch: int) -> list[int]:
        size = self._config.batch_size
        rows = range(batch * size, (batch + 1) * size)
        return list(dict.fromkeys(document for row in rows for document, _, _ in self._rows.row(row)))


class _RowStream:
    """The rows of all epochs as one endless sequence; keeps the two epochs used last, for any number of threads."""

    def __init__(self, packing: Packing) -> None:
        self._packing = packing
        self._lock = threading.Lock()
        self._cached = functools.lru_cache(maxsize=2)(packing.epoch)

    def row(self, number: int) -> list[tuple[int, int, int]]:
        epoch, position = divmod(number, self._packing.rows_per_epoch)
        return self._epoch(epoch).row(position)

    def _epoch(self, number: int) -> Epoch:
        with self._lock:  # so that two threads do not compute the same epoch
            return self._cached(number)


class _Batches:
    """One process's parts of the global batches, as a random-access source for Grain."""

    def __init__(self, store: DocumentStore, rows: _RowStream, config: DataConfig, offset: int, part: int) -> None:
        self._store, self._rows, self._config = store, rows, config
        self._offset, self._part = offset, part

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Batch:
        first = int(index) * self._config.batch_size + self._offset
        rows = [self._rows.row(row) for row in range(first, first + self._part)]
        wanted = sorted({document for row in rows for document, _, _ in row})
        texts = dict(zip(wanted, self._store.read(wanted), strict=True))
        shape = (self._part, self._config.row_length)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
        for i, row in enumerate(rows):
            at = 0
            for segment, (document, start, length) in enumerate(row, 1):
                batch["tokens"][i, at:at + length] = texts[document][start:start + length]
                batch["segment_ids"][i, at:at + length] = segment
                batch["positions"][i, at:at + length] = np.arange(length)
                at += length
        return batch
