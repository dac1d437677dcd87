from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from llm_jax.objectives.evaluation import evaluate_loss


class Uniform:
    """A model that gives each of eight tokens the same probability."""

    @staticmethod
    def apply(variables, tokens, segment_ids=None, positions=None):
        return jnp.zeros((*tokens.shape, 8)) + variables["params"]


def batch(weights):
    weights = np.array(weights, np.float32)
    ones = np.ones(weights.shape, np.int32)
    targets = np.arange(weights.size, dtype=np.int32).reshape(weights.shape)
    return {"tokens": ones, "targets": targets, "weights": weights, "segment_ids": ones, "positions": ones}


def test_loss_perplexity_and_bits_per_byte_by_hand():
    # Eight equal tokens: log 8 nats each. The five that count stand for 0 + 1 + 2 + 3 + 4 bytes, at 3 bits a token.
    batches = [batch([[1, 1, 1, 0], [0, 0, 0, 0]]), batch([[0, 0, 0, 1], [1, 0, 0, 0]])]
    result = evaluate_loss(Uniform(), jnp.zeros(()), batches, byte_lengths=np.arange(8))
    assert result["tokens"] == 5 and result["bytes"] == 10
    np.testing.assert_allclose(result["loss"], math.log(8), rtol=1e-6)
    np.testing.assert_allclose(result["perplexity"], 8, rtol=1e-6)
    np.testing.assert_allclose(result["bits_per_byte"], 5 * 3 / 10, rtol=1e-6)


def test_no_text_is_not_a_loss_of_zero():
    result = evaluate_loss(Uniform(), jnp.zeros(()), [], byte_lengths=np.arange(8))
    assert result["tokens"] == 0 and math.isnan(result["loss"]) and math.isnan(result["bits_per_byte"])
