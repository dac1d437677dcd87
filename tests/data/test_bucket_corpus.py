"""A corpus in a bucket: what the same files on a disk are."""

from __future__ import annotations

import json
import pathlib

import pytest

from llm_jax import storage
from llm_jax.data.prepare import prepare
from llm_jax.errors import UserError
from tests.fake_bucket import bucket  # noqa: F401 (fixture)

OPTIONS = dict(vocab_size=320, max_document_chars=2000, num_workers=1, verbose=False)


@pytest.fixture
def texts(tmp_path):
    """A folder with sources below it, and things that no corpus takes."""
    folder = tmp_path / "texts"
    for number, path in enumerate(sorted(pathlib.Path(json.__file__).parent.glob("*.py"))):
        for source in ("one", "two"):
            (folder / source).mkdir(parents=True, exist_ok=True)
            (folder / source / path.name).write_text(f"# {source} {number}\n{path.read_text()}")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "secret.txt").write_text("not this")
    return folder


def upload(folder, address):
    for path in folder.rglob("*"):
        if path.is_file():
            storage.copy_atomically(path, storage.located(address) / path.relative_to(folder).as_posix())


def test_a_folder_in_a_bucket_gives_the_data_of_the_folder(texts, bucket, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = f"{bucket}/corpora/texts"
    upload(texts, address)
    here = prepare(str(tmp_path / "here"), corpus=str(texts), **OPTIONS)
    there = prepare(str(tmp_path / "there"), corpus=f"{address}/", **OPTIONS)
    assert there.manifest["data_hash"] == here.manifest["data_hash"]
    assert there.manifest["corpus"]["parts"] == [address]
    assert prepare(str(tmp_path / "there"), corpus=address, **OPTIONS).reused
    assert capsys.readouterr().err.count(f"copying {address} to ") == 1

    changed = storage.located(address) / "one" / "decoder.py"
    changed.write_text(changed.read_text().replace("a", "b"))  # of the same size
    again = prepare(str(tmp_path / "again"), corpus=address, **OPTIONS)
    assert again.manifest["data_hash"] != here.manifest["data_hash"]
    assert capsys.readouterr().err.count("copying") == 1


def test_one_file_beside_a_folder_on_a_disk(texts, bucket, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    upload(texts, f"{bucket}/texts")
    file = "one/encoder.py"
    here = prepare(str(tmp_path / "here"), corpus=[str(texts / "two"), str(texts / file)], **OPTIONS)
    there = prepare(str(tmp_path / "there"), corpus=[str(texts / "two"), f"{bucket}/texts/{file}"], **OPTIONS)
    assert there.manifest["data_hash"] == here.manifest["data_hash"]


def test_what_cannot_be_is_said(texts, bucket, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the corpus gs://bucket/nothing does not exist, or holds no file"):
        prepare(str(tmp_path / "data"), corpus=f"{bucket}/nothing", **OPTIONS)
    with pytest.raises(UserError, match="may begin with gs://, s3://, not with ftp://"):
        prepare(str(tmp_path / "data"), corpus="ftp://host/texts", **OPTIONS)
    with pytest.raises(UserError, match="gs://bucket/data: data are prepared on a disk"):
        prepare(f"{bucket}/data", corpus=str(texts), **OPTIONS)
    assert not (tmp_path / "gs:").exists()
