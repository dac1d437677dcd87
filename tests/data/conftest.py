"""A small corpus of three sources, in English, Python and Chinese, and the data prepared from it."""

from __future__ import annotations

import pathlib
import random

import pytest

from llm_jax.data.prepare import prepare

_ENGLISH = "the a cat dog house river sees finds under over small bright and then again because water light".split()
_CHINESE = list("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏的了是不在有我他这")


def _write(folder: pathlib.Path) -> None:
    draw = random.Random(0)
    for i in range(24):
        words = (" ".join(draw.choices(_ENGLISH, k=draw.randint(20, 400))) for _ in range(3))
        _put(folder / "english" / f"{i}.txt", "\n\n".join(words) + ".\n")
        lines = [f"def f{j}(x):\n    return x + {draw.randint(0, 99)}\n" for j in range(draw.randint(2, 30))]
        _put(folder / f"{i}.py", "\n\n".join(lines))
        _put(folder / "中文" / f"{i}.txt", "".join(draw.choices(_CHINESE + ["，", "。"], k=draw.randint(60, 900))))


def _put(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("corpus")
    _write(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(small_corpus, tmp_path_factory) -> pathlib.Path:
    """A data directory that no test may change; copy it to damage it."""
    data_dir = tmp_path_factory.mktemp("prepared")
    prepare(str(data_dir), str(small_corpus), vocab_size=400, verbose=False)
    return data_dir
