"""Where a run's wall time goes: goodput is the share of it that is spent in steps that count.

Categories, whose shares sum to 1:

    step        training steps, sent or awaited
    compile     tracing, lowering and compiling (or reading the compile cache), whatever it is for
    data        the device had nothing to do because the next batch was not there
    checkpoint  restoring, and the part of saving that the steps wait for
    evaluation  on held-out text
    lost        steps that a crash threw away: they were done after the checkpoint that the run went on from
    other       the rest: opening the data, making the first parameters, histograms and pictures

Time between two processes of a run is not counted: nobody knows whether it was a queue or a holiday.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

CATEGORIES = ("step", "compile", "data", "checkpoint", "evaluation", "lost", "other")
_COMPILING = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration",
              "/jax/core/compile/backend_compile_duration")
_BACKEND_COMPILE = _COMPILING[-1]


class Goodput:
    """A clock with one hand a category. It belongs to the thread that made it; that thread trains.

    Attributes:
      compiles: programs that this process has compiled, or read from the compile cache.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._category, self._since = "other", clock()
        self._thread = threading.get_ident()
        self._device = _DeviceClock(clock)
        self._compiled: list[tuple[float, float]] = []
        self._has_carried = False
        self.compiles = 0
        _listeners.add(self)
        _listen()

    def carry_on(self, saved: Mapping[str, float], last: Mapping[str, float] | None = None) -> None:
        """Adds the time of the run's earlier processes. Called again, for a run that went back to a checkpoint, it
        moves what was spent in steps since then to "lost".

        Args:
          saved: `seconds()` in the checkpoint that this process goes on from; empty at the start of a run.
          last: the last `seconds()` that the process before is known to have reported, or None. What it spent in
            steps after the checkpoint is lost.
        """
        if self._has_carried:
            self.enter(self._category)
            self._move("step", "lost", max(self._seconds["step"] - saved.get("step", 0.0), 0.0))
            return
        self._has_carried = True
        before = dict(saved)
        if last is not None and sum(last.values()) > sum(saved.values()):
            before = dict(last)
            lost = max(before.get("step", 0.0) - saved.get("step", 0.0), 0.0)
            before["step"] = before.get("step", 0.0) - lost
            before["lost"] = before.get("lost", 0.0) + lost
        for category, seconds in before.items():
            if category in self._seconds:
                self._seconds[category] += float(seconds)

    def enter(self, category: str) -> str:
        """From now on time belongs to `category`; returns the one before."""
        now = self._clock()
        self._seconds[self._category] += now - self._since
        before, self._category, self._since = self._category, category, now
        return before

    @contextlib.contextmanager
    def spend(self, category: str) -> Iterator[None]:
        """Time within belongs to `category`."""
        before = self.enter(category)
        try:
            yield
        finally:
            self.enter(before)

    def sent(self, outputs: Any) -> None:
        """Notes that a step is under way; `outputs` are arrays that exist when it is done."""
        self._device.sent(outputs)

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time within is waiting for a batch, but for the part during which steps were still running."""
        began = self._clock()
        with self.spend("data"):
            yield
        idle_since = self._device.idle_since()
        until = self._clock() if idle_since is None else idle_since
        hidden = min(max(until - began, 0.0), self._clock() - began)
        self._move("data", "step", hidden)

    def seconds(self) -> dict[str, float]:
        """By category, of the whole run until now."""
        self.enter(self._category)
        return {category: max(seconds, 0.0) for category, seconds in self._seconds.items()}

    def close(self) -> None:
        """Lets go of the thread that watches the device, and of compile events."""
        _listeners.discard(self)
        self._device.close()

    def _move(self, source: str, target: str, seconds: float) -> None:
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def _on_compile(self, event: str, duration: float) -> None:
        if threading.get_ident() != self._thread:  # the time belongs to whoever waits for it
            return
        self.compiles += event == _BACKEND_COMPILE
        # A trace within a trace reports itself too, before the outer one does: only what is new counts.
        end = self._clock()
        start = end - duration
        inside = [span for span in self._compiled if span[0] >= start]
        self._compiled = [span for span in self._compiled if span[0] < start][-64:] + [(start, end)]
        self._move(self._category, "compile", duration - sum(b - a for a, b in inside))


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """By category, summing to 1."""
    whole = sum(seconds.values())
    return {category: value / whole if whole else 0.0 for category, value in seconds.items()}


class _DeviceClock:
    """Knows when the device ran out of work: a thread waits for what was sent, in order."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sent = 0
        self._done = (0, float("-inf"))
        threading.Thread(target=self._wait, name="goodput", daemon=True).start()

    def sent(self, outputs: Any) -> None:
        self._sent += 1
        self._queue.put((self._sent, outputs))

    def idle_since(self) -> float | None:
        """When the last thing that was sent was done; None while it is not."""
        number, at = self._done
        return at if number == self._sent else None

    def close(self) -> None:
        self._queue.put(None)

    def _wait(self) -> None:
        while (item := self._queue.get()) is not None:
            number, outputs = item
            try:
                jax.block_until_ready(outputs)
            except Exception:  # noqa: S110, B902 (the training thread hears of it from the same arrays)
                pass
            self._done = (number, self._clock())
            del item, outputs


# JAX keeps its listeners for good, so there is one for all clocks.
_listeners: weakref.WeakSet[Goodput] = weakref.WeakSet()
_is_listening = False


def _listen() -> None:
    global _is_listening
    if _is_listening:
        return
    _is_listening = True

    def heard(event: str, duration: float, **_: Any) -> None:
        if event in _COMPILING:
            for clock in list(_listeners):
                clock._on_compile(event, duration)

    jax.monitoring.register_event_duration_secs_listener(heard)
