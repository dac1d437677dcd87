"""What the doors hold of the engine, in whichever process it runs."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.inference.generation_config import SamplingDefaults
from llm_jax.inference.request import Delta, QueueFull, SamplingParams

MANY_TOKENS = 50_000  # of all samples' prompts: to take them in takes about 3 ms, in which no other call goes on
MAX_PREPARING = 3  # requests taken in by other threads at once: a new grammar may take one two seconds

Listener = Callable[[Delta], None]


class Front(Protocol):
    """The engine as the doors see it; used in one event loop.

    Attributes:
      tokenizer: the model's.
      defaults: how to sample where a request says nothing.
      max_context: longest sequence, prompt and completion, in tokens.
      max_prompt_tokens: longest prompt, in tokens.
      max_requests: requests that may run and wait together.
      is_live: whether new requests are taken.
      weights_version: changes when other weights are served: what was answered before is out of date.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def defaults(self) -> SamplingDefaults: ...

    @property
    def max_context(self) -> int: ...

    @property
    def max_prompt_tokens(self) -> int: ...

    @property
    def max_requests(self) -> int: ...

    @property
    def is_live(self) -> bool: ...

    @property
    def weights_version(self) -> int: ...

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of a prompt, with BOS in front if the model expects one, unless told otherwise. Any thread."""

    async def submit_samples(self, prompt_ids: Sequence[int], params: Sequence[SamplingParams],
                             listeners: Sequence[Listener], priority: int = 0, *, tenant: str = "",
                             deadline_s: float | None = None) -> list[int]:
        """Queues several completions of one prompt, all or none of them, and returns their ids.

        Arguments and errors as of `Service.submit_samples`. A listener may be called before this returns, from any
        thread, and must not block. If this is cancelled, nothing stays queued.
        """

    async def embed(self, prompt_ids: Sequence[int], pooling: str, listener: Listener, priority: int = 0) -> int:
        """Queues a request for an embedding, as `Service.embed`; the rest as of `submit_samples`."""

    def cancel(self, request_id: int) -> None:
        """Ends a request, whose listener may or may not hear of it; never blocks. Nothing happens if it has ended."""

    async def stats(self) -> dict[str, Any]:
        """The counts of `Service.stats`.

        Raises:
          Unavailable: the engine has ended.
        """

    def begin_drain(self) -> None:
        """From now on new requests are refused; those under way go on."""

    def close(self) -> None:
        """Ends what is under way, and the engine. May block, for seconds."""

    async def start(self) -> None:
        """Begins to hear from the engine, in this event loop; to be awaited before anything is submitted."""

    async def lost(self) -> str:
        """Returns when the engine has ended without having been asked to: why. Else never."""


class InProcess:
    """The front of a `Service` in this process, or of what behaves like one."""

    def __init__(self, service: Any) -> None:
        self.service = service
        self._preparing = asyncio.Semaphore(MAX_PREPARING)
        self._coming = 0  # requests that another thread takes in, or that wait for one

    @property
    def tokenizer(self) -> Any:
        return self.service.tokenizer

    @property
    def defaults(self) -> SamplingDefaults:
        return self.service.defaults

    @property
    def max_context(self) -> int:
        return self.service.max_context

    @property
    def max_prompt_tokens(self) -> int:
        return self.service.max_prompt_tokens

    @property
    def max_requests(self) -> int:
        return self.service.max_requests

    @property
    def is_live(self) -> bool:
        return bool(self.service.is_live)

    @property
    def weights_version(self) -> int:
        return getattr(self.service, "weights_version", 0)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return self.service.encode(text, add_bos=add_bos)

    async def submit_samples(self, prompt_ids: Sequence[int], params: Sequence[SamplingParams],
                             listeners: Sequence[Listener], priority: int = 0, *, tenant: str = "",
                             deadline_s: float | None = None) -> list[int]:
        submit = functools.partial(self.service.submit_samples, prompt_ids, params, listeners, priority, tenant=tenant,
                                   deadline_s=deadline_s)
        long = takes_long(prompt_ids, params)
        self._check_room(len(params), long)
        if not long:
            return submit()
        self._coming += len(params)
        try:
            await self._preparing.acquire()
        except BaseException:
            self._coming -= len(params)
            raise
        task = asyncio.ensure_future(asyncio.to_thread(submit))
        task.add_done_callback(functools.partial(self._taken_in, len(params)))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:  # the client left, but a thread can't be stopped, and keeps its place
            task.add_done_callback(self._cancel_all)
            raise

    def _check_room(self, count: int, long: bool) -> None:
        """What comes by another thread counts before the service knows of it.

        Raises:
          QueueFull: there is no room for so many more.
        """
        if not (self._coming or long):
            return  # the service finds out
        stats = self.service.stats()
        under_way = stats["running"] + stats["waiting"] + self._coming
        if under_way + count > self.max_requests:
            raise QueueFull(f"{under_way} requests run and wait already, of at most {self.max_requests}; "
                            "try again later")

    def _taken_in(self, count: int, _task: asyncio.Future[list[int]]) -> None:
        self._coming -= count
        self._preparing.release()

    def _cancel_all(self, submitted: asyncio.Future[list[int]]) -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            for request_id in submitted.result():
                self.service.cancel(request_id)

    async def embed(self, prompt_ids: Sequence[int], pooling: str, listener: Listener, priority: int = 0) -> int:
        self._check_room(1, False)
        return self.service.embed(prompt_ids, pooling, listener, priority)

    def cancel(self, request_id: int) -> None:
        self.service.cancel(request_id)

    async def stats(self) -> dict[str, Any]:
        return self.service.stats()

    def begin_drain(self) -> None:
        self.service.begin_drain()

    def close(self) -> None:
        self.service.close()

    async def start(self) -> None:
        pass

    async def lost(self) -> str:
        return await asyncio.get_running_loop().create_future()


def takes_long(prompt_ids: Sequence[int], params: Sequence[SamplingParams]) -> bool:
    """Whether a request is better taken in by a thread of its own."""
    return any(p.constraint is not None for p in params) or len(params) * len(prompt_ids) > MANY_TOKENS


def front_of(service: Any) -> Front:
    """The front of a `Service` in this process; what is a front already is given back as it is."""
    return service if inspect.iscoroutinefunction(service.submit_samples) else InProcess(service)
