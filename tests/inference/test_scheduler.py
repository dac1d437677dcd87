"""The scheduler with a model device, under random traces and in the cases that matter; no JAX."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.inference.request import PromptTooLong, QueueFull
from llm_jax.inference.scheduler import PENDING, Scheduler
from tests.inference.model_device import Loop, answer, make, next_token, sequence


def expected(q, prompt, stop):
    tokens = answer(prompt, q.max_tokens)
    return tokens[:tokens.index(stop)] if stop in tokens else tokens


def trace(seed, page_size=2, max_rows=4, prefill_rows=2, chunk=3, spare=2, swap_pages=8, max_proposed=2, ageing_s=4.0):
    """Arrivals, priorities, tenants, cancellations, expiries and new weights at random; returns the scheduler."""
    rng = random.Random(seed)
    now = [0.0]
    max_context = rng.randint(2, 20)
    s = make(-(-max_context // page_size) + spare, page_size, max_rows, prefill_rows, chunk, max_context,
             clock=lambda: now[0], ageing_s=ageing_s, swap_pages=swap_pages, max_proposed=max_proposed,
             max_wait_s=rng.choice([None, None, 25.0]), shared_prefixes=rng.random() < 0.2)
    stop = rng.choice([None, 2])
    loop = Loop(s, stop, rng if max_proposed else None)
    total = arriving = rng.randint(1, 15)
    given_up, everyone, prompts, weights = set(), {}, {}, 0
    restarts = 2
    for _ in range(3000):
        now[0] += 1.0
        while arriving and rng.random() < 0.4:
            arriving -= 1
            prompt = [rng.random() < 0.1 for _ in range(rng.randint(1, max_context - 1))]  # often they begin alike
            q = sequence(arriving, prompt, rng.randint(1, 8), rng.choice([0, 0, 1, 5]), tenant=rng.choice(["", "b"]),
                         needs_host=rng.random() < 0.3, reuse=rng.random() < 0.8,
                         deadline=rng.choice([None, None, None, None, now[0] + 15]))
            everyone[q.id], prompts[q.id] = q, prompt
            s.add(q)
        if everyone and rng.random() < 0.05:
            victim = rng.choice(list(everyone.values()))
            if victim.id not in loop.finished:
                given_up.add(victim.id)
            s.remove(victim)
        given_up |= {q.id for q in s.expired()}
        if restarts and rng.random() < 0.01:
            restarts -= 1
            if rng.random() < 0.5:  # a step failed: what is in flight is lost
                loop.flight = None
            else:
                loop.land()
            weights += 1
            s.restart()
            loop.device.reset(weights)
            loop.device.truth = {q.id: list(q.tokens) for q in s._known.values()}
        loop.step(in_order=rng.random() < 0.2)
        if not arriving and not s._known:
            break
    assert set(loop.finished) | given_up == set(range(total)), "someone never finished"
    for i, tokens in loop.finished.items():
        assert tokens == expected(everyone[i], prompts[i], stop)
    loop.land()
    assert s.pool.num_used == 0 and s._swap.num_free == swap_pages
    return s


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(1, 7),
       st.integers(0, 8), st.sampled_from([0, 0, 3, 12]), st.sampled_from([0, 3]), st.sampled_from([None, 0.5, 4.0]))
def test_random_traces(seed, page_size, max_rows, prefill_rows, chunk, spare, swap_pages, max_proposed, ageing_s):
    """On a pool that may hold one long sequence only: pages, slots and host pages are conserved, nothing shared is
    written, every position is read from where it was computed, and everyone who is not given up is answered as if
    alone."""
    trace(seed, page_size, max_rows, prefill_rows, chunk, spare, swap_pages, max_proposed, ageing_s)


def test_random_traces_go_everywhere():
    made = [trace(seed) for seed in range(60)]
    for count in ("preemptions", "swaps_out", "swaps_in", "prefix_hits", "expired"):
        assert sum(getattr(s.stats, count) for s in made) >= 5, count
    assert sum(s.pool.evictions for s in made) > 10


def test_a_prompt_takes_as_many_steps_as_it_has_chunks():
    for length in range(1, 20):
        loop = Loop(make(chunk=4))
        q = sequence(0, length, 1)
        loop.scheduler.add(q)
        loop.run()
        assert q.prefill_steps + (length % 4 == 1) == -(-length // 4)


def test_tokens_are_pending_until_they_are_resolved():
    s = make()
    q = sequence(0, 2, 9)
    s.add(q)
    first = s.schedule()
    s.dispatched(first)
    assert q.tokens[2:] == [PENDING]
    second = s.schedule()  # before the first is resolved
    assert [(c.start, c.count, c.samples) for c in second] == [(2, 1, True)]
    s.dispatched(second)
    assert q.tokens[2:] == [PENDING, PENDING] and q.computed == 3
    s.resolve(first, {0: [7]})
    assert q.tokens[2:] == [7, PENDING]
    s.remove(q)
    s.resolve(second, {0: [8]})  # of a sequence that was removed: passed over
    assert q.tokens[2:] == [7, PENDING] and s.pool.num_used == 0


def test_who_needs_the_host_waits_for_it():
    s = make()
    q, other = sequence(0, 2, 9, needs_host=True), sequence(1, 2, 9)
    s.add(q)
    s.add(other)
    first = s.schedule()
    s.dispatched(first)
    second = s.schedule()
    assert [c.sequence.id for c in second] == [1]
    s.dispatched(second)
    s.resolve(first, {0: [7], 1: [7]})
    assert [c.sequence.id for c in s.schedule()] == [0, 1]


def test_who_was_preempted_waits_until_its_token_is_known():
    s = make(max_rows=1)
    q, urgent = sequence(0, 2, 9), sequence(1, 2, 9, priority=9)
    s.add(q)
    first = s.schedule()
    s.dispatched(first)
    s.add(urgent)
    second = s.schedule()
    assert [c.sequence.id for c in second] == [1] and q.preemptions == 1
    s.dispatched(second)
    s.remove(urgent)
    assert s.schedule() is None
    s.resolve(first, {0: [7]})
    assert q.tokens[2:] == [7] and [(c.start, c.count) for c in s.schedule()] == [(0, 3)]


def test_a_proposal_is_dropped_when_a_step_draws_without_it():
    s = make(max_proposed=3)
    q = sequence(0, 2, 9)
    s.add(q)
    s.dispatched(s.schedule())
    q.proposal = [1, 2]  # too early: what it is to follow is not known
    plan = s.schedule()
    assert plan.decode[0].proposed == 0
    s.dispatched(plan)
    assert q.proposal == []


def test_accepted_proposals_count_as_computed():
    s = make(max_proposed=3)
    q = sequence(0, 2, 9)
    s.add(q)
    plan = s.schedule()
    s.dispatched(plan)
    s.resolve(plan, {0: [5]})
    q.proposal = [6, 7, 8, 9]
    plan = s.schedule()
    assert [(c.start, c.count, c.proposed) for c in plan.decode] == [(2, 1, 3)]
    s.dispatched(plan)
    assert s.schedule() is None  # how far it is, only the draws tell
    s.resolve(plan, {0: [6, 7, 1]})
    assert q.tokens[2:] == [5, 6, 7, 1] and q.computed == 5 and q.proposal == []
    q.proposal = [1] * 9
    q.max_tokens = 6
    assert s.schedule().decode[0].proposed == 1  # not more than it may still generate


def test_proposals_preempt_nobody():
    s = make(num_pages=3, page_size=4, max_rows=2, max_context=12, max_proposed=3)
    first, second = sequence(0, 4, 8), sequence(1, 3, 8)
    s.add(first)
    s.add(second)
    plan = s.schedule()
    s.dispatched(plan)
    s.resolve(plan, {0: [1], 1: [1]})
    first.proposal, second.proposal = [1, 1, 1], [1, 1, 1]
    plan = s.schedule()
    assert s.stats.preemptions == 0
    assert [c.proposed for c in plan.decode] == [3, 0]  # a new page has room for one and three; the last is full


def test_reserved_pages_are_those_that_nobody_has():
    s = make(num_pages=3, page_size=4, max_rows=2, max_context=12, max_proposed=8)
    q, other = sequence(0, 4, 8), sequence(1, 8, 4)
    s.add(q)
    plan = s.schedule()
    s.dispatched(plan)
    s.resolve(plan, {0: [1]})
    other.pages = s.pool.take(2)
    assert s.reserve(q, 9) == 0 and len(q.pages) == 1  # not even the last token has a place
    s.pool.give_back(other.pages)
    assert s.reserve(q, 9) == 6 and len(q.pages) == 3  # seven tokens are left to draw, one in any case
    assert s.reserve(q, 2) == 2


def test_a_place_is_taken_in_the_next_step():
    """Also while the last token of the one before is still in flight."""
    s = make(max_rows=2, num_pages=20)
    for i, new in enumerate([2, 9, 2]):
        s.add(sequence(i, 2, new))
    loop = Loop(s)
    steps = [loop.step() for _ in range(3)]
    assert [[c.sequence.id for c in plan] for plan in steps] == [[0, 1], [0, 1], [1, 2]]


def test_decodes_and_prompts_share_a_step():
    s = make(num_pages=20)
    loop = Loop(s)
    s.add(sequence(0, 1, 9))
    loop.step()
    s.add(sequence(1, 9, 9))
    plan = loop.step()
    assert [c.sequence.id for c in plan.decode] == [0] and [c.sequence.id for c in plan.prefill] == [1]


@pytest.mark.parametrize("swap_pages", [0, 8])
def test_running_out_of_pages_preempts_the_last_to_come_and_it_comes_back(swap_pages):
    s = make(num_pages=6, page_size=4, max_rows=2, max_context=24, swap_pages=swap_pages)
    first, second = sequence(0, 8, 16), sequence(1, 8, 16)
    prompts = [list(first.tokens), list(second.tokens)]
    s.add(first)
    s.add(second)
    loop = Loop(s)
    loop.run()
    assert list(loop.finished) == [0, 1] and first.preemptions == 0 and second.preemptions == 1
    assert [loop.finished[i] for i in (0, 1)] == [answer(p, 16) for p in prompts]
    assert s.stats.swaps_out == s.stats.swaps_in == (1 if swap_pages else 0)
    # Swapped, nothing is computed twice; the last of 16 tokens of each is never computed at all.
    assert (loop.device.tokens_computed == 2 * 23) == bool(swap_pages)


def test_priority_goes_first_and_equals_by_arrival():
    s = make(max_rows=1, num_pages=20, clock=lambda: 0.0)
    for i, priority in enumerate([0, 0, 5, 5]):
        s.add(sequence(i, 2, 1, priority))
    loop = Loop(s)
    loop.run()
    assert list(loop.finished) == [2, 3, 0, 1]


def test_a_high_priority_takes_the_row_of_a_low_one():
    """In the very next step; equals do not take each other's."""
    s = make(max_rows=2, num_pages=20, clock=lambda: 0.0)
    loop = Loop(s)
    for i in range(2):
        s.add(sequence(i, 2, 20))
    loop.step()
    s.add(sequence(2, 2, 20))
    assert {c.sequence.id for c in loop.step()} == {0, 1}
    s.add(sequence(3, 2, 2, priority=1))
    assert {c.sequence.id for c in loop.step()} == {0, 3}  # the youngest gives way
    loop.run()
    assert loop.finished == {i: answer(sequence(i, 2, 0).tokens, 2 if i == 3 else 20) for i in range(4)}


