"""Which requests take part in the next step; plain Python, never touches an array.

Every step carries at most one token of each decoding sequence, and at most `chunk` prompt tokens of up to
`prefill_rows` sequences that are not that far yet. A sequence is nothing but its tokens and how many of them are
`computed` (their keys and values are in its pages): one token to go is a decode, more is prefill, so a preempted
sequence simply becomes an uncomputed prompt again.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from llm_jax.inference.pages import PagePool
from llm_jax.inference.request import PromptTooLong, QueueFull


@dataclasses.dataclass(eq=False)
class Sequence:
    """One completion in progress.

    Attributes:
      id: the request's.
      tokens: the prompt, then what was generated.
      num_prompt: length of the prompt.
      max_tokens: most tokens to generate.
      priority: higher goes first; equal ones by arrival.
      computed: tokens whose keys and values are in the cache.
      pages: owned pages, in order of position.
      prefill_steps: device steps that carried a chunk of it (for tests and statistics).
    """

    id: int
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    priority: int = 0
    computed: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    prefill_steps: int = 0
    arrival: int = -1

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + count) of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step computes the sequence's last known token, and so draws the next."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One device step: `decode` chunks have one token each, `prefill` chunks up to the chunk size."""

    decode: tuple[Chunk, ...]
    prefill: tuple[Chunk, ...]

    def __iter__(self) -> Iterator[Chunk]:
        yield from self.decode
        yield from self.prefill


class Scheduler:
    """Admits, batches, grows, preempts and frees sequences.

    Order is by priority, then arrival. When pages run out, the last running sequence in that order gives all of its
    pages back and waits again; as the first in order always advances and any sequence fits the pool alone, everyone
    finishes.
    """

    def __init__(self, pool: PagePool, *, max_rows: int, prefill_rows: int, chunk: int, max_context: int,
                 max_queue: int):
        if pool.pages_for(max_context) > pool.num_pages:
            raise ValueError(f"a context of {max_context} tokens does not fit {pool.num_pages} pages of "
                             f"{pool.page_size}")
        self.pool = pool
        self.max_rows = max_rows
        self.prefill_rows = prefill_rows
        self.chunk = chunk
        self.max_context = max_context
        self.max_queue = max_queue
        self.waiting: collections.deque[Sequence] = collections.deque()  # kept in order
        self.running: list[Sequence] = []  # kept in order
        self.preemptions = 0
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
        self._enqueue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, finished or not, and frees its pages; nothing happens if it is not here."""
        for group in (self.running, self.waiting):
            if sequence in group:
                group.remove(sequence)
                self._release(sequence)

    def schedule(self) -> Plan | None:
        """The next step, its pages allocated; None if there is nothing to do."""
        self._admit()
        decode: list[Chunk] = []
        prefill: list[Chunk] = []
        for sequence in list(self.running):
            if sequence not in self.running:  # preempted by one before it
                continue
            if sequence.remaining == 1:
                target, count = decode, 1
            elif len(prefill) < self.prefill_rows:
                target, count = prefill, min(self.chunk, sequence.remaining)
            else:
                continue
            if self._grow(sequence, sequence.computed + count):
                target.append(Chunk(sequence, sequence.computed, count))
        return Plan(tuple(decode), tuple(prefill)) if decode or prefill else None

    def commit(self, plan: Plan, sampled: dict[int, int]) -> None:
        """Records that `plan` ran and drew `sampled` (sequence id → token) for the chunks that sample."""
        for chunk in plan:
            draws = chunk.samples
            chunk.sequence.computed = chunk.start + chunk.count
            if draws:
                chunk.sequence.tokens.append(sampled[chunk.sequence.id])
        for chunk in plan.prefill:
            chunk.sequence.prefill_steps += 1

    def wasted_slots(self) -> int:
        """Slots of owned pages that hold no token."""
        return sum(len(s.pages) * self.pool.page_size - s.computed for s in self.running)

    @staticmethod
    def _order(sequence: Sequence) -> tuple[int, int]:
        return -sequence.priority, sequence.arrival

    def _enqueue(self, sequence: Sequence) -> None:
        at = len(self.waiting)
        while at and self._order(self.waiting[at - 1]) > self._order(sequence):
            at -= 1
        self.waiting.insert(at, sequence)

    def _admit(self) -> None:
        # Pages that running prompts will still take count as gone, or a burst of admissions would preempt itself.
        owed = sum(self.pool.pages_for(len(s.tokens)) - len(s.pages) for s in self.running)
        while self.waiting and len(self.running) < self.max_rows:
            need = self.pool.pages_for(len(self.waiting[0].tokens))
            if need > self.pool.num_free - owed:
                break
            owed += need
            self.running.append(self.waiting.popleft())
        self.running.sort(key=self._order)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives `sequence` pages for `num_tokens`, preempting from the end of the order; False if it gave way."""
        need = self.pool.pages_for(num_tokens) - len(sequence.pages)
        while need > self.pool.num_free:
            victim = self.running.pop()
            self._release(victim)
            self._enqueue(victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        sequence.pages.extend(self.pool.take(max(need, 0)))
        return True

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.pages)
        sequence.pages = []
        sequence.computed = 0
