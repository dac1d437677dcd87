"""How many tokens are proposed: against the expectation worked out by simulation, and by its properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.inference.speculation import Acceptance, Policy, Throttle, expected_tokens

rates = st.floats(0, 1)
policies = st.builds(Policy, most=st.integers(0, 8), free=st.integers(1, 300), draft_cost=st.floats(0, 0.5),
                     margin=st.floats(1, 1.5), prior=rates, weight=st.floats(0.01, 1), probe_every=st.integers(1, 50))


def test_expected_tokens_are_those_of_a_simulation():
    rng = np.random.default_rng(0)
    for rate, k in ((0.3, 1), (0.8, 4), (0.95, 7)):
        right = rng.random((200_000, k)) < rate
        yielded = 1 + np.cumprod(right, axis=1).sum(1)
        assert expected_tokens(rate, k) == pytest.approx(yielded.mean(), rel=0.01)
    assert expected_tokens(1.0, 5) == 6 and expected_tokens(0.0, 5) == 1 and expected_tokens(0.7, 0) == 1


def test_by_hand():
    policy = Policy(most=4, free=8, margin=1.0)
    # One row: four proposals make five positions, free of charge, so the most are best at any acceptance.
    assert policy.best(0.1, rows=1) == 4 and policy.cost(4, 1) == 1
    # Four rows: one proposal is free; two make twelve positions, 1.5 steps, for 1 + 0.9 + 0.81 instead of 1.9 tokens.
    assert policy.cost(2, 4) == 1.5
    assert expected_tokens(0.9, 2) / 1.5 < expected_tokens(0.9, 1) / 1 and policy.best(0.9, rows=4) == 1
    assert policy.best(0.99, rows=8) == 0  # full
    # A draft model that costs a tenth of a step: (1 + 0.5)/1.1 = 1.36, 1.75/1.2 = 1.46, 1.875/1.3 = 1.44.
    assert Policy(most=4, free=64, draft_cost=0.1).best(0.5, rows=1) == 2
    assert Policy(most=4, free=64, draft_cost=0.1).best(0.1, rows=1) == 0


@settings(max_examples=300, deadline=None)
@given(policies, rates, rates, st.integers(1, 600), st.integers(1, 600))
def test_more_for_the_accepted_less_for_the_full_and_never_at_a_loss(policy, rate, other, rows, more):
    low, high = sorted((rate, other))
    few, many = sorted((rows, more))
    best = policy.best(rate, rows)
    assert 0 <= best <= policy.most
    assert policy.best(low, rows) <= policy.best(high, rows)
    assert policy.best(rate, few) >= policy.best(rate, many)
    assert policy.best(rate, rows + policy.free) == 0 and policy.best(0.0, rows) == 0
    if best:
        assert expected_tokens(rate, best) / policy.cost(best, rows) > 1


@settings(max_examples=200, deadline=None)
@given(policies, st.lists(st.tuples(st.integers(0, 8), rates), max_size=60), st.integers(1, 80))
def test_the_running_acceptance_stays_a_probability_and_room_is_kept(policy, steps, rows):
    throttle = Throttle(policy)
    for room, share in steps:
        count = throttle.proposals(rows, room)
        assert 0 <= count <= max(0, min(policy.most, room - 1))
        throttle.update(count, int(share * count))
        assert 0 <= throttle.acceptance <= 1
    assert throttle.total.accepted <= throttle.total.proposed


def run(policy, rate, rows, steps=600, seed=0):
    rng, throttle, counts = np.random.default_rng(seed), Throttle(policy), []
    for _ in range(steps):
        count = throttle.proposals(rows)
        right = rng.random(count) < rate
        throttle.update(count, int(np.cumprod(right).sum()))
        counts.append(count)
    return throttle, counts


def test_it_settles_at_what_is_accepted():
    policy = Policy(most=6, free=64, draft_cost=0.1, weight=0.05)
    good, counts = run(policy, 0.9, rows=1)
    assert good.acceptance == pytest.approx(0.9, abs=0.15)
    assert np.mean(counts[100:]) == pytest.approx(policy.best(0.9, 1), abs=1)
    assert good.total.tokens_per_step == pytest.approx(expected_tokens(0.9, 6), rel=0.15)
    _, counts = run(policy, 0.02, rows=1)
    assert sum(counts[100:]) <= 2 * len(counts[100:]) / policy.probe_every  # only now and then a try


def test_a_sequence_that_begins_to_repeat_is_found_again():
    policy = Policy(most=4, free=64, draft_cost=0.1, probe_every=8)
    throttle, _ = run(policy, 0.0, rows=1, steps=200)
    assert throttle.proposals(1) <= 1
    for _ in range(400):
        count = throttle.proposals(1)
        throttle.update(count, count)
    assert throttle.proposals(1) == 4


def test_a_full_batch_is_left_alone():
    _, counts = run(Policy(most=4, free=16, probe_every=4), 1.0, rows=16)
    assert not any(counts)


def test_statistics():
    total = Acceptance()
    assert (total.rate, total.tokens_per_step) == (0, 1)
    for proposed, accepted in ((4, 3), (0, 0), (2, 0)):
        total.add(proposed, accepted)
    assert (total.proposed, total.accepted, total.steps) == (6, 3, 2)
    assert total.rate == 0.5 and total.tokens_per_step == 2.5
    for wrong in ((1, 2), (3, -1)):
        with pytest.raises(ValueError, match="accepted"):
            total.add(*wrong)
    with pytest.raises(ValueError, match="out of range"):
        Policy(weight=0)
