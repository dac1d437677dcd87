"""The doors' way into the engine's queue: who is refused where it is full, and who waits."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable
from typing import TypeVar

from llm_jax.inference.request import QueueFull

AGAIN_S = 0.25  # after which a part that waits looks for room that others than these doors made
Submitted = TypeVar("Submitted")


class Entrant:
    """A request as the queue knows it.

    Attributes:
      begun: whether the engine has taken any part of it.
      first: held while its first part is taken in: of parts that come together, one is the first.
    """

    def __init__(self) -> None:
        self.begun = False
        self.first = asyncio.Lock()


class Room:
    """Room in the engine's queue for parts of requests; lives in one event loop.

    A request is refused at once or runs to its end. Its first part is refused where the queue is full: nothing of it
    has run then, and its caller may come again. Those behind it wait for room, since to fail there would throw away
    what was computed. Their places are not set aside before: a request may have more parts (2,048 prompts) than the
    queue has places, and a place that is kept empty serves nobody. As long as anything runs, room comes.

    Parts wait in order of priority, then of coming. While one waits, nobody of its priority or a lower one passes it:
    else small requests that keep coming would keep a part of many samples out for ever.
    """

    def __init__(self) -> None:
        self._line: list[_Waiting] = []

    async def enter(self, entrant: Entrant, priority: int, submit: Callable[[], Awaitable[Submitted]]) -> Submitted:
        """What `submit` returns, once the queue had room.

        Args:
          entrant: whose part it is.
          priority: its.
          submit: hands the part to the engine, whole or not at all; called again after each QueueFull.

        Raises:
          QueueFull: it is the first part of its request.
        """
        if not entrant.begun:
            async with entrant.first:
                if not entrant.begun:
                    if self._is_behind(priority):
                        raise QueueFull("the queue is full, and parts of requests that have begun wait for room; "
                                        "try again later")
                    found = await submit()
                    entrant.begun = True
                    return found
        if not self._is_behind(priority):
            with contextlib.suppress(QueueFull):
                return await submit()
        return await self._in_turn(priority, submit)

    def freed(self) -> None:
        """Something has ended: there may be room."""
        if self._line:
            self._line[0].look.set()

    def _is_behind(self, priority: int) -> bool:
        return bool(self._line) and self._line[0].priority >= priority

    async def _in_turn(self, priority: int, submit: Callable[[], Awaitable[Submitted]]) -> Submitted:
        mine = _Waiting(priority)
        bisect.insort(self._line, mine, key=lambda one: -one.priority)
        try:
            while True:
                mine.look.clear()
                if self._line[0] is mine:
                    with contextlib.suppress(QueueFull):
                        return await submit()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(AGAIN_S):
                        await mine.look.wait()
        finally:
            self._line.remove(mine)
            self.freed()


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A part in the line; `look` is set when it should try again."""

    priority: int
    look: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
