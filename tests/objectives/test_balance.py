from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import models
from llm_jax.models import Execution, Experts
from llm_jax.objectives.balance import balance_loss, load
from llm_jax.objectives.evaluation import evaluate_loss
from llm_jax.objectives.next_token import next_token_sums
from llm_jax.training.step import gradients
from tests.training.common import MODEL, VOCAB

MIXTURE = dataclasses.replace(MODEL, mlp_pattern=("experts",), experts=Experts(8, 2, 16, balance_weight=0.05))


def sums(assigned, probability, tokens, dropped=0.0):
    layers = len(assigned)
    return {"assigned": jnp.array(assigned, jnp.float32), "probability": jnp.array(probability, jnp.float32),
            "tokens": jnp.full(layers, tokens, jnp.float32), "dropped": jnp.full(layers, dropped / layers)}


def test_balance_loss_by_hand():
    even = sums([[5, 5, 5, 5]], [[2.5] * 4], 10)
    np.testing.assert_allclose(balance_loss(even), 2.0)  # two experts a token, evenly
    worst = sums([[10, 0, 0, 0]], [[10, 0, 0, 0]], 10)
    np.testing.assert_allclose(balance_loss(worst), 4.0)  # all to one of four
    uneven = sums([[6, 4]], [[7.5, 2.5]], 10)
    np.testing.assert_allclose(balance_loss(uneven), 2 * (0.6 * 0.75 + 0.4 * 0.25))
    # Two layers that are uneven in opposite ways are not balanced.
    np.testing.assert_allclose(balance_loss(sums([[10, 0], [0, 10]], [[10, 0], [0, 10]], 10)), 2.0)
    assert balance_loss(sums([[0, 0]], [[0, 0]], 0)) == 0


def test_load_by_hand():
    report = load(sums([[6, 3, 3, 0], [3, 3, 3, 3]], [[3] * 4, [3] * 4], 12, dropped=6))
    np.testing.assert_allclose(report["router_load"], [[2, 1, 1, 0], [1, 1, 1, 1]])
    assert report["router_most"] == 2 and report["router_least"] == 0 and report["router_dropped"] == 0.25


def batch():
    random = np.random.default_rng(0)
    filled = np.arange(16) < np.array([16, 3, 10, 2, 16, 9, 5, 15])[:, None]
    return {"tokens": (random.integers(1, VOCAB, filled.shape) * filled).astype(np.int32),
            "segment_ids": filled.astype(np.int32), "positions": (np.arange(16) * filled).astype(np.int32)}


def all_params(c=MIXTURE):
    return jax.jit(lambda key: models.init_params(models.build(c), key))(jax.random.key(0))


def objective(weight):
    c = dataclasses.replace(MIXTURE, experts=dataclasses.replace(MIXTURE.experts, balance_weight=weight))
    return jax.jit(lambda p, rows: next_token_sums(models.build(c).apply, p, rows, config=c))


def test_the_objective_holds_the_weighted_balance_loss():
    params, rows = all_params(), batch()
    (with_it, sums), (without, plain) = (objective(weight)(params, rows) for weight in (5.0, 0.0))
    expected = 5.0 * balance_loss(sums["router"]) * sums["weight_sum"]
    np.testing.assert_allclose(with_it - without, expected, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, sums, plain)
    assert 2 < balance_loss(sums["router"]) < 4 and plain["loss_sum"] == without
    assert (sums["router"]["tokens"] == rows["segment_ids"].sum()).all()
    _, nothing = next_token_sums(lambda *a: jnp.zeros((*a[1].shape, VOCAB)), params, rows, config=MODEL)
    assert "router" not in nothing


def test_microbatches_add_up_but_for_the_balance_loss_which_is_their_weighted_mean():
    c = dataclasses.replace(MIXTURE, num_layers=1, experts=dataclasses.replace(MIXTURE.experts, balance_weight=1.0))
    model, params, rows = models.build(c), all_params(c), batch()
    grads, sums = jax.jit(lambda p: gradients(model, p, rows, None, accumulation=2))(params)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def by_hand(p):
        """Microbatch i has the rows r with r mod 2 = i."""
        pieces = [next_token_sums(model.apply, p, {n: a[i::2] for n, a in rows.items()}, config=c) for i in range(2)]
        (one, one_sums), (two, two_sums) = pieces
        total = jax.tree.map(jnp.add, one_sums, two_sums)
        return (one + two) / total["weight_sum"], (total, one_sums["router"])

    expected, (total, of_one) = by_hand(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sums, total)
    assert not np.array_equal(of_one["assigned"] * 2, total["router"]["assigned"]), "equal halves would show nothing"
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * np.abs(a).max())


def test_an_evaluation_drops_nothing():
    params, rows = all_params(), batch()
    held_out = {**rows, "targets": rows["tokens"], "weights": rows["segment_ids"].astype(np.float32)}
    losses = [evaluate_loss(models.build(MIXTURE, execution), params, [held_out])["loss"]
              for execution in (Execution(), Execution(expert_capacity=0.2))]
    assert losses[0] == losses[1]
