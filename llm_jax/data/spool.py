"""The one pass over the corpus: its documents go to spool files on disk, and a small record of each stays in memory.

Whatever needs the texts afterwards (training the tokenizer, writing shards) reads them back from the spool by offset,
so compressed files are opened once, files that change meanwhile do no harm, and memory holds records alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from llm_jax.data.corpus import CorpusFile, SkipReport
from llm_jax.data.readers import SkippedFile, read_texts

# Content hash (BLAKE2b, 16 bytes, as two big-endian numbers), source number, and where the text lies in the spool.
RECORD = np.dtype([("id", "<u8"), ("check", "<u8"), ("source", "<u4"), ("spool", "<u4"), ("offset", "<u8"),
                   ("bytes", "<u4"), ("chars", "<u4")])
_TASK_BYTES = 4 << 20
_TASK_FILES = 2000


@dataclasses.dataclass(frozen=True)
class SpoolTask:
    """Some files to read into one spool file; plain values, so that it travels to a worker process."""

    number: int
    files: tuple[CorpusFile, ...]
    spool: str
    max_chars: int
    min_chars: int


@dataclasses.dataclass
class SpoolResult:
    """What a task found: records of RECORD with `source` an index into `sources`."""

    records: np.ndarray
    sources: list[str]
    skipped: SkipReport
    bytes_read: int


@dataclasses.dataclass
class Spooled:
    """All documents of the corpus, in corpus order.

    Attributes:
      records: array of RECORD; duplicates are still there.
      sources: names that `records["source"]` counts into, sorted.
      skipped: what was left out and why.
      spools: the spool files that `records["spool"]` counts into.
    """

    records: np.ndarray
    sources: list[str]
    skipped: SkipReport
    spools: list[str]


def content_hash(text: bytes) -> tuple[int, int]:
    """The hash by which a document is known: its first 8 bytes are its id and decide its split."""
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def plan(files: Sequence[CorpusFile], folder: str, max_chars: int, min_chars: int) -> list[SpoolTask]:
    """Groups files into tasks of a few megabytes, by the files alone and not by the number of workers."""
    groups: list[list[CorpusFile]] = []
    size = _TASK_BYTES
    for file in files:
        if size >= _TASK_BYTES or len(groups[-1]) >= _TASK_FILES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    return [SpoolTask(i, tuple(group), os.path.join(folder, f"spool-{i:05d}"), max_chars, min_chars)
            for i, group in enumerate(groups)]


def run_task(task: SpoolTask) -> SpoolResult:
    """Reads a task's files and writes its spool file; what a skipped file had yielded is taken back."""
    records = _Records()
    sources: dict[str, int] = {}
    skipped = SkipReport()
    with open(task.spool, "wb") as spool:
        for file in task.files:
            first_record, first_byte = len(records), spool.tell()
            of_file = SkipReport()
            try:
                for source, text in read_texts(file, of_file, task.max_chars):
                    if len(text) < task.min_chars or len(text.strip()) < task.min_chars:
                        of_file.add(f"document under {task.min_chars} characters", file.name)
                        continue
                    content = text.encode("utf-8")
                    records.append((*content_hash(content), sources.setdefault(source, len(sources)), task.number,
                                    spool.tell(), len(content), len(text)))
                    spool.write(content)
            except SkippedFile as error:
                records.truncate(first_record)
                spool.seek(first_byte)
                spool.truncate()
                of_file = SkipReport()
                of_file.add(str(error), file.name)
            skipped.merge(of_file)
    return SpoolResult(records.array(), list(sources), skipped, sum(file.size for file in task.files))


class _Records:
    """A growing array of RECORD that can be cut back; a single file may hold millions."""

    _CHUNK = 1 << 16

    def __init__(self) -> None:
        self._chunks: list[np.ndarray] = []
        self._last: list[tuple] = []
        self._flushed = 0

    def __len__(self) -> int:
        return self._flushed + len(self._last)

    def append(self, record: tuple) -> None:
        self._last.append(record)
        if len(self._last) >= self._CHUNK:
            self._chunks.append(np.array(self._last, RECORD))
            self._flushed += len(self._last)
            self._last = []

    def truncate(self, length: int) -> None:
        kept = self.array()[:length]
        self._chunks, self._last, self._flushed = [kept], [], length

    def array(self) -> np.ndarray:
        return np.concatenate([np.empty(0, RECORD), *self._chunks, np.array(self._last, RECORD)])


def collect(tasks: Sequence[SpoolTask], results: Sequence[SpoolResult]) -> Spooled:
    """Joins the results of all tasks, given in the order of the tasks."""
    used = [{result.sources[i] for i in np.unique(result.records["source"])} for result in results]
    sources = sorted(set().union(*used))
    numbers = {name: i for i, name in enumerate(sources)}
    skipped = SkipReport()
    for result in results:
        result.records["source"] = np.array([numbers.get(name, 0) for name in result.sources], np.uint32)[
            result.records["source"]] if len(result.records) else 0
        skipped.merge(result.skipped)
    records = np.concatenate([np.empty(0, RECORD), *(result.records for result in results)])
    return Spooled(records, sources, skipped, [task.spool for task in tasks])


def read_spooled(records: np.ndarray, spools: Sequence[str]) -> Iterator[str]:
    """The texts of `records`, which are read in the order given; cheapest in corpus order."""
    opened, file = None, None
    try:
        for record in records:
            if record["spool"] != opened:
                if file is not None:
                    file.close()
                opened, file = record["spool"], open(spools[record["spool"]], "rb")
            file.seek(int(record["offset"]))
            yield file.read(int(record["bytes"])).decode("utf-8")
    finally:
        if file is not None:
            file.close()
