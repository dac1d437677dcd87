"""From the engine's thread to one call's coroutine, without either waiting for the other."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable

from llm_jax.inference.request import Delta, PromptLogprob, TopLogprobs


class Closed(Exception):
    """The server is going down and this call ends now."""


@dataclasses.dataclass
class Gathered:
    """Deltas of one sample, joined as they come: less to hold than the deltas themselves."""

    text: list[str] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[TopLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        """Appends what came next."""
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.top_logprobs.extend(delta.top_logprobs)
        self.prompt_logprobs += delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.last = delta

    def joined(self) -> Delta:
        """All of it as one delta."""
        last = self.last or Delta()
        return Delta(
            text="".join(self.text), token_ids=tuple(self.token_ids), logprobs=tuple(self.logprobs),
            top_logprobs=tuple(self.top_logprobs), prompt_logprobs=self.prompt_logprobs,
            finish_reason=last.finish_reason, usage=last.usage, error=last.error, embedding=last.embedding)


class Mailbox:
    """Deltas of one call's samples, merged per sample while the reader is busy.

    `push` is called by the engine's thread and never blocks: a reader that lags finds one larger delta instead of many
    small ones, so what is held is at most the text of the request itself and no other request is slowed down.

    Args:
      loop: the reader's.
      on_end: called in the loop when a sample has ended, whether or not the reader has come to know of it.

    Attributes:
      first_at: when each sample's first token came, on `time.monotonic`: however late the reader is.
      last_at: when the last one so far came.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_end: Callable[[], None] | None = None) -> None:
        self._loop = loop
        self._on_end = on_end
        self._lock = threading.Lock()
        self.first_at: dict[int, float] = {}
        self.last_at: dict[int, float] = {}
        self._pending: dict[int, Gathered] = {}
        self._woken = False  # a wake-up is on its way or has not been acted on: no second one is needed
        self._news = asyncio.Event()
        self._closed = False
        self._closing: set[asyncio.Timeout] = set()  # blocks that end with it

    def push(self, sample: int, delta: Delta) -> None:
        """Adds what `sample` has produced. Any thread; safe after the loop has closed."""
        now = time.monotonic()
        with self._lock:
            if delta.token_ids:
                self.first_at.setdefault(sample, now)
                self.last_at[sample] = now
            self._pending.setdefault(sample, Gathered()).add(delta)
            wake, self._woken = not self._woken, True
        try:
            if wake:
                self._loop.call_soon_threadsafe(self._news.set)
            if delta.finish_reason is not None and self._on_end is not None:
                self._loop.call_soon_threadsafe(self._on_end)
        except RuntimeError:  # the loop has closed, so nobody is left to read
            pass

    def close(self) -> None:
        """Makes `take` and `open` raise `Closed`, now and from now on. Event loop only."""
        if self._closed:
            return
        self._closed = True
        self._news.set()
        for limit in self._closing:
            limit.reschedule(self._loop.time())

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """A block that `close` ends, whatever it waits for.

        Raises:
          Closed: `close` was called.
        """
        if self._closed:
            raise Closed
        limit = asyncio.timeout(None)
        self._closing.add(limit)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise Closed from None
        finally:
            self._closing.discard(limit)

    async def take(self) -> dict[int, Delta]:
        """Waits until at least one sample has news; returns the merged delta of each that has.

        Raises:
          Closed: `close` was called.
        """
        await self._news.wait()
        if self._closed:
            raise Closed
        with self._lock:
            pending, self._pending = self._pending, {}
            self._woken = False
            self._news.clear()
        return {sample: gathered.joined() for sample, gathered in sorted(pending.items())}
