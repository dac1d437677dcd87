"""What the prefix cache finds, and what it must not; with the scheduler and the model device, no JAX."""

from __future__ import annotations

import hashlib
import struct

import pytest

from llm_jax.inference.prefix_cache import PrefixCache
from tests.inference.model_device import Loop, answer, make, sequence

PROMPT = [7, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]  # three pages of four, and one token


def served(loop, i, prompt, new=1, **more):
    """The sequence, after it ran alone."""
    q = sequence(i, prompt, new, **more)
    loop.scheduler.add(q)
    loop.run()
    assert loop.finished[i] == answer(prompt, new)
    return q


def loop_of(num_pages=20, **more):
    return Loop(make(num_pages=num_pages, **more))


def test_the_second_time_only_what_is_new_is_computed():
    loop = loop_of()
    assert served(loop, 0, PROMPT).cached_tokens == 0
    before = loop.device.tokens_computed
    assert served(loop, 1, PROMPT).cached_tokens == 12
    assert loop.device.tokens_computed == before + 1
    assert served(loop, 2, PROMPT[:6] + [0] * 7).cached_tokens == 4  # the beginning alone
    assert served(loop, 3, [0] + PROMPT[1:]).cached_tokens == 0  # the same pages behind another beginning are others
    stats = loop.scheduler.stats
    assert (stats.prefix_lookups, stats.prefix_hits) == (4 * 13, 16)


@pytest.mark.parametrize("length, cached", [(13, 12), (12, 8), (9, 8), (5, 4), (4, 0)])
def test_the_last_token_is_always_computed(length, cached):
    loop = loop_of()
    served(loop, 0, PROMPT)
    assert served(loop, 1, PROMPT[:length]).cached_tokens == cached


def test_the_answer_is_found_in_the_next_turn():
    loop = loop_of()
    served(loop, 0, PROMPT, 9)
    turn = PROMPT + loop.finished[0] + [3]
    assert served(loop, 1, turn).cached_tokens == 20  # of 22; a page whose tokens were in flight at the end is not kept


def test_tenants_find_nothing_of_each_other():
    loop = loop_of()
    served(loop, 0, PROMPT, tenant="a")
    assert served(loop, 1, PROMPT, tenant="b").cached_tokens == 0
    assert served(loop, 2, PROMPT, tenant="").cached_tokens == 0
    assert [served(loop, 3 + k, PROMPT, tenant=t).cached_tokens for k, t in enumerate(["a", "b", ""])] == [12] * 3


def test_tenants_share_only_if_told_to():
    loop = loop_of(shared_prefixes=True)
    served(loop, 0, PROMPT, tenant="a")
    assert served(loop, 1, PROMPT, tenant="b").cached_tokens == 12


def test_off_means_off():
    loop = loop_of(prefix_cache=False)
    served(loop, 0, PROMPT)
    assert served(loop, 1, PROMPT).cached_tokens == 0 and loop.scheduler.pool.num_cached == 0


def test_who_wants_every_position_reads_nothing_but_may_be_read():
    loop = loop_of()
    served(loop, 0, PROMPT, reuse=False)
    assert served(loop, 1, PROMPT, reuse=False).cached_tokens == 0
    assert served(loop, 2, PROMPT).cached_tokens == 12


