"""Runs with a fault each, really trained, and one without."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import pytest

from llm_jax import diagnosis
from llm_jax.data.loader import DataConfig, TrainLoader
from llm_jax.data.prepare import prepare
from llm_jax.errors import UserError
from llm_jax.training import loop, trainer
from llm_jax.training.optimizer import OptimizerConfig
from tests.training.common import LENGTH, ROWS, VOCAB, settings

# A decay that is longer than any of the runs: runs of other lengths then share one compiled step.
OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=8, decay_steps=1000)
STEPS = 120
# Programs that run a few hundred times are compiled in half the time without LLVM's optimizations.
QUICK = {"xla_backend_optimization_level": 0}


class SlowLoader(TrainLoader):
    """Makes a batch in more time than a step takes."""

    def __next__(self) -> Any:
        time.sleep(0.05)
        return super().__next__()


class ForgetfulLoader(TrainLoader):
    """Something in the process that clears JAX's caches now and then."""

    def __next__(self) -> Any:
        if self.state % 4 == 0:
            jax.clear_caches()
        return super().__next__()


def one_document_many_times(folder: pathlib.Path) -> str:
    """A text that differs by its number alone, so that no copy is exact."""
    text = pathlib.Path(json.__file__).with_name("scanner.py").read_text()[:1500]
    return _prepare(folder, [f"{i}\n{text}" for i in range(90)])


def little_text(folder: pathlib.Path) -> str:
    """A few pages, of which a run sees every one often."""
    text = pathlib.Path(json.__file__).with_name("decoder.py").read_text()
    return _prepare(folder, [text[i:i + 900] for i in range(0, 9000, 900)])


def _prepare(folder: pathlib.Path, texts: list[str]) -> str:
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for i, text in enumerate(texts):
        (corpus / f"{i:03d}.txt").write_text(text)
    prepare(str(folder / "data"), corpus=str(corpus), vocab_size=VOCAB, max_document_chars=2000, num_workers=1,
            verbose=False)
    return str(folder / "data")


def train(folder: pathlib.Path, data_dir: str, *, loader: type[TrainLoader] = TrainLoader, corpus: Any = None,
          rows: int = ROWS, optimizer: dict[str, Any] | None = None, **changes: Any) -> diagnosis.Record:
    """Trains a tiny run in `folder`, and reads what it left."""
    data_dir = corpus(folder / "text") if corpus else data_dir
    compile_ = jax.stages.Lowered.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "TrainLoader", loader)
        patch.setattr(jax.stages.Lowered, "compile",
                      lambda self, compiler_options=None: compile_(self, (compiler_options or {}) | QUICK))
        options = dict(optimizer=dataclasses.replace(OPTIMIZER, **(optimizer or {})), num_steps=STEPS, log_every=4,
                       eval_every=40, checkpoint_every=10**6, keep=1,
                       data=DataConfig(data_dir, LENGTH, rows, prefetch=16))
        try:
            loop.train(**settings(folder / "run", data_dir, **(options | changes)))
        except UserError:  # a run may end of its fault
            assert (folder / "run" / "logs" / "events.jsonl").exists()
    return diagnosis.read(folder / "run")


RUNS: dict[str, dict[str, Any]] = {
    "healthy": {},
    "rate_too_high": dict(optimizer=dict(peak_learning_rate=30.0, clip_norm=None)),
    "rate_too_low": dict(optimizer=dict(peak_learning_rate=1e-5)),
    "data_repeated": dict(corpus=one_document_many_times, num_steps=200),
    "overfitting": dict(corpus=little_text, eval_every=30, num_steps=240),
    "slow_data": dict(loader=SlowLoader, num_steps=40),
    "slow_compile": dict(loader=ForgetfulLoader, num_steps=32, eval_every=4),
    "slow_small_batch": dict(rows=2, num_steps=STEPS),
}
