"""How often and how many at once: rates by the package `limits`, and a count of what runs."""

from __future__ import annotations

import collections
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

_CLOCK_STEP_S = 1.0  # backwards, from which the clock was set and didn't merely drift


class _NoTimer:
    """In place of the storage's timer, which would be started again for most requests: 0.4 ms each for a thread."""

    def is_alive(self) -> bool:
        return True


class Rates:
    """Requests of each key in any 60 seconds. Not safe for several threads at once: `Guard` has the lock."""

    def __init__(self) -> None:
        self._storage = MemoryStorage()
        self._storage.timer.join()
        self._storage.timer = _NoTimer()
        self._limiter = MovingWindowRateLimiter(self._storage)
        self._ahead = time.time() - time.monotonic()

    def hit(self, key_id: str, per_minute: int) -> float | None:
        """Counts a request, or says in how many seconds there will be room for one.

        Returns:
          None if it is one of the `per_minute`; a request that is not doesn't count.
        """
        self._forget_if_clock_was_set_back()
        limit = RateLimitItemPerMinute(per_minute)
        if self._limiter.hit(limit, key_id):
            del self._storage.events[limit.key_for(key_id)][per_minute:]  # older ones say nothing: no timer is missed
            return None
        return max(0.0, self._limiter.get_window_stats(limit, key_id).reset_time - time.time())

    def _forget_if_clock_was_set_back(self) -> None:
        """`limits` counts by the wall clock: set back by an hour, it would refuse everybody for one."""
        ahead = time.time() - time.monotonic()
        if ahead < self._ahead - _CLOCK_STEP_S:
            self._storage.reset()
        self._ahead = ahead


class Concurrency:
    """Requests of each key that run."""

    def __init__(self) -> None:
        self._running: collections.Counter[str] = collections.Counter()

    def take(self, key_id: str, at_once: int | None) -> bool:
        """Counts a request as running, if that makes no more than `at_once`."""
        if at_once is not None and self._running[key_id] >= at_once:
            return False
        self._running[key_id] += 1
        return True

    def release(self, key_id: str) -> None:
        """A request that was taken has ended."""
        self._running[key_id] -= 1
        if not self._running[key_id]:
            del self._running[key_id]
