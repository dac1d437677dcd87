"""Losses of heads and of masked tokens, against numbers worked out by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.objectives.masked_lm import mask_tokens, masked_lm_sums
from llm_jax.objectives.tasks import classification_sums, label_sums, preference_sums, regression_sums, run

TOKENS = jnp.zeros((2, 3), jnp.int32)


def says(result):
    """An apply that gives `result`, whatever it is asked."""
    return lambda variables, tokens, **inputs: result


def test_labels_by_hand():
    """softmax of (0, ln 3) is (1/4, 3/4): the losses are ln 4 and ln 4/3, and an ignored label adds nothing."""
    logits = jnp.tile(jnp.array([0.0, math.log(3)]), (2, 3, 1))
    labels = jnp.array([[0, 1, -100], [1, 1, -100]])
    loss, sums = classification_sums(says(logits), {}, {"tokens": TOKENS, "labels": labels})
    assert float(loss) == pytest.approx(math.log(4) + 3 * math.log(4 / 3), rel=1e-6)
    assert float(sums["weight_sum"]) == 4 and float(sums["correct_sum"]) == 3
    assert float(sums["loss_sum"]) == float(loss)
    one_a_row, _ = label_sums(logits[:, 0], jnp.array([0, 1]))
    assert float(one_a_row) == pytest.approx(math.log(16 / 3), rel=1e-6)


def test_an_ignored_label_has_no_gradient():
    logits = jnp.array([[0.0, 1.0], [2.0, 0.0]])
    grad = jax.grad(lambda x: label_sums(x, jnp.array([0, -100]))[0])(logits)
    assert (np.asarray(grad[0]) != 0).all() and (np.asarray(grad[1]) == 0).all()


def test_squared_error_by_hand():
    """(1 − 3)² + (2 − 2)² + (5 − 4)² · ½ = 4.5."""
    out, targets = jnp.array([[1.0, 2.0], [5.0, 7.0]]), jnp.array([[3.0, 2.0], [4.0, 0.0]])
    batch = {"tokens": TOKENS, "targets": targets, "weights": jnp.array([[1.0, 1.0], [0.5, 0.0]])}
    loss, sums = regression_sums(says(out), {}, batch)
    assert float(loss) == 4.5 and float(sums["weight_sum"]) == 2.5
    loss, sums = regression_sums(says(out), {}, {"tokens": TOKENS, "targets": targets})
    assert float(loss) == 4 + 0 + 1 + 49 and float(sums["weight_sum"]) == 4
    with pytest.raises(ValueError, match="shape"):  # and not a silent broadcast to [2, 2]
        regression_sums(says(out[:, 0]), {}, {"tokens": TOKENS, "targets": targets})


def test_preferences_by_hand():
    """σ(ln 3) = 3/4, σ(0) = 1/2: the losses are ln 4/3 and ln 2."""
    rewards = {1: jnp.array([math.log(3), 5.0]), 2: jnp.array([0.0, 5.0])}

    def apply(variables, tokens, segment_ids_BT):
        return rewards[int(tokens[0, 0])]

    batch = {name: {"tokens": TOKENS + i, "segment_ids": TOKENS + 1} for name, i in (("chosen", 1), ("rejected", 2))}
    loss, sums = preference_sums(apply, {}, batch)
    assert float(loss) == pytest.approx(math.log(4 / 3) + math.log(2), rel=1e-6)
    assert float(sums["weight_sum"]) == 2 and float(sums["correct_sum"]) == 1
    assert float(sums["margin_sum"]) == pytest.approx(math.log(3), rel=1e-6)
    far, _ = preference_sums(lambda v, t, segment_ids_BT: 1e4 * rewards[3 - int(t[0, 0])], {}, batch)
    assert float(far) == pytest.approx(1e4 * math.log(3) + math.log(2), rel=1e-6)  # no overflow


def test_the_model_is_given_what_the_batch_has():
    def apply(variables, tokens, **inputs):
        return variables, tokens, inputs

    batch = {"tokens": 1, "token_types": 2, "positions": 3, "labels": 4}
    variables, tokens, inputs = run(apply, "p", batch, rng="key")
    assert (variables, tokens) == ({"params": "p"}, 1)
    assert inputs == {"token_types_BT": 2, "positions_BT": 3, "rngs": {"dropout": "key"}}


def test_masked_lm_by_hand():
    """Of four positions two count: ln 4 (target 0) and ln 4/3 (target 1, the likelier)."""
    logits = jnp.tile(jnp.array([0.0, math.log(3)]), (1, 4, 1))
    batch = {"tokens": jnp.zeros((1, 4), jnp.int32), "targets": jnp.array([[0, 1, 1, 0]]),
             "weights": jnp.array([[1.0, 1.0, 0.0, 0.0]])}
    loss, sums = masked_lm_sums(says({"logits": logits}), {}, batch)
    assert float(loss) == pytest.approx(math.log(16 / 3), rel=1e-6)
    assert float(sums["weight_sum"]) == 2 and float(sums["correct_sum"]) == 1


def test_masking_has_the_published_shares():
    """15 % are chosen; of those 80 % become the mask, 10 % a random token, 10 % stay. No other token changes."""
    vocab, mask_id = 1000, 1000
    tokens = jax.random.randint(jax.random.key(1), (200, 500), 0, vocab)
    maskable = tokens % 7 != 0
    hide = jax.jit(lambda key: mask_tokens(tokens, key, mask_id=mask_id, vocab_size=vocab, maskable_BT=maskable))
    inputs, weights = map(np.asarray, hide(jax.random.key(2)))
    tokens, maskable, chosen = np.asarray(tokens), np.asarray(maskable), weights == 1
    assert set(np.unique(weights)) == {0, 1} and not chosen[~maskable].any()
    assert (inputs[~chosen] == tokens[~chosen]).all()
    count = chosen.sum()
    # Five standard deviations of each share.
    def share(found, of, expected):
        assert abs(found / of - expected) < 5 * math.sqrt(expected * (1 - expected) / of)

    share(count, maskable.sum(), 0.15)
    share((inputs[chosen] == mask_id).sum(), count, 0.8)
    share((inputs[chosen] == tokens[chosen]).sum(), count, 0.1 + 0.1 / vocab)
    replaced = inputs[chosen & (inputs != mask_id) & (inputs != tokens)]
    assert replaced.min() >= 0 and replaced.max() < vocab
    assert len(np.unique(replaced)) > 500  # drawn from all of the vocabulary

    again = hide(jax.random.key(2))
    assert (again[0] == inputs).all() and (again[1] == weights).all()
    assert (hide(jax.random.key(3))[1] != weights).any()
