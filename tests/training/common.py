"""A tiny corpus, model and run that the trainer's tests share."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from llm_jax.data.loader import DataConfig
from llm_jax.data.prepare import prepare
from llm_jax.models import Execution, ModelConfig
from llm_jax.parallel.mesh import MeshConfig
from llm_jax.training.optimizer import OptimizerConfig

VOCAB = 320
MODEL = ModelConfig(vocab_size=VOCAB, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
                    max_context=64)
ROWS, LENGTH = 8, 32


def prepare_tiny(directory: pathlib.Path) -> str:
    """Prepares one package of the standard library; returns the data directory."""
    data_dir = str(directory / "data")
    corpus = str(pathlib.Path(json.__file__).parent)
    prepare(data_dir, corpus=corpus, vocab_size=VOCAB, max_document_chars=2000, num_workers=1, verbose=False)
    return data_dir


def settings(run_dir: pathlib.Path | str, data_dir: str, **changes: Any) -> dict[str, Any]:
    """Arguments of `train` for a run of twenty steps."""
    arguments: dict[str, Any] = dict(
        run_dir=str(run_dir), model=MODEL, execution=Execution(), data=DataConfig(data_dir, LENGTH, ROWS),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=4), mesh=MeshConfig(), num_steps=20, seed=7,
        log_every=5, eval_every=0, eval_batches=2, checkpoint_every=5, keep=10)
    return arguments | changes