def test_a_high_priority_takes_the_pages_of_low_ones_if_that_helps():
    s = make(num_pages=6, page_size=4, max_rows=4, clock=lambda: 0.0, chunk=24)
    loop = Loop(s)
    s.add(sequence(0, 4, 6, priority=1))
    s.add(sequence(1, 14, 3))
    loop.step()
    s.add(sequence(2, 20, 2, priority=1))  # even without the second, five pages are not there
    loop.step()
    assert s.stats.preemptions == 0 and [q.id for q in s.running] == [0, 1]
    s.add(sequence(3, 9, 2, priority=2))  # four are, of which it needs three
    loop.step()
    assert [q.id for q in s.running] == [3, 0]
    loop.run()
    assert len(loop.finished) == 4


@pytest.mark.parametrize("ageing_s, finishes", [(5.0, True), (None, False)])
def test_ageing_lets_nobody_starve(ageing_s, finishes):
    """New requests of high priority come faster than they can be served."""
    now = [0.0]
    s = make(max_rows=1, num_pages=20, clock=lambda: now[0], ageing_s=ageing_s)
    loop = Loop(s)
    s.add(sequence(0, 2, 3))
    for i in range(1, 100):
        s.add(sequence(i, 2, 3, priority=4))
        loop.step()
        now[0] += 1.0
    assert (0 in loop.finished) == finishes
    if finishes:  # four steps of priority are worth 20 seconds: it is served before those that came later than that
        assert len(loop.finished) > 25 and max(j for j in loop.finished if j > 20) > 20