def test_digests_are_a_chain_that_begins_with_the_secret_and_the_tenant():
    loop = loop_of()
    q = sequence(0, PROMPT, 1, tenant="a")
    loop.scheduler.prefixes._secret = b"s" * 64
    loop.scheduler.prefixes.match(q)
    digest = hashlib.blake2b(b"a", key=b"s" * 64, digest_size=32).digest()
    for at in (0, 4, 8):
        digest = hashlib.blake2b(digest + struct.pack("=4i", *PROMPT[at:at + 4]), digest_size=32).digest()
        assert q.digests[at // 4] == digest
    assert PrefixCache(loop.scheduler.pool)._secret != PrefixCache(loop.scheduler.pool)._secret


def test_the_longest_unused_goes_first_and_the_end_of_a_prefix_before_its_beginning():
    s = make(num_pages=7, max_context=28, chunk=28)
    loop = Loop(s)
    served(loop, 0, PROMPT)  # three pages kept
    served(loop, 1, [2] * 9)  # two
    served(loop, 2, PROMPT[:9])  # the first two of the first are used again
    assert s.pool.num_cached == 5
    served(loop, 3, [3] * 12)  # three pages, one of them evicted …
    assert s.pool.evictions == 1
    probes = [sequence(9, p, 1) for p in (PROMPT, [2] * 9, [3] * 13)]
    assert [len(s.prefixes.match(q)) for q in probes] == [2, 2, 3]  # … the end of the first prompt
    served(loop, 4, [4] * 4)
    assert [len(s.prefixes.match(q)) for q in probes] == [2, 1, 3]  # the end of the second
    served(loop, 5, [5] * 8)
    assert [len(s.prefixes.match(q)) for q in probes] == [1, 0, 3]


def test_pages_in_use_are_not_evicted():
    s = make(num_pages=6, max_rows=2)
    loop = Loop(s)
    served(loop, 0, PROMPT)
    q = sequence(1, PROMPT, 10)
    s.add(q)
    loop.step()
    held = q.pages[:3]
    s.add(sequence(2, [2] * 7, 9))
    for _ in range(3):
        loop.step()
    assert s.pool.num_used == 6 and q.pages[:3] == held and s.pool.evictions == 0
    loop.run()
    assert loop.finished[1] == answer(PROMPT, 10)


def test_what_another_is_computing_now_is_waited_for():
    """Of many that come at once and begin alike, the first computes the beginning, alone."""
    loop = loop_of(num_pages=60, max_rows=6, prefill_rows=3, chunk=4)
    prompts = [PROMPT + [i, 2 * i, i] for i in range(6)]
    for i, prompt in enumerate(prompts):
        loop.scheduler.add(sequence(i, prompt, 2))
    loop.run()
    assert loop.finished == {i: answer(p, 2) for i, p in enumerate(prompts)}
    assert loop.device.tokens_computed == 12 + 6 * (4 + 1)
    assert loop.scheduler.stats.prefix_hits == 5 * 12


def test_who_waits_goes_on_when_the_first_is_cancelled():
    loop = loop_of(num_pages=60, max_rows=2, prefill_rows=2, chunk=4)
    first, second = sequence(0, PROMPT, 2), sequence(1, PROMPT, 2)
    loop.scheduler.add(first)
    loop.scheduler.add(second)
    assert [c.sequence.id for c in loop.step()] == [0]
    loop.scheduler.remove(first)
    assert [(c.sequence.id, c.start) for c in loop.step()] == [(1, 4)]
    loop.run()
    assert loop.finished == {1: answer(PROMPT, 2)}


def test_the_recomputation_of_a_preempted_one_is_mostly_found():
    s = make(num_pages=20, max_rows=1, clock=lambda: 0.0)
    loop = Loop(s)
    q = sequence(0, PROMPT, 8)
    s.add(q)
    for _ in range(6):
        loop.step()
    before = loop.device.tokens_computed
    s.add(sequence(1, [1], 1, priority=1))
    loop.run()
    assert q.preemptions == 1 and loop.finished[0] == answer(PROMPT, 8)
    assert q.cached_tokens == 0  # its own pages are no hits
    # The other's only token; at most a page again; the rest of the eight.
    assert loop.device.tokens_computed - before <= 1 + 4 + 8


def test_tokens_not_known_are_not_shown():
    """The draws of a cancelled request, in flight, are in no page that another finds."""
    s = make(num_pages=20, page_size=2)
    q = sequence(0, [1], 9)
    s.add(q)
    first = s.schedule()
    s.dispatched(first)
    second = s.schedule()
    s.dispatched(second)  # its page is full, but with a token that only the device knows
    assert q.computed == 2 and len(s.prefixes) == 0
    s.remove(q)
    s.resolve(first, {0: [1]})
    assert len(s.prefixes) == 0 and s.pool.num_free == 20


def test_rejected_proposals_are_not_shown():
    s = make(num_pages=20, page_size=2, max_proposed=5)
    q = sequence(0, [1, 2], 9)
    s.add(q)
    plan = s.schedule()
    s.dispatched(plan)
    s.resolve(plan, {0: [3]})
    q.proposal = [4, 5, 6]
    plan = s.schedule()
    s.dispatched(plan)
    assert len(s.prefixes) == 1
    s.resolve(plan, {0: [4, 9]})  # position 4 holds the rejected 5
    assert q.tokens == [1, 2, 3, 4, 9] and q.computed == 4
    assert len(s.prefixes) == 2


def test_forgotten_prefixes_are_not_found_nor_those_begun_before():
    loop = loop_of()
    s = loop.scheduler
    served(loop, 0, PROMPT)
    q = sequence(1, [1, 2] + PROMPT, 9)
    s.add(q)
    loop.step()
    loop.step()
    s.forget_prefixes()
    assert len(s.prefixes) == 0 and s.pool.num_cached == 0
    loop.run()
    assert len(s.prefixes) == 0  # its keys depend on what was there before
    assert served(loop, 2, PROMPT).cached_tokens == 0
    assert served(loop, 3, PROMPT).cached_tokens == 12


def test_nothing_is_taken_up_while_pages_come_back_from_the_host():
    """If it were preempted again in the same plan, they would not reach as far."""
    loop = loop_of(num_pages=60, max_rows=2, prefill_rows=2, chunk=4)
    first, second = sequence(0, PROMPT, 2), sequence(1, PROMPT, 2)
    loop.scheduler.add(first)
    loop.scheduler.add(second)
    loop.step()
    second.host_pages = [0]
    assert loop.scheduler.prefixes.find_more(second) == 0
    second.host_pages = []
    assert loop.scheduler.prefixes.find_more(second) == 4
