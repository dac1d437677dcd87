"""Which requests take part in the next step; plain Python, never touches an array.

Every step carries at most one token of each decoding sequence (and tokens proposed to follow it), and at most `chunk`
prompt tokens of up to `prefill_rows` sequences that are not that far yet. A sequence is nothing but its tokens and how
many of them are `computed` (their keys and values are in its pages): one token to go is a decode, more is prefill, so a
preempted sequence simply becomes an uncomputed prompt again.

A step is scheduled while the one before it still runs: `schedule`, `dispatched`, and then `resolve` of the plan before.
That is right because the device runs steps in the order of dispatch: pages of a sequence that ended may be taken by the
next plan although a step in flight still writes them, and a page counts as computed as soon as its step is dispatched.
"""

from __future__ import annotations

import bisect
import heapq
import time
from collections.abc import Callable, Mapping

from llm_jax.inference.pages import PagePool
from llm_jax.inference.prefix_cache import PrefixCache
from llm_jax.inference.request import PromptTooLong, QueueFull
from llm_jax.inference.sequence import PENDING, Chunk, Plan, SchedulerStats, Sequence, Swap
from llm_jax.inference.swap_space import SwapSpace

__all__ = ["PENDING", "Chunk", "Plan", "Scheduler", "SchedulerStats", "Sequence", "Swap"]


_FEW_LIMITS = 1000


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank


