"""A device without arrays, which knows what every page holds, and the loop of a service around a scheduler.

A slot of a page holds what keys and values depend on: the weights, the tenant, and the tokens up to its own. So a page
of another tenant, of older weights or of other tokens is told from the right one wherever it is read. The model draws a
token from the tokens before it alone: what a request must be answered, no scheduler can change.
"""

from __future__ import annotations

import dataclasses
import random
import zlib

from llm_jax.inference.pages import PagePool
from llm_jax.inference.scheduler import PENDING, Plan, Scheduler, Sequence

VOCAB = 3  # few, so that prompts often begin alike


def make(num_pages=8, page_size=4, max_rows=3, prefill_rows=2, chunk=4, max_context=24, max_queue=1000,
         kind=Scheduler, **more):
    return kind(PagePool(num_pages, page_size), max_rows=max_rows, prefill_rows=prefill_rows, chunk=chunk,
                max_context=max_context, max_queue=max_queue, **more)


def sequence(i, prompt, new, priority=0, **more):
    """A sequence; `prompt` is its tokens, or how many of them, all different."""
    tokens = list(prompt) if not isinstance(prompt, int) else [1000 * i + k for k in range(prompt)]
    return Sequence(i, tokens, len(tokens), new, priority, **more)


def next_token(tokens) -> int:
    return zlib.crc32(bytes(t % 251 for t in tokens)) % VOCAB


def answer(prompt, count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt):]


