"""Opens one corpus file of any size and yields its texts in bounded pieces."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import IO

import zstandard

from llm_jax.data import cleaning
from llm_jax.data.corpus import CorpusFile, SkipReport
from llm_jax.errors import UserError

_BLOCK_CHARS = 1 << 20
_HEAD_BYTES = 1 << 16
# A JSONL line is held whole; longer ones are counted and passed over.
_MAX_LINE_BYTES = 64 << 20
_PARQUET_BATCH_ROWS = 256
_JSONL = (".jsonl", ".ndjson")
# In this order: the mark of UTF-32, little end first, begins with that of UTF-16.
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# Bytes that occur in no text: control characters other than \t \n \f \r, backspace and escape.
_BINARY_BYTES = bytes(sorted(set(range(32)) - {8, 9, 10, 12, 13, 27}))
# The commonest characters of Chinese prose, about two fifths of any page in simplified or traditional script.
_COMMON_CHINESE = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
    "個們來為國說時會對過後裡經麼學現當沒動還進樣開從實這於著發"
)


class SkippedFile(Exception):
    """The file holds no usable text; its message is the reason under which it is counted."""


def read_texts(file: CorpusFile, skipped: SkipReport, max_chars: int) -> Iterator[tuple[str, str]]:
    """Yields `(source, document)` for everything in a file, normalised and cut but not yet filtered by length.

    Args:
      file: what to read; its name's endings (`.jsonl`, `.ndjson`, `.parquet`, plain, with `.gz` or `.zst`) decide how.
      skipped: where lines and rows that are passed over are counted.
      max_chars: wanted length of a long text's pieces, in characters (`cleaning.documents_of`).

    Raises:
      SkippedFile: the file is not text, or damaged; what was yielded before must be forgotten.
      UserError: the operating system refuses to read it.
    """
    name = file.path.lower()
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(file, skipped, max_chars)
        elif name.removesuffix(".gz").removesuffix(".zst").endswith(_JSONL):
            with _open(file.path) as stream:
                yield from _read_jsonl(file, stream, skipped, max_chars)
        else:
            encoding = _sniff(file.path)
            with _open(file.path) as stream:
                text = io.TextIOWrapper(stream, encoding=encoding, errors="strict", newline=None)
                blocks = iter(lambda: text.read(_BLOCK_CHARS), "")
                for document in cleaning.documents_of(map(cleaning.normalise, blocks), max_chars):
                    yield file.source, document
    except UnicodeError as error:
        raise SkippedFile("not UTF-8 text") from error
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise SkippedFile("damaged compressed file") from error
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error.strerror or error}") from error


def _open(path: str) -> IO[bytes] | gzip.GzipFile:
    """The file's bytes, decompressed as they are read."""
    name = path.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(open(path, "rb")), _HEAD_BYTES)
    return open(path, "rb")


class _ZstdStream(io.RawIOBase):
    """The decompressed bytes of a .zst file; unlike the library's own reader, it notices a file that ends too soon."""

    # Little, because what each read decompresses to is held whole, and a repetitive text shrinks ten-thousandfold.
    _COMPRESSED_BYTES = 1 << 10

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._decompressor.decompressobj()
        self._within_frame = False
        self._ready = b""
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while self._at == len(self._ready):
            compressed = self._frame.unused_data if self._frame.eof else b""
            compressed = compressed or self._file.read(self._COMPRESSED_BYTES)
            if not compressed:
                if self._within_frame:
                    raise EOFError("the file ends within a frame")
                return 0
            if self._frame.eof:  # several frames may follow one another
                self._frame = self._decompressor.decompressobj()
            self._ready, self._at = self._frame.decompress(compressed), 0
            self._within_frame = not self._frame.eof
        count = min(len(buffer), len(self._ready) - self._at)
        buffer[:count] = self._ready[self._at:self._at + count]
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _sniff(path: str) -> str:
    """The encoding of a text file, judged by its first 64 KiB; raises SkippedFile if it is not text."""
    with _open(path) as stream:
        head = stream.read(_HEAD_BYTES)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if not head:
        raise SkippedFile("empty file")
    binary = len(head) - len(head.translate(None, _BINARY_BYTES))
    if head.count(0) * 100 > len(head) or binary * 10 > len(head):
        raise SkippedFile("binary file")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return "utf-8"
    except UnicodeDecodeError:
        if _is_gb18030(head):
            return "gb18030"
        raise


