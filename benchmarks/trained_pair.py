"""A small target and a smaller draft, trained in minutes, for benchmarks that random weights say nothing about."""

from __future__ import annotations

import dataclasses
import pathlib

from llm_jax.data.documents import read_documents
from llm_jax.data.loader import DataConfig
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError
from llm_jax.models import Execution, ModelConfig
from llm_jax.training.loop import train
from llm_jax.training.optimizer import OptimizerConfig

VOCAB_SIZE = 2048
ROW_LENGTH = 256
# The draft has an eighth of the target's parameters, embeddings included, and a quarter of its layers.
TARGET = ModelConfig(vocab_size=VOCAB_SIZE, num_layers=4, embed_dim=256, num_heads=8, num_kv_heads=4, head_dim=32,
                     mlp_dim=704, max_context=512, tie_embeddings=True)
DRAFT = ModelConfig(vocab_size=VOCAB_SIZE, num_layers=1, embed_dim=128, num_heads=4, num_kv_heads=2, head_dim=32,
                    mlp_dim=352, max_context=512, tie_embeddings=True)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Where a trained pair is.

    Attributes:
      data_dir: prepared data; the models never saw its validation split.
      target, draft: run directories.
    """

    data_dir: pathlib.Path
    target: pathlib.Path
    draft: pathlib.Path


def make(directory: pathlib.Path, corpus: str, steps: int, batch_size: int = 4) -> Pair:
    """Prepares a corpus and trains both models below `directory`; what is there already is used.

    Args:
      directory: another one for another corpus or another number of steps.
      corpus: see `prepare`.
      steps: of each. A small model learns faster at first: with more of them the draft could end as the better one.
      batch_size: rows of a step.
    """
    pair = Pair(directory / "data", directory / "target", directory / "draft")
    prepare(str(pair.data_dir), corpus, vocab_size=VOCAB_SIZE, verbose=False)
    size = _vocabulary(pair.data_dir)
    for run_dir, config in ((pair.target, TARGET), (pair.draft, DRAFT)):
        train(str(run_dir), dataclasses.replace(config, vocab_size=size), Execution(dtype="float32", remat="none"),
              DataConfig(str(pair.data_dir), ROW_LENGTH, batch_size),
              OptimizerConfig(peak_learning_rate=2e-3, warmup_steps=40, weight_decay=0.1), num_steps=steps,
              log_every=50, eval_batches=16)
    return pair


def held_out(data_dir: pathlib.Path, count: int, length: int) -> list[list[int]]:
    """`count` stretches of `length` tokens from the validation split: the beginnings of documents, then what follows.

    Raises:
      UserError: the split has fewer.
    """
    documents = [tokens for _, tokens in read_documents(data_dir, "validation")]
    pieces: list[list[int]] = []
    for start in range(0, max(map(len, documents)), length):
        pieces += [d[start:start + length].tolist() for d in documents if len(d) >= start + length]
        if len(pieces) >= count:
            return pieces[:count]
    raise UserError(f"{data_dir}: the validation split has {len(pieces)} stretches of {length} tokens; {count} are "
                    "wanted")


def _vocabulary(data_dir: pathlib.Path) -> int:
    """The prepared data's vocabulary, rounded up: a small corpus gets fewer tokens than it was asked for."""
    return -(-Tokenizer.load(data_dir).vocab_size // 64) * 64
