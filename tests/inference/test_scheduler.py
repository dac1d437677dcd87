"""The scheduler and the page table alone, under random traces; no JAX."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.inference.pages import PagePool
from llm_jax.inference.request import PromptTooLong, QueueFull
from llm_jax.inference.scheduler import Scheduler, Sequence


def make(num_pages=8, page_size=4, max_rows=3, prefill_rows=2, chunk=4, max_context=24, max_queue=1000):
    return Scheduler(PagePool(num_pages, page_size), max_rows=max_rows, prefill_rows=prefill_rows, chunk=chunk,
                     max_context=max_context, max_queue=max_queue)


def sequence(i, prompt, new, priority=0):
    return Sequence(i, list(range(prompt)), prompt, new, priority)


class Cache:
    """What the pages hold, as the device would have written it."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}

    def run(self, plan) -> None:
        """Writes every chunk, having checked that all it attends to is where its pages say."""
        for c in plan:
            q = c.sequence
            for position in range(c.start + c.count):
                slot = q.pages[position // self.page_size], position % self.page_size
                if position >= c.start:
                    self.slots[slot] = q.id, position
                assert self.slots.get(slot) == (q.id, position), "a token's keys are not in its pages"


def check_invariants(s: Scheduler, plan) -> None:
    owned = [page for q in s.running for page in q.pages]
    assert len(owned) == len(set(owned)), "a page is owned twice"
    assert len(owned) == s.pool.num_used <= s.pool.num_pages, "a page is lost"
    assert all(not q.pages for q in s.waiting)
    assert len(s.running) <= s.max_rows
    if plan is None:
        return
    assert len(plan.decode) + len(plan.prefill) <= s.max_rows and len(plan.prefill) <= s.prefill_rows
    assert len({c.sequence.id for c in plan}) == len(list(plan)), "a sequence is in a step twice"
    for c in plan:
        assert c.sequence in s.running
        assert c.start == c.sequence.computed and 1 <= c.count <= s.chunk
        assert len(c.sequence.pages) == s.pool.pages_for(c.start + c.count)


def finish_step(s: Scheduler, plan, finished: list[int]) -> None:
    s.commit(plan, {c.sequence.id: 1 for c in plan})
    assert s.wasted_slots() < len(s.running) * s.pool.page_size + (not s.running), "a page a request is wasted"
    for q in list(s.running):
        if q.num_generated >= q.max_tokens:
            s.remove(q)
            finished.append(q.id)


@settings(max_examples=3000, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(1, 7),
       st.integers(0, 6))
def test_random_traces(seed, page_size, max_rows, prefill_rows, chunk, spare):
    """Arrivals, priorities and cancellations at random, on a pool that may hold one long sequence only."""
    rng = random.Random(seed)
    max_context = rng.randint(2, 20)
    s = make(-(-max_context // page_size) + spare, page_size, max_rows, prefill_rows, chunk, max_context)
    total = rng.randint(1, 15)
    arriving, finished, cancelled, everyone = total, [], [], {}
    cache = Cache(page_size)
    for _ in range(3000):
        while arriving and rng.random() < 0.4:
            arriving -= 1
            q = sequence(arriving, rng.randint(1, max_context - 1), rng.randint(1, 8), rng.choice([0, 0, 1]))
            everyone[q.id] = q
            s.add(q)
        if everyone and rng.random() < 0.05:
            victim = rng.choice(list(everyone.values()))
            if victim in s.running or victim in s.waiting:
                cancelled.append(victim.id)
            s.remove(victim)
        plan = s.schedule()
        check_invariants(s, plan)
        if plan is None:
            assert not s.running and not s.waiting
            if not arriving:
                break
            continue
        cache.run(plan)
        finish_step(s, plan, finished)
    assert sorted(finished + cancelled) == list(range(total)), "someone never finished"
    assert s.pool.num_used == 0


def test_a_prompt_takes_as_many_steps_as_it_has_chunks():
    for length in range(1, 20):
        s = make(chunk=4)
        q = sequence(0, length, 1)
        s.add(q)
        steps = 0
        while q.num_generated == 0:
            s.commit(s.schedule(), {0: 1})
            steps += 1
        assert steps == -(-length // 4)


def test_a_place_is_taken_in_the_next_step():
    s = make(max_rows=2, num_pages=20)
    for i in range(3):
        s.add(sequence(i, 2, 2 + 4 * i))
    finished = []
    while 0 not in finished:
        plan = s.schedule()
        assert {c.sequence.id for c in plan} == {0, 1}
        finish_step(s, plan, finished)
    assert {c.sequence.id for c in s.schedule()} == {1, 2}


def test_decodes_and_prompts_share_a_step():
    s = make(num_pages=20)
    s.add(sequence(0, 1, 9))
    s.commit(s.schedule(), {0: 1})
    s.add(sequence(1, 9, 9))
    plan = s.schedule()
    assert [c.sequence.id for c in plan.decode] == [0] and [c.sequence.id for c in plan.prefill] == [1]


def test_running_out_of_pages_preempts_the_last_to_come_and_it_comes_back():
    s = make(num_pages=6, page_size=4, max_rows=2, max_context=24)
    first, second = sequence(0, 8, 16), sequence(1, 8, 16)
    s.add(first)
    s.add(second)
    finished = []
    while len(finished) < 2:
        plan = s.schedule()
        check_invariants(s, plan)
        finish_step(s, plan, finished)
    assert finished == [0, 1] and s.preemptions >= 1
    assert second.num_generated == 16


def test_priority_goes_first_and_equals_by_arrival():
    s = make(max_rows=1, num_pages=20)
    for i, priority in enumerate([0, 0, 5, 5]):
        s.add(sequence(i, 2, 1, priority))
    finished = []
    while len(finished) < 4:
        finish_step(s, s.schedule(), finished)
    assert finished == [2, 3, 0, 1]


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
