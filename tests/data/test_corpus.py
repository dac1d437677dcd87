"""Which files a corpus has, and what they are counted under."""

from __future__ import annotations

import os
import pathlib

import pytest

from llm_jax.data import corpus
from llm_jax.errors import UserError


def _put(path: pathlib.Path, text: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_sources_are_first_directories(tmp_path):
    for name in ("z.txt", "b/c/d.txt", "b/a.txt", "中文/一.txt", ".git/x", "b/__pycache__/y.pyc"):
        _put(tmp_path / name)
    files, skipped = corpus.list_files([str(tmp_path)])
    assert [(f.name, f.source, f.size) for f in files] == [
        ("b/a.txt", "b", 4), ("b/c/d.txt", "b", 4), ("z.txt", ".", 4), ("中文/一.txt", "中文", 4)]
    assert skipped.to_dict() == {
        "hidden, cache or excluded folder": {"count": 2, "examples": [".git/", "b/__pycache__/"]}}


def test_several_parts_keep_their_names(tmp_path):
    for name in ("one/x/a.txt", "one/b.txt", "two/x/a.txt", "c.jsonl"):
        _put(tmp_path / name)
    parts = corpus.resolve([str(tmp_path / name) for name in ("one", "two", "c.jsonl")])
    files, _ = corpus.list_files(parts)
    assert [f.source for f in files] == ["one", "one/x", "two/x", "c.jsonl"]


def test_odd_files_are_counted(tmp_path):
    _put(tmp_path / "good.txt")
    _put(tmp_path / "empty.txt", "")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "good.txt")
    os.mkfifo(tmp_path / "pipe")
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:
        file.write("text")
    files, skipped = corpus.list_files([str(tmp_path)])
    assert [f.name for f in files] == ["good.txt", "linked.txt", "\ufffd.txt"]
    assert {k: v["count"] for k, v in skipped.to_dict().items()} == {
        "empty file": 1, "broken link": 1, "not a regular file": 1}


def test_the_data_directory_is_no_part_of_the_corpus(tmp_path):
    _put(tmp_path / "a.txt")
    _put(tmp_path / "data/manifest.json")
    files, _ = corpus.list_files([str(tmp_path)], exclude=str(tmp_path / "data"))
    assert [f.name for f in files] == ["a.txt"]
    with pytest.raises(UserError, match="choose another DATA_DIR"):
        corpus.list_files([str(tmp_path)], exclude=str(tmp_path))


def test_python_stdlib():
    files, skipped = corpus.list_files(corpus.resolve("python-stdlib"))
    names = {f.name for f in files}
    assert {"json/decoder.py", "os.py"} <= names and all(name.endswith(".py") for name in names)
    assert not any({"site-packages", "__pycache__", "test", "tests"} & set(name.split("/")) for name in names)
    assert sum(f.size for f in files) > 5e6
    assert {f.source for f in files} >= {".", "json", "asyncio"}


def test_fingerprint_follows_names_and_sizes(tmp_path):
    _put(tmp_path / "a.txt")
    before = corpus.fingerprint(corpus.list_files([str(tmp_path)])[0])
    assert before == corpus.fingerprint(corpus.list_files([str(tmp_path)])[0])
    _put(tmp_path / "a.txt", "texts")
    assert before != corpus.fingerprint(corpus.list_files([str(tmp_path)])[0])


@pytest.mark.parametrize("given", ["/does/not/exist", ["/does/not/exist"]])
def test_a_missing_corpus_is_one_message(given):
    with pytest.raises(UserError, match="/does/not/exist does not exist"):
        corpus.resolve(given)


@pytest.mark.parametrize("given", [[], "", [""], [3]])
def test_no_corpus_is_one_message(given):
    with pytest.raises(UserError, match="CORPUS must be"):
        corpus.resolve(given)
