from __future__ import annotations

import pathlib

import pytest

from llm_jax import storage
from llm_jax.checkpoints import Checkpoints
from llm_jax.data.documents import load_manifest, read_documents
from llm_jax.data.loader import DataConfig, TrainLoader
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_location_is_the_same_from_every_folder(home):
    for path in ("~/run", "run", home / "run", storage.located("run")):
        assert str(storage.located(path)) == str(home / "run")
    for address in ("gs://bucket/run", storage.located("gs://bucket/run")):
        assert str(storage.located(address)) == "gs://bucket/run"
    assert storage.as_path("~/run") == home / "run" and storage.as_path("run") == pathlib.Path("run")


def test_data_below_home(home):
    (home / "a.txt").write_text("\n\n".join(f"This is paragraph number {i} of a short text about itself. " * 4
                                            for i in range(80)))
    prepare("~/data", "~/a.txt", vocab_size=300, num_workers=1, verbose=False)
    assert (home / "data" / "manifest.json").is_file() and not (home / "~").exists()
    load_manifest("~/data")
    assert list(read_documents("~/data", "train"))
    assert Tokenizer.load("~/data").vocab_size <= 300
    loader = TrainLoader(DataConfig("~/data", 32, 2))
    next(loader)
    loader.close()


def test_checkpoints_below_home(home):
    Checkpoints("~/checkpoints").close()
    assert (home / "checkpoints").is_dir()
    with pytest.raises(UserError, match=f"no checkpoints at {home}/none"):
        Checkpoints("~/none", read_only=True)
