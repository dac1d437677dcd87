"""The whole way from files to shards: complete, reproducible, restartable, and careful with what is already there."""

from __future__ import annotations

import collections
import json
import math
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llm_jax.data import prepare as prepare_module
from llm_jax.data import shards, workers
from llm_jax.data.documents import read_documents, read_index
from llm_jax.data.manifest import load_manifest
from llm_jax.data.prepare import prepare
from llm_jax.data.spool import content_hash
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError
from tests.data import tokenizer_kinds as kinds

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPLITS = ("train", "validation", "test")


def _prepare(data_dir, corpus, **options):
    return prepare(str(data_dir), str(corpus), **{"vocab_size": 400, "verbose": False} | options)


def _content(data_dir):
    return {path.name: path.read_bytes() for path in pathlib.Path(data_dir).iterdir() if path.is_file()
            and path.name != "manifest.json"}


def test_what_went_in_comes_out_once(small_corpus, prepared):
    tokenizer = Tokenizer.load(prepared)
    texts = collections.Counter()
    for split in SPLITS:
        for name, tokens in read_documents(prepared, split):
            assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id and tokens.dtype == np.uint32
            text = tokenizer.decode(tokens)
            number = content_hash(text.encode())[0]
            assert name == f"{number:016x}"
            texts[text] += 1
    files = {path.read_text() for path in small_corpus.rglob("*") if path.is_file()}
    assert texts == collections.Counter(files)


def test_manifest(small_corpus, prepared):
    manifest = load_manifest(prepared)
    assert list(manifest["sources"]) == [".", "english", "中文"]
    for split in SPLITS:
        documents = list(read_documents(prepared, split))
        facts, index = manifest["splits"][split], read_index(prepared, split)
        assert facts["documents"] == len(documents) == len(index)
        assert facts["tokens"] == sum(len(tokens) for _, tokens in documents)
        assert index["length"].tolist() == [len(tokens) for _, tokens in documents]
        assert [f"{i:016x}" for i in index["id"]] == [name for name, _ in documents]
        assert facts["bytes"] == index["bytes"].sum()
        for number, counts in enumerate(manifest["sources"].values()):
            assert counts[split] == (index["source"] == number).sum() >= 1
    assert set(manifest["files"]) == set(_content(prepared)) - {".lock"}
    assert manifest["settings"]["corpus"] == [str(small_corpus)] and manifest["corpus"]["files"] == 72
    assert manifest["vocab_size"] == Tokenizer.load(prepared).vocab_size


def test_unigram_bits_per_byte(prepared):
    vocab = Tokenizer.load(prepared).vocab_size
    train = collections.Counter(t for _, tokens in read_documents(prepared, "train") for t in tokens[1:].tolist())
    bits = sum(-math.log2((train[t] + 1) / (train.total() + vocab))
               for _, tokens in read_documents(prepared, "validation") for t in tokens[1:].tolist())
    manifest = load_manifest(prepared)
    assert manifest["unigram_bits_per_byte"] == pytest.approx(bits / manifest["splits"]["validation"]["bytes"])


