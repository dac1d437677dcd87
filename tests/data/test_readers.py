"""Files of every kind are read in pieces, and what is not text is counted with its reason."""

from __future__ import annotations

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llm_jax.data import corpus, readers, spool
from llm_jax.errors import UserError

TEXT = "Some text that is long enough to be a document of its own.\nAnd a second line: 天地玄黄。\n"
CHINESE = "却说那日天气很好，我们一起去了山里，看见了许多不同的人和事，大家都说这是一个好地方，以后还要再来。" * 3


def _read(path, max_chars=1000):
    """The (source, text) pairs of a file and what was skipped, as a spool task sees them."""
    files, skipped = corpus.list_files([str(path)])
    task = spool.SpoolTask(0, tuple(files), str(path) + ".spool", max_chars, 50)
    result = spool.run_task(task)
    os.rename(task.spool, str(path) + ".read")
    skipped.merge(result.skipped)
    texts = list(spool.read_spooled(result.records, [str(path) + ".read"]))
    sources = [result.sources[i] for i in result.records["source"]]
    return list(zip(sources, texts, strict=True)), {k: v["count"] for k, v in skipped.to_dict().items()}


def _compress(path, content):
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":  # two frames, as parallel compressors write
        half = len(content) // 2
        content = zstandard.compress(content[:half]) + zstandard.compress(content[half:])
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["a.txt", "a.py", "noending", "a.txt.gz", "a.txt.zst"])
def test_text(tmp_path, name):
    _compress(tmp_path / name, TEXT.replace("\n", "\r\n").encode())
    assert _read(tmp_path / name) == ([(".", TEXT)], {})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "gb18030"])
def test_other_encodings_that_can_be_told(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(CHINESE.encode(encoding))
    assert _read(tmp_path / "a.txt") == ([(".", CHINESE)], {})


@pytest.mark.parametrize(("content", "reason"), [
    ("Un café très agréable où l'élève préféré a été reçu à Noël. ".encode("latin-1") * 20, "not UTF-8 text"),
    ("대한민국의 모든 국민은 법 앞에 평등하다. 누구든지 차별을 받지 않는다. ".encode("euc-kr") * 20, "not UTF-8 text"),
    ("日本国民は、正当に選挙された国会における代表者を通じて行動し。".encode("euc-jp") * 20, "not UTF-8 text"),
    ("日本国民は、正当に選挙された国会における代表者を通じて行動し。".encode("shift-jis") * 20, "not UTF-8 text"),
    ("天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏".encode("big5") * 20, "not UTF-8 text"),
    (b"good text " * 20_000 + b"\xff\xfe and bad" * 10, "not UTF-8 text"),
    (bytes(range(256)) * 100, "binary file"),
    (b"\x7fELF" + b"\0" * 1000, "binary file"),
    (b"", "empty file"),
    (gzip.compress(b"", mtime=0), "empty file"),  # a time in it would name the test anew every second
    (b"too short", "document under 50 characters"),
    (b"\n" * 500, "document under 50 characters"),
])
def test_what_is_not_text_is_counted(tmp_path, content, reason):
    path = tmp_path / ("a.gz" if content[:2] == b"\x1f\x8b" else "a.txt")
    path.write_bytes(content)
    assert _read(path) == ([], {reason: 1})


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_truncated_compressed_file_counts_as_nothing(tmp_path, ending):
    path = tmp_path / f"a.jsonl.{ending}"
    lines = "".join(json.dumps({"text": f"{i} {os.urandom(200).hex()}"}) + "\n" for i in range(500))
    _compress(path, lines.encode())
    content = path.read_bytes()
    for missing in (1, 2000, len(content) // 2 + 10):
        path.write_bytes(content[:-missing])
        assert _read(path) == ([], {"damaged compressed file": 1})


def test_compressed_garbage(tmp_path):
    for name in ("a.gz", "a.zst"):
        (tmp_path / name).write_bytes(b"this is not compressed at all" * 10)
        assert _read(tmp_path / name) == ([], {"damaged compressed file": 1})


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst"])
def test_jsonl(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    lines = [
        json.dumps({"text": TEXT}).encode(), json.dumps({"text": CHINESE, "source": "novels"}).encode(), b"",
        b'{"text": "cut off', b"[1, 2]", b'{"text": 7}', b'{"body": "x"}', b"\xff\xfe",
        b'{"text": "' + b"a lone surrogate in a long enough text, that is " * 2 + b'\\ud800"}', b'{"text": "short"}',
        json.dumps({"text": TEXT.upper().replace("\n", "\r\n"), "source": 3}, ensure_ascii=False).encode(),
    ]
    _compress(path, b"\xef\xbb\xbf" + b"\n".join(lines))
    texts, skipped = _read(path)
    assert texts == [(".", TEXT), ("novels", CHINESE), (".", TEXT.upper())]
    assert skipped == {
        'JSONL line without a "text" string': 3, "JSONL line that is not JSON": 1, "JSONL line that is not UTF-8": 1,
        "text with a lone surrogate": 1, "document under 50 characters": 1}


def test_a_jsonl_line_of_any_length_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in (TEXT, "x" * 5000, TEXT + "2")))
    assert _read(path) == ([(".", TEXT), (".", TEXT + "2")], {"JSONL line over 64 MiB": 1})


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{i}: {TEXT}" for i in range(700)]
    table = pa.table({"text": [*texts, None, "short"], "source": ["web"] * 699 + [None] * 3, "n": [1] * 702})
    pq.write_table(table, path, row_group_size=300)
    read, skipped = _read(path)
    assert read == [("web" if i < 699 else ".", text) for i, text in enumerate(texts)]
    assert skipped == {"Parquet row without text": 1, "document under 50 characters": 1}


def test_parquet_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": [TEXT]}), path)
    assert _read(path) == ([], {'Parquet file without a "text" column of strings': 1})
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert _read(path) == ([], {'Parquet file without a "text" column of strings': 1})
    pq.write_table(pa.table({"text": [TEXT + str(i) for i in range(5000)]}), path, row_group_size=500)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:len(content) // 2])
    assert _read(path) == ([], {"damaged Parquet file": 1})
    content[len(content) // 3:len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)
    assert _read(path) == ([], {"damaged Parquet file": 1})


def test_a_long_file_of_one_line_is_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word " * 100_000)
    texts, skipped = _read(path)
    assert "".join(text for _, text in texts) == "word " * 100_000
    assert max(len(text) for _, text in texts) <= 1250 and skipped == {}


def test_an_unreadable_file_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT)
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *args, **kwargs: False)
        with pytest.raises(UserError, match="cannot read .*a.txt: permission denied"):
            corpus.list_files([str(tmp_path)])

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(readers, "_open", refuse)
    with pytest.raises(UserError, match="cannot read .*a.txt: Permission denied"):
        _read(tmp_path / "a.txt")
