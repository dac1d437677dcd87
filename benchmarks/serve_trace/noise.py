"""How much of the CPU others took while something was measured, and rounds that are repeated where it was too much."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A moment: seconds on the clock, CPU seconds that the machine's own cores were busy, those of our processes."""

    clock: float
    busy: float
    own: float


def snapshot(cpus: frozenset[int]) -> Snapshot:
    """Now, over the given cores, for this process and all below it.

    Time that the hypervisor gave to other machines (steal) counts as busy: it was not ours.
    """
    times = [t for i, t in enumerate(psutil.cpu_times(percpu=True)) if i in cpus]
    busy = sum(t.user + t.system + sum(getattr(t, name, 0.0) for name in ("nice", "irq", "softirq", "steal"))
               for t in times)
    own = 0.0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            used = process.cpu_times()
            own += used.user + used.system
    return Snapshot(time.perf_counter(), busy, own)


def others_share(before: Snapshot, after: Snapshot, num_cpus: int) -> float:
    """The share of all cores' time between two moments that went to other processes; 0 … 1."""
    available = (after.clock - before.clock) * num_cpus
    taken = (after.busy - before.busy) - (after.own - before.own)
    return min(max(taken / available, 0.0), 1.0) if available > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One contender's part of one round: what it returned, and the CPU share of others meanwhile."""

    round: int
    result: Any
    others: float


@dataclasses.dataclass
class Kept:
    """A contender's measurements: those that count, and those discarded.

    Attributes:
      noisy: none was quiet enough, so the quietest counts after all.
    """

    good: list[Measurement] = dataclasses.field(default_factory=list)
    discarded: list[Measurement] = dataclasses.field(default_factory=list)
    noisy: bool = False


def interleaved(contenders: Mapping[str, Callable[[int, int], Any]], *, rounds: int, most_others: float, repeats: int,
                seconds: float, say: Callable[[str], None], watch: Callable[[], Snapshot] | None = None,
                clock: Callable[[], float] = time.perf_counter) -> dict[str, Kept]:
    """Lets every contender run in turn, round by round.

    Args:
      contenders: by name, what to run; gets the numbers of the round and of the attempt at it, from 0.
      rounds: most rounds.
      most_others: a run during which others took more than this share of the CPU is discarded and repeated.
      repeats: most repetitions of one run.
      seconds: a round is begun, or a run repeated, only if by the time of those before it ends within so many.
      say: gets lines of progress.
      watch: makes snapshots.
      clock: seconds.
    Returns:
      what was measured, by name; every contender has at least one measurement that counts.
    """
    cpus = own_cpus()
    watch = watch or (lambda: snapshot(cpus))
    began, kept = clock(), {name: Kept() for name in contenders}
    round_s = 0.0
    for number in range(rounds):
        if number and clock() - began + round_s > seconds:
            say(f"{number} of {rounds} rounds: another would take {round_s:.0f} s and end after {seconds:.0f} s")
            break
        round_began = clock()
        for name, run in contenders.items():
            for attempt in range(repeats + 1):
                before, at = watch(), clock()
                result = run(number, attempt)
                took, others = clock() - at, others_share(before, watch(), len(cpus))
                measured = Measurement(number, result, others)
                is_quiet = others <= most_others
                (kept[name].good if is_quiet else kept[name].discarded).append(measured)
                say(f"round {number + 1}, {name}: {took:.1f} s, others took {others:.0%} of the CPU"
                    f"{'' if is_quiet else ': discarded'}")
                if is_quiet or attempt == repeats or clock() - began + took > seconds:
                    break
        round_s = clock() - round_began
    for each in kept.values():
        if not each.good:
            each.good, each.noisy = [min(each.discarded, key=lambda m: m.others)], True
    return kept


def own_cpus() -> frozenset[int]:
    """The cores that this process, and all that it starts, may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(psutil.cpu_count() or 1))


def use_cpus(count: int) -> None:
    """Confines this process, and all that it will start, to so many cores, so that all have the same threads.

    Raises:
      SystemExit: there are fewer.
    """
    cpus = sorted(own_cpus())
    if count > len(cpus):
        raise SystemExit(f"--threads={count}: there are {len(cpus)} cores")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus[:count])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(count)