def test_limits_of_what_has_ended_are_not_kept_until_their_time():
    """Clients may give every request a deadline in a year."""
    clock = [0.0]
    scheduler = make(clock=lambda: clock[0], max_wait_s=1e9)
    kept = sequence(0, 4, 4, deadline=5e8)
    scheduler.add(kept)
    for i in range(1, 5000):
        one = sequence(i, 4, 4, deadline=3e7)
        scheduler.add(one)
        scheduler.remove(one)
    assert len(scheduler._limits) < 1100
    clock[0] = 6e8
    assert scheduler.expired() == [kept]


def test_deadlines_and_waiting_have_their_bounds():
    now = [0.0]
    s = make(max_rows=1, num_pages=20, clock=lambda: now[0], max_wait_s=10.0)
    loop = Loop(s)
    running, waiting = sequence(0, 2, 20, deadline=30.0), sequence(1, 2, 20)
    impatient = sequence(2, 2, 20, deadline=4.0)
    for q in (running, waiting, impatient):
        s.add(q)
    loop.step()
    now[0] = 3.9
    assert s.expired() == []
    now[0] = 4.0
    assert s.expired() == [impatient]
    now[0] = 10.0
    assert s.expired() == [waiting]  # but not the one that runs
    assert s.running == [running] and not s.waiting
    now[0] = 30.0
    assert s.expired() == [running] and s.pool.num_used == 0 and s.stats.expired == 3
    loop.step()
    assert loop.finished == {}


