"""Whether tokens are proposed: against the expectation worked out by simulation, and by its properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.inference.speculation import Acceptance, Gate, Policy, Throttle, expected_tokens

rates = st.floats(0, 1)


def test_expected_tokens_are_those_of_a_simulation():
    rng = np.random.default_rng(0)
    for rate, k in ((0.3, 1), (0.8, 4), (0.95, 7)):
        right = rng.random((200_000, k)) < rate
        yielded = 1 + np.cumprod(right, axis=1).sum(1)
        assert expected_tokens(rate, k) == pytest.approx(yielded.mean(), rel=0.01)
    assert expected_tokens(1.0, 5) == 6 and expected_tokens(0.0, 5) == 1 and expected_tokens(0.7, 0) == 1


def at(policy, *acceptances):
    made = [Throttle(policy) for _ in acceptances]
    for throttle, acceptance in zip(made, acceptances, strict=True):
        throttle.acceptance = acceptance
    return made


def test_by_hand():
    policy = Policy(most=2, costs=((1, 1.5), (4, 2.5)), margin=1.0)
    assert [policy.cost(rows) for rows in (1, 2, 4, 5)] == [1.5, 2.5, 2.5, float("inf")]
    # One row at 0.5: 1 + 0.5 + 0.25 tokens for 1.5; at 0.3: 1 + 0.3 + 0.09 = 1.39.
    assert Gate().opens(policy, at(policy, 0.5), 1) and not Gate().opens(policy, at(policy, 0.3), 1)
    # Two rows at 1.0 and 0.5 yield 3 + 1.75 for 5; with 0.7 it is 3 + 2.19.
    assert not Gate().opens(policy, at(policy, 1.0, 0.5), 2) and Gate().opens(policy, at(policy, 1.0, 0.7), 2)
    # A third row for which nothing can be proposed yields 1 and pays 2.5.
    assert not Gate().opens(policy, at(policy, 1.0, 0.7), 3)
    assert not Gate().opens(policy, at(policy, *[1.0] * 5), 5)  # more rows than were measured
    assert Gate().opens(Policy(most=2), at(policy, *[0.5] * 50), 50)  # it costs nothing
    assert not Gate().opens(Policy(most=2), [], 3)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.floats(1, 4), st.lists(rates, min_size=1, max_size=8), st.integers(0, 3))
def test_only_where_more_tokens_come_than_time_is_paid(most, cost, acceptances, others):
    policy = Policy(most=most, costs=((20, cost),))
    rows = len(acceptances) + others
    yielded = others + sum(expected_tokens(a, most) for a in acceptances)
    assert Gate().opens(policy, at(policy, *acceptances), rows) == (yielded > policy.margin * rows * cost)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 1), rates, st.lists(st.tuples(st.integers(0, 8), rates), max_size=60))
def test_the_running_acceptance_stays_a_probability(weight, prior, steps):
    throttle = Throttle(Policy(weight=weight, prior=prior))
    for proposed, share in steps:
        throttle.update(proposed, int(share * proposed)) if proposed else throttle.missed()
        assert 0 <= throttle.acceptance <= 1


def run(policy, rate, steps=600, seed=0, throttle=None):
    """One row whose proposals are right at `rate`; whether the gate opened, step by step."""
    rng, gate, opened = np.random.default_rng(seed), Gate(), []
    throttle = throttle or Throttle(policy)
    for _ in range(steps):
        opened.append(gate.opens(policy, [throttle], 1))
        if opened[-1]:
            right = rng.random(policy.most) < rate
            throttle.update(policy.most, int(np.cumprod(right).sum()))
    return throttle, opened


def test_it_settles_at_what_is_accepted():
    policy = Policy(most=4, costs=((1, 1.6),), weight=0.05)
    throttle, opened = run(policy, 0.9)
    assert throttle.acceptance == pytest.approx(0.9, abs=0.15) and all(opened)
    _, opened = run(policy, 0.02)
    assert sum(opened[100:]) <= 500 / policy.probe_every  # only now and then a try


def test_a_sequence_that_begins_to_repeat_is_found_again():
    policy = Policy(most=4, costs=((1, 1.6),), probe_every=8)
    throttle, opened = run(policy, 0.0, steps=200)
    assert not all(opened[-9:])
    _, opened = run(policy, 1.0, steps=100, throttle=throttle)
    assert all(opened[-20:])


def test_nothing_is_tried_where_nothing_can_be_gained():
    _, opened = run(Policy(most=2, costs=((1, 3.0),), probe_every=4), 1.0)
    assert not any(opened)


def test_look_ups_in_vain_close_the_gate():
    policy = Policy(most=4, costs=((1, 1.6),))
    throttle, gate = Throttle(policy), Gate()
    for _ in range(40):
        if gate.opens(policy, [throttle], 1):
            throttle.missed()
    assert not gate.opens(policy, [throttle], 1)


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
