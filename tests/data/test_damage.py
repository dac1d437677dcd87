"""Whatever is damaged or missing in a data directory ends in one message that names it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from llm_jax import storage
from llm_jax.data import manifest as manifests
from llm_jax.data.documents import DocumentStore, read_documents
from llm_jax.data.loader import DataConfig, TrainLoader
from llm_jax.data.manifest import load_manifest
from llm_jax.data.prepare import prepare
from llm_jax.errors import UserError

SHARD = "train-00000-of-00001.array_record"


@pytest.fixture
def data_dir(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


@pytest.fixture(params=["small", "large"])
def cached(request, monkeypatch, tmp_path):
    """Runs a test both where files are always hashed and where what was hashed is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "large":
        monkeypatch.setattr(manifests, "_ALWAYS_HASH_BYTES", 0)
    return request.param


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [_truncate, _flip, _remove])
@pytest.mark.parametrize("name", [SHARD, "tokenizer.model", "train.index.npy"])
def test_damaged_files_are_named(data_dir, cached, damage, name):
    load_manifest(data_dir)
    damage(data_dir / name)
    for use in (lambda: TrainLoader(DataConfig(str(data_dir), 32, 8)), lambda: next(read_documents(data_dir, "train"))):
        with pytest.raises(UserError, match=f"{name} .*FORCE=True"):
            use()


def test_preparing_again_notices_damage_and_force_mends_it(data_dir, small_corpus):
    _flip(data_dir / SHARD)
    with pytest.raises(UserError, match=SHARD):
        prepare(str(data_dir), str(small_corpus), vocab_size=400, verbose=False)
    prepare(str(data_dir), str(small_corpus), vocab_size=400, verbose=False, force=True)
    load_manifest(data_dir)


def test_damage_that_hashing_missed_is_met_when_it_is_read(data_dir):
    """Disks can turn bits without changing a file's times; the shard's own checksums notice."""
    manifest = load_manifest(data_dir)
    _flip(data_dir / SHARD)
    store = DocumentStore(data_dir, manifest, "train")
    with pytest.raises(UserError, match=f"{SHARD} is damaged"):
        for i in range(len(store.index)):
            store.read([i])


@pytest.mark.parametrize(("content", "message"), [
    (None, "holds no prepared data"), (b"", "is damaged"), (b"{", "is damaged"), (b"[]", "is damaged"),
    (b'{"format": 1}', "is damaged"), (b'{"format": 99, "files": {}}', "is of format 99"),
    (b'{"format": 1, "files": 3}', "FORCE")])
def test_manifest(data_dir, content, message):
    (data_dir / "manifest.json").unlink()
    if content is not None:
        (data_dir / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_manifest(data_dir)


def test_an_index_that_does_not_fit_is_one_message(data_dir):
    index = np.load(data_dir / "train.index.npy")
    manifest = json.loads((data_dir / "manifest.json").read_text())
    for wrong, message in ((index[:-1], "documents"), (index["length"], "not an index of this version")):
        np.save(data_dir / "train.index.npy", wrong)
        with pytest.raises(UserError, match=message):
            DocumentStore(data_dir, manifest, "train")


def test_large_directories_are_hashed_once(data_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(manifests, "_ALWAYS_HASH_BYTES", 0)
    hashed = []
    monkeypatch.setattr(manifests.storage, "sha256_of", lambda path: hashed.append(path) or real(path))
    load_manifest(data_dir)
    count = len(hashed)
    assert count == len(json.loads((data_dir / "manifest.json").read_text())["files"])
    load_manifest(data_dir)
    assert len(hashed) == count
    shutil.copy(data_dir / SHARD, data_dir / "copy")
    (data_dir / "copy").replace(data_dir / SHARD)
    load_manifest(data_dir)
    assert hashed[count:] == [data_dir / SHARD]


real = storage.sha256_of


def test_a_cache_directory_that_cannot_be_written_changes_nothing(data_dir, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(manifests, "_ALWAYS_HASH_BYTES", 0)
    load_manifest(data_dir)
    _flip(data_dir / SHARD)
    with pytest.raises(UserError, match=SHARD):
        load_manifest(data_dir)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    storage.write_atomically(tmp_path / "a" / "b.txt", b"old")
    with pytest.raises(TypeError):
        storage.write_atomically(tmp_path / "a" / "b.txt", "not bytes")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"] and (tmp_path / "a/b.txt").read_bytes() == b"old"