class Scheduler:
    """Admits, batches, grows, preempts and frees sequences.

    Order is by priority, then arrival, with ageing: a step of priority is worth `ageing_s` seconds of having arrived
    earlier. So the order of two sequences never changes, and only finitely many can come before any one. When pages run
    out, cached ones are evicted; when none are left, the last running sequence in that order gives its pages back and
    waits again. The same happens when one before it, having come later with a higher priority, finds no row or no
    pages. As the first in order always advances and any sequence fits the pool alone, everyone finishes.

    A preempted sequence is recomputed, for which its full pages often are still in the prefix cache, or, while there
    are free host pages, swapped: the plan says which pages to copy to the host, and when the sequence comes back, to
    which new pages they are copied.

    Only `add` and `expired` read the clock; `schedule` follows from the calls before it alone.

    Args:
      pool: all of whose pages are free.
      max_rows: sequences that run at once; each has a slot 0 … max_rows − 1.
      prefill_rows: most sequences whose prompts advance in one step.
      chunk: most prompt tokens of one sequence in one step.
      max_context: longest sequence.
      max_queue: most sequences that wait.
      clock: seconds.
      ageing_s: seconds of waiting that make up for one step of priority; None is no ageing: higher priorities always
        go first.
      max_wait_s: longest time that a sequence may wait until it runs first; None is any.
      prefix_cache: whether sequences that begin alike share pages.
      shared_prefixes: whether they do so across tenants.
      max_proposed: most proposed tokens verified in one step.
      swap_pages: host pages for preempted sequences; 0 recomputes them.
    """

    def __init__(self, pool: PagePool, *, max_rows: int, prefill_rows: int, chunk: int, max_context: int,
                 max_queue: int, clock: Callable[[], float] = time.monotonic, ageing_s: float | None = 60.0,
                 max_wait_s: float | None = None, prefix_cache: bool = True, shared_prefixes: bool = False,
                 max_proposed: int = 0, swap_pages: int = 0):
        if pool.pages_for(max_context) > pool.num_pages:
            raise ValueError(f"a context of {max_context} tokens does not fit {pool.num_pages} pages of "
                             f"{pool.page_size}")
        self.pool = pool
        self.max_rows = max_rows
        self.prefill_rows = prefill_rows
        self.chunk = chunk
        self.max_context = max_context
        self.max_queue = max_queue
        self.clock = clock
        self.ageing_s = ageing_s
        self.max_wait_s = max_wait_s
        self.max_proposed = max_proposed
        self.prefixes = PrefixCache(pool, enabled=prefix_cache, shared=shared_prefixes)
        self.waiting: list[Sequence] = []  # both kept in order
        self.running: list[Sequence] = []
        self.stats = SchedulerStats()
        self._known: dict[int, Sequence] = {}  # added and not removed, also those whose last step is in flight
        self._limits: list[tuple[float, int, bool]] = []  # heap of (time, id, whether it holds for waiting only)
        self._free_slots = list(range(max_rows - 1, -1, -1))
        self._swap = SwapSpace(swap_pages)
        self._arrivals = 0

    @property
    def max_prompt(self) -> int:
        """Longest prompt that leaves room for one new token."""
        return self.max_context - 1

    def check(self, num_prompt: int) -> None:
        """Raises PromptTooLong or QueueFull if a prompt of that length would be refused now."""
        if num_prompt > self.max_prompt:
            raise PromptTooLong(f"the prompt has {num_prompt} tokens; at most {self.max_prompt} fit "
                                f"(context {self.max_context}, one for the answer)")
        # Those that a free row awaits are not counted: they wait for no longer than a step.
        if len(self.waiting) >= self.max_queue + self.max_rows - len(self.running):
            raise QueueFull(f"{len(self.waiting)} requests are waiting already, the most allowed; try again later")

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; its max_tokens is cut to what the context leaves."""
        self.check(sequence.num_prompt)
        sequence.max_tokens = min(sequence.max_tokens, self.max_context - sequence.num_prompt)
        sequence.arrival = self._arrivals
        self._arrivals += 1
        now = self.clock()
        at = -sequence.priority if self.ageing_s is None else now - sequence.priority * self.ageing_s
        sequence.rank = (at, sequence.arrival)
        if sequence.deadline is not None:
            heapq.heappush(self._limits, (sequence.deadline, sequence.id, False))
        if self.max_wait_s is not None:
            heapq.heappush(self._limits, (now + self.max_wait_s, sequence.id, True))
        self._known[sequence.id] = sequence
        bisect.insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, finished or not, and frees its pages; nothing happens if it is not here."""
        if self._known.get(sequence.id) is not sequence:
            return
        del self._known[sequence.id]
        for group in (self.running, self.waiting):
            at = bisect.bisect_left(group, sequence.rank, key=_rank)
            if at < len(group) and group[at] is sequence:
                del group[at]
        self._release(sequence)
        self._swap.forget(sequence)
        # A limit is found out of date when its time comes, which may be in a year: not all are kept till then.
        if len(self._limits) > 2 * len(self._known) + _FEW_LIMITS:
            self._limits = [limit for limit in self._limits if limit[1] in self._known]
            heapq.heapify(self._limits)

    def schedule(self) -> Plan | None:
        """The next step, its pages allocated; None if there is nothing to do before the steps in flight are resolved.

        Each plan must be passed to `dispatched` before the next is asked for.
        """
        self._admit()
        decode: list[Chunk] = []
        prefill: list[Chunk] = []
        begun: set[bytes] = set()  # the pages that this step works on
        size = self.pool.page_size
        for sequence in tuple(self.running):
            tokens, computed = sequence.tokens, sequence.computed
            if sequence.slot < 0:  # preempted by one before it
                continue
            if len(tokens) - sequence.num_prompt >= sequence.max_tokens or tokens[-1] == PENDING and (
                    sequence.needs_host or sequence.verifying):
                continue
            if len(tokens) - computed > 1:
                if len(prefill) == self.prefill_rows:
                    continue
                self._count_hits(sequence, self.prefixes.find_more(sequence))
                computed = sequence.computed
                # Who begins alike waits for the first of them, and finds the page next time.
                key = self.prefixes.next_page(sequence)
                if key in begun and sequence.reuse and len(tokens) - computed > 1:
                    continue
                if key is not None:
                    begun.add(key)
            if len(tokens) - computed > 1:
                count = min(self.chunk, len(tokens) - computed)
                if self._grow(sequence, computed + count):
                    prefill.append(Chunk(sequence, computed, count))
            elif computed < len(sequence.pages) * size and not sequence.proposal or self._grow(sequence, computed + 1):
                decode.append(Chunk(sequence, computed, 1, self._propose(sequence) if sequence.proposal else 0))
        if not decode and not prefill:
            return None
        return Plan(tuple(decode), tuple(prefill), *self._swap.orders())

    def dispatched(self, plan: Plan) -> None:
        """Records that `plan` was sent to the device: its tokens are computed, those it draws are pending.

        A sequence that has no more to draw gives its place and its pages up now; for the caller it ends when the token
        is known, and must then be removed.
        """
        for swap in plan.swap_in:
            if swap.sequence_id in self._known:
                self._swap.forget(self._known[swap.sequence_id])
        self.stats.swaps_out += len(plan.swap_out)
        self.stats.swaps_in += len(plan.swap_in)
        for chunk in plan.prefill:
            chunk.sequence.prefill_steps += 1
        for chunk in plan:
            sequence = chunk.sequence
            if sequence.slot < 0:  # removed since
                continue
            sequence.computed += chunk.count
            if chunk.samples:
                sequence.tokens.append(PENDING)
                if chunk.proposed:
                    sequence.verifying = True
                elif sequence.proposal:  # it was for the token that is drawn now
                    sequence.proposal = []
            self.prefixes.register(sequence)
            if len(sequence.tokens) - sequence.num_prompt >= sequence.max_tokens:
                self.running.remove(sequence)
                self._release(sequence)

    def resolve(self, plan: Plan, drawn: Mapping[int, list[int]]) -> None:
        """Records what a dispatched plan drew.

        Args:
          plan: the oldest that is not resolved.
          drawn: for each chunk that samples, by sequence id, the accepted part of its proposal and one token more.
            Those of sequences removed since need not be there.
        """
        for chunk in plan:
            sequence = chunk.sequence
            if not chunk.samples or self._known.get(sequence.id) is not sequence:
                continue
            tokens, at = drawn[sequence.id], chunk.start + chunk.count
            sequence.tokens[at:at + 1] = tokens
            if chunk.proposed:
                if sequence.computed == at:  # not given up since
                    sequence.computed += len(tokens) - 1
                sequence.proposal = []
                sequence.verifying = False
            self.prefixes.register(sequence)

    def expired(self) -> list[Sequence]:
        """Takes out, and returns, those past their deadline, and those that have waited max_wait_s and never run."""
        now, gone = self.clock(), []
        while self._limits and self._limits[0][0] <= now:
            _, id_, for_waiting = heapq.heappop(self._limits)
            sequence = self._known.get(id_)
            if sequence is None or for_waiting and (sequence.slot >= 0 or sequence.preemptions or sequence.computed):
                continue
            self.remove(sequence)
            gone.append(sequence)
        self.stats.expired += len(gone)
        return gone

    def forget_prefixes(self) -> None:
        """Empties the prefix cache, as after new weights; what running sequences have in their pages is not shown."""
        self.prefixes.forget()
        for sequence in self._known.values():
            sequence.stale = sequence.computed > 0

    def restart(self) -> None:
        """Nothing is computed any more, as after a failed step: all sequences are prompts again, and wait.

        Plans not resolved by now are void: their pending tokens will be drawn again.
        """
        self.forget_prefixes()
        self.running, self.waiting = [], []
        for sequence in self._known.values():
            self._release(sequence)
            self._swap.forget(sequence)
            while sequence.tokens[-1] == PENDING:
                sequence.tokens.pop()
            sequence.computed, sequence.stale, sequence.verifying, sequence.proposal = 0, False, False, []
            if sequence.num_generated < sequence.max_tokens:
                self.waiting.append(sequence)
        self.waiting.sort(key=_rank)

    def wasted_slots(self) -> int:
        """Slots of held pages that hold no token."""
        return sum(len(s.pages) * self.pool.page_size - s.computed for s in self.running)

    def _may_admit(self) -> bool:
        """Whether sequences may start in the next step; a subclass for static batching says `not self.running`."""
        return True

    def _owed(self) -> int:
        """Pages that running prompts will still take; without them a burst of admissions would preempt itself."""
        return sum(max(self.pool.pages_for(len(s.tokens)) - len(s.pages), 0) for s in self.running)

    def _admit(self) -> None:
        if not self.waiting or not self._may_admit():
            return
        while self.waiting and self.waiting[0].tokens[-1] != PENDING:
            head = self.waiting[0]
            if len(self.running) >= self.max_rows and self.running[-1].rank < head.rank:
                break
            pages = self.prefixes.match(head)
            cached = sum(1 for page in pages if not self.pool.holders(page))
            lacking = self.pool.pages_for(len(head.tokens)) - len(pages) + cached + self._owed() - (
                self.pool.num_available)
            if len(self.running) < self.max_rows and lacking <= 0:
                self._start(head, pages)
            elif not self._make_room(head, lacking):
                break

    def _make_room(self, head: Sequence, lacking: int) -> bool:
        """Preempts those after `head` until a row and `lacking` pages more are there; False if they would not be."""
        count = 0
        for victim in reversed(self.running):
            if count and lacking <= 0 or victim.rank < head.rank:
                break
            count += 1
            owed = max(self.pool.pages_for(len(victim.tokens)) - len(victim.pages), 0)
            lacking -= owed + sum(1 for page in victim.pages if self.pool.holders(page) == 1)
        if not count or lacking > 0:
            return False
        for _ in range(count):
            self._preempt()
        return True

    def _start(self, sequence: Sequence, cached: list[int]) -> None:
        """The first of the queue runs, its beginning in the pages `cached`."""
        del self.waiting[0]
        for page in cached:
            self.pool.share(page)
        sequence.pages = cached
        sequence.registered = len(cached)
        if sequence.reuse and not sequence.preemptions:
            self.stats.prefix_lookups += len(sequence.tokens)
        if len(cached) * self.pool.page_size >= sequence.computed:
            sequence.computed = len(cached) * self.pool.page_size
            self._count_hits(sequence, sequence.computed)
            self._swap.forget(sequence)
        else:
            sequence.pages = cached + self.pool.take(self.pool.pages_for(sequence.computed) - len(cached))
            self._swap.bring_in(sequence, first=len(cached))
        sequence.slot = self._free_slots.pop()
        sequence.admissions += 1
        bisect.insort(self.running, sequence, key=_rank)

    def _count_hits(self, sequence: Sequence, num_tokens: int) -> None:
        if num_tokens and not sequence.preemptions:
            sequence.cached_tokens += num_tokens
            self.stats.prefix_hits += num_tokens

    def reserve(self, sequence: Sequence, most: int) -> int:
        """Gives a running sequence pages for up to `most` tokens after its last; for their sake nobody is preempted.

        Returns how many of them have room, no more than are verified in one step or may still be drawn.
        """
        most = min(most, self.max_proposed, sequence.max_tokens - sequence.num_generated - 1)
        if most <= 0:
            return 0
        end = len(sequence.tokens)
        more = min(self.pool.pages_for(end + most) - len(sequence.pages), self.pool.num_available)
        if more > 0:
            sequence.pages.extend(self.pool.take(more))
        return max(min(most, len(sequence.pages) * self.pool.page_size - end), 0)

    def _propose(self, sequence: Sequence) -> int:
        """How many proposed tokens the step verifies."""
        return 0 if sequence.tokens[-1] == PENDING else self.reserve(sequence, len(sequence.proposal))

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives `sequence` pages for `num_tokens`, preempting from the end of the order; False if it gave way."""
        need = self.pool.pages_for(num_tokens) - len(sequence.pages)
        while need > self.pool.num_available:
            self._preempt()
            if sequence.slot < 0:
                return False
        if need > 0:
            sequence.pages.extend(self.pool.take(need))
        return True

    def _preempt(self) -> None:
        """The last in order gives its place and its pages up and waits again."""
        victim = self.running.pop()
        self.stats.preemptions += 1
        victim.preemptions += 1
        if not self._swap.take_out(victim):
            victim.computed = 0
            victim.stale = False
        self._release(victim)
        bisect.insort(self.waiting, victim, key=_rank)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(reversed(sequence.pages))  # so that the end of a prefix is evicted before its beginning
        sequence.pages = []
        sequence.registered = 0
        if sequence.slot >= 0:
            self._free_slots.append(sequence.slot)
            sequence.slot = -1