def _is_gb18030(head: bytes) -> bool:
    """Whether text that is not UTF-8 is Chinese in GB 18030: it decodes, and reads like Chinese.

    Text in other encodings may decode too, but into rare characters: at least a fifth of the Chinese characters must be
    among the commonest, and they must be most of what is not ASCII.
    """
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(head)
    except UnicodeDecodeError:
        return False
    chinese = re.findall("[\u3400-\u9fff]", text)
    others = len(re.findall("[^\x00-\x7f\u3400-\u9fff\u2010-\u203b\u3000-\u303f\uff00-\uffef]", text))
    common = sum(character in _COMMON_CHINESE for character in chinese)
    return len(chinese) >= 20 and common * 5 >= len(chinese) and others * 10 <= len(chinese)


def _read_jsonl(file: CorpusFile, stream: IO[bytes] | gzip.GzipFile, skipped: SkipReport,
                max_chars: int) -> Iterator[tuple[str, str]]:
    number = 0
    while line := stream.readline(_MAX_LINE_BYTES):
        number += 1
        place = f"{file.name}:{number}"
        if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(_MAX_LINE_BYTES)
            skipped.add("JSONL line over 64 MiB", place)
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            skipped.add("JSONL line that is not UTF-8", place)
            continue
        except (ValueError, RecursionError):
            skipped.add("JSONL line that is not JSON", place)
            continue
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            skipped.add('JSONL line without a "text" string', place)
            continue
        yield from _documents(text, record.get("source"), file, place, skipped, max_chars)


def _read_parquet(file: CorpusFile, skipped: SkipReport, max_chars: int) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow as pa  # takes half a second to import, for files that most corpora lack
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{file.path}: reading Parquet needs pyarrow; install it or take the file out") from error
    try:
        with pq.ParquetFile(file.path) as table:
            schema = table.schema_arrow
            if "text" not in schema.names or not _is_text(pa, schema.field("text").type):
                raise SkippedFile('Parquet file without a "text" column of strings')
            has_source = "source" in schema.names and _is_text(pa, schema.field("source").type)
            columns = ["text", "source"] if has_source else ["text"]
            number = 0
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(_PARQUET_BATCH_ROWS, row_groups=[group], columns=columns):
                    texts = batch.column("text")
                    sources = batch.column("source") if has_source else None
                    for row in range(batch.num_rows):
                        number += 1
                        place = f"{file.name}:{number}"
                        try:
                            text = texts[row].as_py()
                            source = sources[row].as_py() if sources is not None else None
                        except UnicodeDecodeError:
                            skipped.add("Parquet row that is not UTF-8", place)
                            continue
                        if text is None:
                            skipped.add("Parquet row without text", place)
                            continue
                        yield from _documents(text, source, file, place, skipped, max_chars)
    except pa.ArrowException as error:
        raise SkippedFile("damaged Parquet file") from error
    except OSError as error:  # pyarrow reports both damaged pages and refused reads as OSError
        if error.errno is None:
            raise SkippedFile("damaged Parquet file") from error
        raise


def _is_text(pa, kind) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _documents(text: str, source: object, file: CorpusFile, place: str, skipped: SkipReport,
               max_chars: int) -> Iterator[tuple[str, str]]:
    """The documents of one JSON or Parquet text, under its own source if it names one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        skipped.add("text with a lone surrogate", place)
        return
    name = file.source
    if isinstance(source, str) and source:
        name = source.encode("utf-8", "replace").decode("utf-8")
    for document in cleaning.documents_of([cleaning.normalise(text)], max_chars):
        yield name, document