class Device:
    """Runs plans on the spot, in the order in which they are given."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.size = scheduler.pool.page_size
        self.weights = 0
        self.pages: dict[int, list] = {}  # page → contents of its slots
        self.host: dict[int, list] = {}
        self.last: dict[int, int] = {}  # slot of a running sequence → token drawn last
        self.truth: dict[int, list[int]] = {}  # tokens of each sequence, also those that the host does not know
        self.tokens_computed = 0

    def reset(self, weights: int) -> None:
        self.pages.clear()
        self.host.clear()
        self.last.clear()
        self.weights = weights

    def poison_free_pages(self) -> None:
        """What nobody holds or keeps is lost, but for what is still to be copied to the host."""
        wanted = {page for swap in self.scheduler._swap._out.values() for page in swap.pages}
        for page in self.scheduler.pool._free:
            if page not in wanted:
                self.pages.pop(page, None)

    def run(self, plan: Plan) -> dict[int, list[int]]:
        """What the step draws: accepted proposals and one token."""
        in_a_copy = [h for swap in (*plan.swap_out, *plan.swap_in) for h in swap.host_pages]
        twice = {s.sequence_id for s in plan.swap_out} & {s.sequence_id for s in plan.swap_in}
        assert twice or len(in_a_copy) == len(set(in_a_copy))
        for swap in plan.swap_out:
            for page, host in zip(swap.pages, swap.host_pages, strict=True):
                self.host[host] = list(self.pages.get(page, [None] * self.size))
        for swap in plan.swap_in:
            for page, host in zip(swap.pages, swap.host_pages, strict=True):
                assert self.scheduler.pool.holders(page) == 1, "a page in use is copied over"
                self.pages[page] = list(self.host[host])
        written = set()
        for c in plan:  # all keys are written before any is read
            q = c.sequence
            truth = self.truth.setdefault(q.id, q.tokens[:q.num_prompt])
            known = [self.last[q.slot] if t == PENDING else t for t in q.tokens[c.start:c.start + c.count]]
            assert known == truth[c.start:c.start + c.count], "a token was forgotten or comes from another's slot"
            for position in range(c.start, c.start + c.count + c.proposed):
                page, slot = q.pages[position // self.size], position % self.size
                assert (page, slot) not in written, "two write to one place"
                assert self.scheduler.pool.holders(page) == 1, "a shared page is written"
                assert page not in self.scheduler.prefixes._digest, "a page of the prefix cache is written"
                written.add((page, slot))
                self.pages.setdefault(page, [None] * self.size)[slot] = self._content(q, truth, position, c)
            self.tokens_computed += c.count
        drawn = {}
        for c in plan:
            q, truth = c.sequence, self.truth[c.sequence.id]
            for position in range(c.start + c.count + c.proposed):
                found = self.pages.get(q.pages[position // self.size], [None] * self.size)[position % self.size]
                assert found == self._content(q, truth, position, c), f"position {position} is not in its page"
            if not c.samples:
                continue
            tokens = [next_token(truth)]
            for guess in q.proposal[:c.proposed]:
                if guess != tokens[-1]:
                    break
                tokens.append(next_token(truth + tokens))
            truth.extend(tokens)
            if not c.proposed:
                self.last[q.slot] = tokens[-1]
            drawn[q.id] = tokens
        return drawn

    def _content(self, q, truth, position, chunk):
        tenant = "" if self.scheduler.prefixes.shared else q.tenant
        tokens = (truth[:chunk.start + chunk.count] + q.proposal[:chunk.proposed])[:position + 1]
        return self.weights, tenant, tuple(tokens)


def check_invariants(s: Scheduler) -> None:
    """Pages, slots and host pages are all there, each once."""
    s.pool.check()
    holders = [0] * s.pool.num_pages
    for q in s.running:
        for page in q.pages:
            holders[page] += 1
    assert holders == s.pool._holders, "a page is lost, or held by someone who does not run"
    slots = [q.slot for q in s.running]
    assert sorted(slots + s._free_slots) == list(range(s.max_rows)), "a slot is lost or used twice"
    hosts = [h for q in s._known.values() for h in q.host_pages] + s._swap._free
    assert sorted(hosts) == list(range(s._swap.num_pages)), "a host page is lost or used twice"
    assert all(not q.pages and q.slot < 0 for q in s.waiting)
    for group in (s.running, s.waiting):
        assert group == sorted(group, key=lambda q: q.rank)
    table = s.prefixes._page
    assert {page: digest for digest, page in table.items()} == s.prefixes._digest
    assert {p for p in range(s.pool.num_pages) if s.pool._kept[p]} == set(table.values())


def check_plan(s: Scheduler, plan: Plan) -> None:
    assert len(plan.decode) + len(plan.prefill) <= s.max_rows and len(plan.prefill) <= s.prefill_rows
    assert len({c.sequence.id for c in plan}) == len(list(plan)) > 0, "a sequence is in a step twice"
    for c in plan.decode:
        assert c.count == 1 and c.samples and c.proposed <= s.max_proposed
    for c in plan:
        q = c.sequence
        assert q.slot >= 0 and c.start == q.computed and 1 <= c.count <= s.chunk
        assert len(q.pages) >= s.pool.pages_for(c.start + c.count + c.proposed)
        assert not (q.needs_host and q.tokens[-1] == PENDING), "the host has not seen the last token"
        assert q.num_generated + c.proposed < q.max_tokens, "more is drawn than was asked for"
    decoding = {c.sequence.id for c in plan.decode}
    for q in s.running:  # what can decode does, whatever prompts there are
        waits = q.tokens[-1] == PENDING and (q.needs_host or q.verifying) or q.num_generated >= q.max_tokens
        assert waits or q.remaining > 1 or q.id in decoding


@dataclasses.dataclass
class Loop:
    """A service around a scheduler: one step is in flight while the next is scheduled.

    Attributes:
      finished: by id, the tokens generated.
      stop: a token that ends a sequence and is not part of it.
      guess: random numbers for proposals; None makes none.
    """

    scheduler: Scheduler
    stop: int | None = None
    guess: random.Random | None = None

    def __post_init__(self):
        self.device = Device(self.scheduler)
        self.flight = None
        self.finished: dict[int, list[int]] = {}
        self.plans: list[Plan] = []

    def step(self, in_order: bool = False) -> Plan | None:
        """Schedules and dispatches a step, then resolves the one before it; the other way round if `in_order`."""
        s = self.scheduler
        if in_order:
            self.land()
        self.device.poison_free_pages()
        plan = s.schedule()
        check_invariants(s)
        following = None
        if plan is not None:
            check_plan(s, plan)
            following = plan, self.device.run(plan)
            s.dispatched(plan)
            check_invariants(s)
            assert s.wasted_slots() <= len(s.running) * (s.pool.page_size + s.max_proposed), "pages are wasted"
        self.land()
        self.flight = following
        return plan

    def land(self) -> None:
        if self.flight is None:
            return
        (plan, drawn), self.flight = self.flight, None
        self.scheduler.resolve(plan, drawn)
        for i in drawn:
            q = self.scheduler._known.get(i)
            if q is not None:
                self._told(q)
        check_invariants(self.scheduler)

    def _told(self, q: Sequence) -> None:
        new = q.tokens[q.num_prompt:]
        new = new[:new.index(PENDING)] if PENDING in new else new
        if self.stop in new:
            new = new[:new.index(self.stop)]
        elif len(new) < q.max_tokens:
            if self.guess is not None and q.tokens[-1] != PENDING and self.guess.random() < 0.7:
                right = answer(q.tokens, self.guess.randint(1, 6))
                q.proposal = [t if self.guess.random() < 0.8 else self.guess.randrange(VOCAB) for t in right]
            return
        self.scheduler.remove(q)
        self.finished[q.id] = new

    def run(self, most_steps: int = 1000) -> None:
        """Until nothing is left to do."""
        for _ in range(most_steps):
            if self.step() is None and self.flight is None and not self.scheduler._known:
                return
        raise AssertionError("it does not end")