def test_who_was_preempted_is_not_given_up_for_waiting():
    now = [0.0]
    s = make(max_rows=1, num_pages=20, clock=lambda: now[0], max_wait_s=10.0, ageing_s=None)
    loop = Loop(s)
    s.add(sequence(0, 2, 5))
    loop.step()
    s.add(sequence(1, 2, 20, priority=1))
    loop.step()
    now[0] = 11.0
    assert s.expired() == [] and [q.id for q in s.waiting] == [0]


def test_a_restart_computes_everything_anew():
    s = make(num_pages=20, max_rows=2)
    loop = Loop(s)
    prompts = [sequence(i, 6, 9).tokens for i in range(3)]
    for i in range(3):
        s.add(sequence(i, 6, 9))
    for _ in range(5):
        loop.step()
    loop.flight = None  # lost
    s.restart()
    loop.device.reset(1)
    loop.device.truth.clear()
    loop.device.truth.update({q.id: list(q.tokens) for q in s._known.values()})
    assert s.pool.num_free == 20 and len(s.waiting) == 3 and not any(PENDING in q.tokens for q in s.waiting)
    loop.run()
    assert loop.finished == {i: answer(p, 9) for i, p in enumerate(prompts)}


class Static(Scheduler):
    def _may_admit(self):
        return not self.running


def test_static_batching_is_a_subclass():
    s = make(num_pages=20, max_rows=2, kind=Static)
    for i, new in enumerate([2, 6, 2]):
        s.add(sequence(i, 2, new))
    loop = Loop(s)
    batches = []
    while (plan := loop.step()) or loop.flight:
        batches.append({c.sequence.id for c in plan} if plan else set())
    assert {0, 1} in batches and {2} in batches and {1, 2} not in batches


def test_refusals_say_the_limit():
    s = make(max_context=24, max_queue=1, max_rows=2)
    with pytest.raises(PromptTooLong, match="24 tokens; at most 23"):
        s.add(sequence(0, 24, 1))
    q = sequence(0, 20, 100)
    s.add(q)
    assert q.max_tokens == 4  # cut to what the context leaves
    for i in (1, 2):
        s.add(sequence(i, 2, 1))  # rows are free for two of the three
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        s.add(sequence(3, 2, 1))
    s.schedule()
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        s.add(sequence(3, 2, 1))
    with pytest.raises(ValueError, match="does not fit"):
        make(num_pages=5)


def test_the_model_device_is_not_blind():
    """It tells a page of another's tokens from the right one."""
    loop = Loop(make(num_pages=20))
    a, b = sequence(0, 6, 9), sequence(1, 6, 9)
    loop.scheduler.add(a)
    loop.scheduler.add(b)
    loop.step()
    loop.step()
    a.pages[0] = b.pages[0]
    plan = loop.scheduler.schedule()
    with pytest.raises(AssertionError, match="not in its page"):
        loop.device.run(plan)
    assert next_token([1]) == answer([1], 1)[0]