def test_output_is_the_same_for_any_number_of_workers(small_corpus, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_POOL_BYTES", 0)
    _prepare(tmp_path / "two", small_corpus, num_workers=2)
    assert _content(tmp_path / "two") == _content(prepared)
    assert load_manifest(tmp_path / "two")["data_hash"] == load_manifest(prepared)["data_hash"]
    assert not multiprocessing.active_children()


def test_several_shards_hold_the_same_documents(small_corpus, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MIN_SHARD_TEXT", 8000)
    _prepare(tmp_path / "many", small_corpus)
    assert len(load_manifest(tmp_path / "many")["splits"]["train"]["shards"]) > 2
    for split in SPLITS:
        many, few = (list(read_documents(d, split)) for d in (tmp_path / "many", prepared))
        assert [(i, t.tolist()) for i, t in many] == [(i, t.tolist()) for i, t in few]


def test_a_second_run_finds_everything_done(small_corpus, tmp_path, capsys):
    first = prepare(str(tmp_path / "d"), str(small_corpus), vocab_size=400)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()}
    second = prepare(str(tmp_path / "d"), str(small_corpus), vocab_size=400, num_workers=3)
    assert not first.reused and second.reused and second.manifest == first.manifest and second.seconds < 1
    assert before.items() - {p.name: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()}.items() <= {
        (".lock", before[".lock"])}
    out = capsys.readouterr().out
    assert "prepared: " in out and "already prepared: " in out and "unigram" in out


def test_other_settings_or_another_corpus_need_a_decision(small_corpus, tmp_path):
    corpus = tmp_path / "c"
    corpus.mkdir()
    for path in sorted(small_corpus.glob("*.py")):
        (corpus / path.name).write_bytes(path.read_bytes())
    _prepare(tmp_path / "d", corpus)
    with pytest.raises(UserError, match="was prepared with vocab_size=400, not 500; .*FORCE=True"):
        _prepare(tmp_path / "d", corpus, vocab_size=500)
    with pytest.raises(UserError, match="was prepared with corpus="):
        _prepare(tmp_path / "d", small_corpus)
    (corpus / "new.py").write_text("print('a new document, of more than fifty characters in all')\n")
    with pytest.raises(UserError, match="corpus has changed .* 24 files .* 25 files"):
        _prepare(tmp_path / "d", corpus)
    assert _prepare(tmp_path / "d", corpus, force=True).manifest["corpus"]["files"] == 25
    load_manifest(tmp_path / "d")


def test_duplicates_go_and_short_ones_too(tmp_path):
    corpus = tmp_path / "c"
    corpus.mkdir()
    for i in range(8):
        (corpus / f"{i}.txt").write_text(f"document number {i // 2} " + "with words to make it long enough " * 3)
    (corpus / "short.txt").write_text("short")
    manifest = _prepare(tmp_path / "d", corpus).manifest
    assert sum(facts["documents"] for facts in manifest["splits"].values()) == 4
    assert manifest["skipped"]["exact duplicate document"]["count"] == 4
    assert manifest["skipped"]["document under 50 characters"] == {"count": 1, "examples": ["short.txt"]}


def test_a_growing_corpus_keeps_its_sides(small_corpus, prepared, tmp_path):
    corpus = tmp_path / "c"
    corpus.mkdir()
    for path in [p for p in small_corpus.rglob("*") if p.is_file()]:
        (corpus / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    for i in range(30):
        (corpus / f"new-{i}.txt").write_text(f"number {i} " * 30)
    _prepare(tmp_path / "d", corpus, vocab_size=300)
    for split in SPLITS:
        plain = {i for i, _ in read_documents(prepared, split)
                 if np.searchsorted([0.8, 0.9], int(i, 16) / 2**64, side="right") == SPLITS.index(split)}
        assert plain <= {i for i, _ in read_documents(tmp_path / "d", split)}


@pytest.mark.parametrize("text", [
    "It was the best of times, it was the worst of times.\n\n" * 3000,
    "".join(f"第{i}回　却说宝玉听了这话，心中甚是欢喜，便往园中去了。" for i in range(3000)),
    "".join(f"Sentence number {i} of a short text. " for i in range(60)),
], ids=["long", "chinese", "short"])
def test_one_book_still_splits(tmp_path, text):
    text = "".join(f"{i % 97} {c}" if c == "\n" else c for i, c in enumerate(text))  # no two parts alike
    (tmp_path / "book.txt").write_text(text)
    manifest = _prepare(tmp_path / "d", tmp_path / "book.txt").manifest
    assert all(facts["documents"] >= 1 and facts["tokens"] > 2 for facts in manifest["splits"].values())
    tokenizer = Tokenizer.load(tmp_path / "d")
    assert sum(len(tokenizer.decode(t)) for s in SPLITS for _, t in read_documents(tmp_path / "d", s)) == len(text)


def test_the_tokenizer_is_trained_on_the_training_side_alone(small_corpus, prepared, tmp_path, monkeypatch):
    seen = []
    train = prepare_module.tokenizer_training.train_tokenizer

    def spy(texts, vocab_size):
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(prepare_module.tokenizer_training, "train_tokenizer", spy)
    _prepare(tmp_path / "d", small_corpus)
    ids = {f"{content_hash(text.encode())[0]:016x}" for text in seen}
    assert ids == {i for i, _ in read_documents(prepared, "train")}


@pytest.mark.parametrize("files", [{}, {"a.txt": b"too short"}, {"a.bin": bytes(500)}, {"a.jsonl": b"{}\n"}])
def test_an_empty_corpus_is_one_message(tmp_path, files):
    (tmp_path / "c").mkdir()
    for name, content in files.items():
        (tmp_path / "c" / name).write_bytes(content)
    with pytest.raises(UserError, match="the corpus .*c is empty: it holds no document"):
        _prepare(tmp_path / "d", tmp_path / "c")
    assert [p.name for p in (tmp_path / "d").iterdir()] == [".lock"]


@pytest.mark.parametrize(("options", "message"), [
    ({"vocab_size": 100}, "vocab_size must be .* at least 272, not 100"), ({"num_workers": 0.5}, "num_workers"),
    ({"max_document_chars": 10}, "max_document_chars"), ({"min_document_chars": "5"}, "min_document_chars")])
def test_wrong_settings_are_one_message(small_corpus, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        _prepare(tmp_path / "d", small_corpus, **options)
    assert not (tmp_path / "d").exists()


def test_a_data_directory_that_cannot_be_written_is_one_message(small_corpus, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write the data directory"):
        _prepare(tmp_path / "file" / "d", small_corpus)


def test_two_preparations_of_one_directory_exclude_each_other(small_corpus, tmp_path):
    with prepare_module._locked(tmp_path), pytest.raises(UserError, match="another process is preparing"):
        _prepare(tmp_path, small_corpus)


@pytest.mark.parametrize("stage", ["train_tokenizer", "write_shard", "publish"])
def test_an_interruption_leaves_nothing_that_looks_whole(small_corpus, prepared, tmp_path, monkeypatch, stage):
    with monkeypatch.context() as patched:
        if stage == "train_tokenizer":
            patched.setattr(prepare_module.tokenizer_training, "train_tokenizer", _interrupt)
        elif stage == "write_shard":
            patched.setattr(shards.storage, "sha256_of", _interrupt)
        else:
            patched.setattr(prepare_module.storage, "write_atomically", _interrupt_at_manifest)
        with pytest.raises(KeyboardInterrupt):
            _prepare(tmp_path / "d", small_corpus)
    with pytest.raises(UserError, match="holds no prepared data"):
        load_manifest(tmp_path / "d")
    assert not _prepare(tmp_path / "d", small_corpus).reused
    assert _content(tmp_path / "d") == _content(prepared)


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def _interrupt_at_manifest(path, content):
    if path.name == "manifest.json":
        raise KeyboardInterrupt
    path.write_bytes(content)


def test_a_killed_preparation_starts_again_and_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "experiments.prepare", f"--gin.DATA_DIR='{tmp_path / 'd'}'", "--gin.WORKERS=2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("d/.preparing/spool-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("d/.preparing/*")) and not (tmp_path / "d" / "manifest.json").exists()
    while _group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group_members(process.pid)
    (tmp_path / "c.txt").write_text("\n\n".join(f"paragraph {i} of a short corpus" for i in range(200)))
    _prepare(tmp_path / "d", tmp_path / "c.txt")
    assert not (tmp_path / "d" / ".preparing").exists()


def _group_members(group):
    """Processes of a session that have not ended."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == group and fields[0] not in "ZX":
            found.append(entry)
    return found


def _die(task):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_one_message():
    with pytest.raises(UserError, match="a worker process was killed"), workers.start(2) as pool:
        pool.map(_die, [1, 2], lambda result: None)
    assert not multiprocessing.active_children()


def test_the_script(small_corpus, tmp_path):
    def run(*flags):
        return subprocess.run([sys.executable, "-m", "experiments.prepare", *flags], cwd=ROOT, capture_output=True,
                              text=True, timeout=60)

    flags = [f"--gin.CORPUS='{small_corpus}'", f"--gin.DATA_DIR='{tmp_path / 'd'}'", "--gin.VOCAB_SIZE=400"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert "72 files" in done.stdout and "train" in done.stdout and "Traceback" not in done.stderr
    missing = run("--gin.CORPUS='/does/not/exist'", flags[1])
    assert missing.returncode == 2
    assert missing.stderr.strip().splitlines() == [
        "error: the corpus /does/not/exist does not exist; give the path of a file or a folder, or 'python-stdlib'"]
    shown = run("--help")
    assert shown.returncode == 0 and "DATA_DIR" in shown.stdout and "examples" in shown.stdout


def test_import_is_light():
    heavy = ("jax", "grain", "pyarrow", "torch")
    code = f"import sys, llm_jax.data.prepare; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(out.replace("'", '"')) == []


def test_a_tokenizer_that_is_there_already_is_taken(small_corpus, tmp_path):
    """Its files go into the data and its ids into the shards; with another tokenizer the data is other data."""
    source, data = kinds.byte_level(tmp_path / "hf"), tmp_path / "d"
    made = prepare(str(data), str(small_corpus), tokenizer=source, verbose=True)
    given, kept = Tokenizer.load(source), Tokenizer.load(data)
    assert made.manifest["vocab_size"] == given.vocab_size and kept.end_ids == given.end_ids
    assert {p.name for p in source.iterdir()} <= made.manifest["files"].keys()
    for _, tokens in read_documents(data, "validation"):
        assert tokens.tolist() == given.document_ids(given.decode(tokens))
    assert prepare(str(data), str(small_corpus), tokenizer=data, verbose=False).reused
    with pytest.raises(UserError, match="was prepared with"):
        prepare(str(data), str(small_corpus), verbose=False)
    prepare(str(data), str(small_corpus), vocab_size=300, force=True, verbose=False)
    assert not (data / "tokenizer.json").exists() and Tokenizer.load(data).vocab_size <= 300


def test_a_tokenizer_that_cannot_end_a_document_is_refused(small_corpus, tmp_path):
    json_file = kinds.byte_level(tmp_path / "hf") / "tokenizer.json"
    other = kinds.write(tmp_path / "other", tokenizer__json=json_file.read_bytes())
    with pytest.raises(UserError, match="no end-of-text token"):
        prepare(str(tmp_path / "d"), str(small_corpus), tokenizer=other, verbose=False)
