"""What the scheduler hands about: sequences, and the plan of one device step. Plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

# Stands in `Sequence.tokens` for a token that a dispatched step draws and the host does not know yet.
PENDING = -1


@dataclasses.dataclass(eq=False)
class Sequence:
    """One completion in progress.

    Attributes:
      id: the request's.
      tokens: the prompt, then what was generated; at its end up to two are PENDING.
      num_prompt: length of the prompt.
      max_tokens: most tokens to generate.
      priority: higher goes first; equal ones by arrival.
      tenant: who may share its pages.
      deadline: when it is to be given up, on the scheduler's clock; None is never.
      needs_host: every token must be known to the host before the next is computed (grammar masks, prompt look-up).
      reuse: whether pages of the prefix cache may stand for the beginning of its prompt. Not if something is wanted of
        every position.
      proposal: tokens that may come next, to be verified with the next step. Set it when the last token is known; it is
        emptied when that step is resolved, or at once if a step draws without it.
      computed: tokens whose keys and values are in the cache, or will be by the steps dispatched.
      pages: held pages, in order of position.
      slot: its place among the running ones; −1 while it does not run.
      cached_tokens: those of the prompt that were in the prefix cache.
      prefill_steps: device steps that carried a chunk of it (for tests and statistics).
      preemptions: how often it lost its place.
      admissions: how often it was given one, and so, perhaps, another slot.
      arrival: how many were added before it.
      rank: the order in which sequences go; the smallest first.

    The rest is the scheduler's: `verifying` (a step with proposals is in flight), `digests` (hashes of its first full
    pages), `registered` (pages shown to the prefix cache), `stale` (has keys from before `forget_prefixes`) and
    `host_pages` (where its pages lie while it is swapped out).
    """

    id: int
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    needs_host: bool = False
    reuse: bool = True
    proposal: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    slot: int = -1
    cached_tokens: int = 0
    prefill_steps: int = 0
    preemptions: int = 0
    admissions: int = 0
    arrival: int = -1
    rank: tuple[float, int] = (0.0, -1)
    verifying: bool = False
    digests: list[bytes] = dataclasses.field(default_factory=list)
    registered: int = 0
    stale: bool = False
    host_pages: list[int] = dataclasses.field(default_factory=list)

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt, pending ones included."""
        return len(self.tokens) - self.num_prompt


@dataclasses.dataclass(slots=True, eq=False)
class Chunk:
    """Tokens [start, start + count) of a sequence, to be computed in one step, and `proposed` of its proposal.

    Attributes:
      samples: whether the step computes the sequence's last token, and so draws the next.
    """

    sequence: Sequence
    start: int
    count: int
    proposed: int = 0
    samples: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.samples = self.start + self.count == len(self.sequence.tokens)


@dataclasses.dataclass(frozen=True)
class Swap:
    """A copy of a sequence's pages from the device to the host or back: pages[i] ↔ host_pages[i]."""

    sequence_id: int
    pages: tuple[int, ...]
    host_pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One device step: `decode` chunks have one token each (and proposals), `prefill` chunks up to the chunk size.

    Before it come the copies, in the order of dispatch: after everything that earlier steps wrote, first all of
    `swap_out` from the device to host pages, then all of `swap_in` from host pages to the device, then the step.
    """

    decode: tuple[Chunk, ...]
    prefill: tuple[Chunk, ...]
    swap_out: tuple[Swap, ...] = ()
    swap_in: tuple[Swap, ...] = ()

    def __iter__(self) -> Iterator[Chunk]:
        yield from self.decode
        yield from self.prefill


@dataclasses.dataclass
class SchedulerStats:
    """Counts since the scheduler was made.

    Attributes:
      preemptions: times that a running sequence lost its place.
      swaps_out, swaps_in: times that a sequence's pages were copied to the host and back.
      prefix_lookups: tokens looked for in the prefix cache, each sequence once.
      prefix_hits: those found.
      expired: sequences given up for their deadline or their wait.
    """

    preemptions: int = 0
    swaps_out: int = 0
    swaps_in: int = 0
    prefix_lookups: int = 0
    prefix_hits: int = 0
    expired: int = 0
