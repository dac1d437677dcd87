"""ModelConfig says what is wrong with it."""

from __future__ import annotations

import dataclasses

import pytest

from llm_jax.errors import UserError
from llm_jax.models import Execution, ModelConfig

GOOD = {"vocab_size": 8, "num_layers": 1, "embed_dim": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 2,
        "mlp_dim": 8, "max_context": 8}


@pytest.mark.parametrize("change, named", [
    ({"num_layers": 0}, "num_layers"), ({"mlp_dim": 2.5}, "mlp_dim"), ({"num_kv_heads": 3}, "num_kv_heads"),
    ({"head_dim": 3}, "head_dim"), ({"family": "gtp"}, "family"), ({"vocab_size": True}, "vocab_size"),
    ({"rope_theta": "x"}, "rope_theta"), ({"norm_eps": -1.0}, "norm_eps"), ({"tie_embeddings": "false"}, "tie_emb")])
def test_bad_values_are_named(change, named):
    with pytest.raises(UserError, match=named):
        ModelConfig(**{**GOOD, **change})


def test_dict_round_trip_and_its_errors():
    config = ModelConfig(**GOOD, tie_embeddings=True)
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="vocab_size"):
        ModelConfig.from_dict({k: v for k, v in GOOD.items() if k != "vocab_size"})
    with pytest.raises(UserError, match="nonsense"):
        ModelConfig.from_dict(GOOD | {"nonsense": 1})


def test_execution_refuses_unknown_choices():
    for change in ({"dtype": "float31"}, {"remat": "most"}):
        with pytest.raises(UserError, match=next(iter(change.values()))):
            dataclasses.replace(Execution(), **change)
