"""The picture of a run's loss."""

from __future__ import annotations

import json

import pytest

from experiments.plot_run import plot
from llm_jax import runs
from llm_jax.errors import UserError
from llm_jax.models import ModelConfig

CONFIG = ModelConfig(vocab_size=8, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8,
                     max_context=8)


def test_draws_what_was_logged(tmp_path):
    (tmp_path / "t").write_bytes(b"x")
    directory = runs.create(tmp_path / "r", CONFIG, tmp_path / "t", "", {"metrics": {"unigram_bits_per_byte": 3.0}})
    with pytest.raises(UserError, match="no readable logs"):
        plot(str(directory), str(tmp_path / "loss.svg"))
    records = [{"kind": "validation", "step": 0, "loss": 5.0, "bits_per_byte": 4.0}]
    records += [{"kind": "train", "step": i, "loss": 5.0 - i / 10} for i in range(1, 20)]
    records += [{"kind": "validation", "step": 20, "loss": 3.0, "bits_per_byte": 2.5}]
    (directory / runs.LOGS / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    plot(str(directory), str(tmp_path / "loss.svg"))
    picture = (tmp_path / "loss.svg").read_text()
    assert picture.count("<path") > 10 and len(picture) > 5000
    plot(str(directory), str(tmp_path / "loss.png"))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
