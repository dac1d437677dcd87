"""The pool of pages and the space on the host, alone."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_jax.inference.pages import PagePool
from llm_jax.inference.sequence import Sequence, Swap
from llm_jax.inference.swap_space import SwapSpace


def test_take_give_back_and_double_free():
    pool = PagePool(4, 16)
    mine = pool.take(3)
    assert len(set(mine)) == 3 and pool.num_free == 1 and pool.num_used == 3
    with pytest.raises(MemoryError):
        pool.take(2)
    assert pool.num_free == 1  # a refused take takes nothing
    pool.give_back(mine[:1])
    with pytest.raises(ValueError, match="twice"):
        pool.give_back(mine[:1])
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share(mine[0])
    with pytest.raises(ValueError, match="held by nobody"):
        pool.keep(mine[0])


@pytest.mark.parametrize("tokens, pages", [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for(tokens, pages):
    assert PagePool(4, 16).pages_for(tokens) == pages


def test_a_shared_page_is_freed_by_its_last_holder():
    pool = PagePool(2, 1)
    page, = pool.take(1)
    pool.share(page)
    pool.give_back([page])
    assert pool.num_used == 1
    pool.give_back([page])
    assert pool.num_used == 0


def test_kept_pages_are_evicted_when_no_free_page_is_left_the_longest_unused_first():
    pool, evicted = PagePool(4, 1), []
    pool.on_evict = evicted.append
    a, b, c, d = pool.take(4)
    for page in (a, b, c):
        pool.keep(page)
    pool.give_back([b])
    pool.give_back([a, c, d])
    assert pool.num_cached == 3 and pool.num_free == 1 and pool.num_available == 4
    assert pool.take(1) == [d] and evicted == []
    pool.share(b)  # used again …
    pool.give_back([b])  # … and so the last in line
    assert pool.take(1) == [a] and evicted == [a]
    assert set(pool.take(2)) == {b, c} and evicted == [a, c, b]
    pool.give_back([b])
    assert pool.num_free == 1  # it was evicted, so its content is kept no longer


def test_after_forgetting_nothing_is_kept():
    pool = PagePool(3, 1)
    a, b = pool.take(2)
    pool.keep(a)
    pool.keep(b)
    pool.give_back([a])
    pool.forget()
    assert pool.num_free == 2
    pool.give_back([b])
    assert pool.num_free == 3 and pool.num_cached == 0


def test_copies_are_ordered_once_and_not_for_those_that_are_gone():
    space = SwapSpace(3)
    q, other = (Sequence(i, [1] * 5, 5, 9, computed=5, pages=pages) for i, pages in enumerate([[7, 4], [5, 6]]))
    assert space.take_out(q) and not space.take_out(other) and space.num_free == 1
    out, back = space.orders()
    assert [s.pages for s in out] == [(7, 4)] and back == () and space.orders() == ((), ())
    q.pages = [1, 2]
    space.bring_in(q, first=1)
    assert space.take_out(q) and space.orders() == ((), ())  # let in and preempted at once: nothing was copied
    space.bring_in(q, first=1)
    assert space.orders() == ((), (Swap(0, (2,), (q.host_pages[1],)),)) and space.num_free == 1
    space.forget(q)
    assert space.num_free == 3
    assert space.take_out(other)
    space.forget(other)
    assert space.orders() == ((), ()) and space.num_free == 3
    assert space.take_out(other)
    space.orders()
    space.bring_in(other, first=0)
    space.forget(other)
    assert space.orders() == ((), ())
    other.computed = 0
    assert not space.take_out(other)  # nothing to keep


class Holders(RuleBasedStateMachine):
    """Any sequence of calls, against a list of who holds what."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(5, 1)
        self.held: list[int] = []
        self.cached: list[int] = []
        self.kept: set[int] = set()
        self.pool.on_evict = self.evicted

    def evicted(self, page):
        assert self.cached.pop(0) == page
        self.kept.remove(page)

    @rule(count=st.integers(0, 6))
    def take(self, count):
        if count > 5 - len(set(self.held)):
            with pytest.raises(MemoryError):
                self.pool.take(count)
        else:
            pages = self.pool.take(count)
            assert not set(pages) & set(self.held) and len(set(pages)) == count
            self.held += pages

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data):
        page = data.draw(st.sampled_from(self.held))
        self.pool.give_back([page])
        self.held.remove(page)
        if page not in self.held and page in self.kept:
            self.cached.append(page)

    @precondition(lambda self: self.held or self.cached)
    @rule(data=st.data())
    def share(self, data):
        page = data.draw(st.sampled_from(self.held + self.cached))
        self.pool.share(page)
        self.held.append(page)
        if page in self.cached:
            self.cached.remove(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def keep(self, data):
        page = data.draw(st.sampled_from(self.held))
        self.pool.keep(page)
        self.kept.add(page)

    @invariant()
    def conserved(self):
        self.pool.check()
        assert self.pool.num_used == len(set(self.held)) and self.pool.num_cached == len(self.cached)
        assert self.pool.num_available == 5 - len(set(self.held))


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
