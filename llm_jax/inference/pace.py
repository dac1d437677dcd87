"""When the next step is sent: late enough that what arrives meanwhile is part of it, early enough that the device does
not wait.

A step that is sent while another one runs can't be changed any more. Sent as soon as that one has begun, it would make
a request that arrives then wait for both of them before its own first step. A step of one compiled shape takes about as
long as the last ones did, so sending can wait for nearly that long.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable, Hashable

_KEPT = 8  # of the last steps of a shape, and of the host's last times
_SHARE = 0.85  # of the shortest of them: what is waited for at most
_OVERSLEPT = 0.8  # of what was believed, if the device had finished before
_WORTH_S = 0.02  # less would gain nobody much, and waking up costs a step of a few milliseconds some per cent


class Pace:
    """How long steps and their preparation take, and how long the next one may wait.

    Called by one thread, in turn: `hold_s` while a step is under way, `sent` for the next, `landed` for the first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._of_shape: dict[Hashable, collections.deque[float]] = {}
        self._of_host: collections.deque[float] = collections.deque(maxlen=_KEPT)
        self._under_way = 0  # steps sent that have not landed
        self._since: float | None = None  # when the device began what it does; None if it does nothing, or nobody knows

    def hold_s(self, shape: Hashable) -> float:
        """Seconds for which nothing need be sent, while a step of `shape` is under way; 0 if they are few."""
        seconds = self._of_shape.get(shape)
        if self._since is None or not seconds or not self._of_host:
            return 0.0
        lead = 2 * statistics.median(self._of_host)
        left = self._since + _SHARE * min(seconds) - lead - self._clock()
        return left if left >= _WORTH_S else 0.0

    def overslept(self, shape: Hashable) -> None:
        """The device has finished a step of `shape`, and has nothing to do."""
        if seconds := self._of_shape.get(shape):
            seconds.append(_OVERSLEPT * min(seconds))
        self._since = None

    def sent(self, host_s: float) -> None:
        """A step was sent, which took the host so long."""
        if self._under_way:
            self._of_host.append(host_s)
        else:
            self._since = self._clock()
        self._under_way += 1

    def landed(self, shape: Hashable) -> None:
        """A step of `shape` has finished; if another one is under way, that begins now."""
        now = self._clock()
        if self._since is not None:
            self._of_shape.setdefault(shape, collections.deque(maxlen=_KEPT)).append(now - self._since)
        self._under_way -= 1
        self._since = now if self._under_way else None
