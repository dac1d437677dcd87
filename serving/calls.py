"""What every way of asking for text has in common: submit the samples, stream their news, let go of what is left."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import grpc

from llm_jax.inference.request import (
    DeadlineExceeded,
    Delta,
    InvalidRequest,
    QueueFull,
    SamplingParams,
    Unavailable,
)
from serving import messages
from serving.mailbox import Closed, Gathered, Mailbox

MAX_SAMPLES = 64  # samples of one call, or texts to embed
MAX_TENANT_CHARACTERS = 256
LONG_TEXT = 4096  # characters (about 3 ms) from which tokenizing leaves the event loop to other calls
MANY_TOKENS = 50_000  # of all samples' prompts, likewise (about 3 ms to take in)
MAX_PREPARING = 3  # requests taken in by other threads at once: a new grammar may take one two seconds
MAX_MESSAGE_BYTES = 64 << 20  # gRPC itself answers RESOURCE_EXHAUSTED to more, and can't be told what else to say
SMALL_MESSAGE_BYTES = 4 << 20  # a few ms to parse: no request of that size is refused for its size alone
TOKEN_ID_BYTES = 6  # of a token id in a message, tag included, at most
MAX_DETAILS_BYTES = 1500  # of a status message: clients drop a call whose trailers exceed 8 KiB


class Rejected(Exception):
    """A call that ends with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def invalid(message: str) -> Rejected:
    """INVALID_ARGUMENT: the same call would fail again."""
    return Rejected(grpc.StatusCode.INVALID_ARGUMENT, message)


def method(handler: Callable[..., Awaitable]) -> Callable[..., Awaitable]:
    """Makes a servicer method answer `Rejected` and the engine's errors as gRPC statuses.

    Anything unforeseen is INTERNAL for this one call, with its traceback on the server's stderr.
    """

    @functools.wraps(handler)
    async def answered(self, request, context):
        try:
            if isinstance(request, Rejected):
                raise request
            return await handler(self, request, context)
        except Rejected as error:
            rejected = error
        except InvalidRequest as error:
            rejected = invalid(str(error))
        except QueueFull as error:
            rejected = Rejected(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except DeadlineExceeded as error:
            rejected = Rejected(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        except Unavailable as error:
            rejected = Rejected(grpc.StatusCode.UNAVAILABLE, str(error))
        except grpc.aio.BaseError:  # the call is over already (a write after the client left)
            raise
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            rejected = Rejected(grpc.StatusCode.INTERNAL, f"the server failed on this request: {error!r:.200}")
        await context.abort(rejected.code, _shortened(rejected.message))

    return answered


def _shortened(message: str) -> str:
    """A status message that fits: a value that it quotes may be of any length."""
    data = message.encode("utf-8", errors="replace")
    return message if len(data) <= MAX_DETAILS_BYTES else data[:MAX_DETAILS_BYTES].decode(errors="ignore") + "…"


class Calls:
    """The running calls over one `Service`.

    Attributes:
      service: the engine's front, `llm_jax.inference.service.Service` or what behaves like it.
      accepting: whether new calls are taken; `refuse_new` ends that.
    """

    def __init__(self, service) -> None:
        self.service = service
        self.accepting = True
        self._token_bytes: int | None = service.tokenizer.max_token_bytes
        self._running: set[Mailbox] = set()
        self._preparing = asyncio.Semaphore(MAX_PREPARING)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_live(self) -> bool:
        """Whether a call that came now could be served."""
        return self.accepting and bool(self.service.is_live)

    def refuse_new(self) -> None:
        """From now on new calls end with UNAVAILABLE; the running ones go on."""
        self.accepting = False
        self.service.begin_drain()

    def cut(self) -> None:
        """Ends every running call with UNAVAILABLE."""
        for mailbox in self._running:
            mailbox.close()

    async def finished(self, timeout_s: float) -> bool:
        """Waits until no call runs; False if that took longer than `timeout_s`."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    @property
    def running(self) -> int:
        """Calls that are being answered."""
        return len(self._running)

    @property
    def max_message_bytes(self) -> int:
        """Size of a request from which its prompt can't fit, or is nothing but padding."""
        if self._token_bytes is None:
            return MAX_MESSAGE_BYTES
        return max(SMALL_MESSAGE_BYTES, self.service.max_prompt_tokens * max(self._token_bytes, TOKEN_ID_BYTES))

    def parser(self, message: Any) -> Callable[[bytes], Any]:
        """A deserializer that gives what `method` answers with INVALID_ARGUMENT for bytes that are no such message."""
        parse = messages.parser(message)

        def parse_or_reject(data: bytes):
            if len(data) > self.max_message_bytes:
                return invalid(f"the request has {len(data)} bytes, more than any prompt that fits: at most "
                               f"{self.service.max_prompt_tokens} tokens")
            request = parse(data)
            return invalid("the request's bytes are not the message this method takes") if request is None else request

        return parse_or_reject

    async def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`; a long text is tokenized in another thread, one that can't fit not at all.

        Raises:
          Rejected: the text has more tokens than fit, however well they match it.
        """
        if len(text) < LONG_TEXT:
            return self.service.encode(text, add_bos=add_bos)
        if self._token_bytes is not None:
            begins = add_bos and self.service.tokenizer.adds_bos
            self._check_length(begins + -(-len(text.encode()) // self._token_bytes), "at least ")
        return await asyncio.to_thread(self.service.encode, text, add_bos=add_bos)

    def token_ids(self, sent: Sequence[int]) -> list[int]:
        """A prompt that was sent as tokens.

        Raises:
          Rejected: there are more than fit; they are not copied then.
        """
        self._check_length(len(sent))
        return list(sent)

    def _check_length(self, num_tokens: int, least: str = "") -> None:
        most = self.service.max_prompt_tokens
        if num_tokens > most:
            raise invalid(f"the prompt has {least}{num_tokens} tokens; at most {most} fit (context "
                          f"{self.service.max_context}, one for the answer)")

    def sampling(self, prompt_ids: Sequence[int], *, max_tokens: int, num_samples: int, best_of: int = 0,
                 **fields) -> SamplingParams:
        """Sampling parameters of a request over the wire, where 0 for `max_tokens` is "as many as fit".

        Other fields that are left out or None are the model's own defaults.

        Raises:
          InvalidRequest, Rejected: naming the field and the values it takes.
        """
        if max_tokens < 0:
            raise invalid(f"max_tokens={max_tokens} must be positive, or 0 for as many as fit")
        most = self.max_samples
        if not 0 <= num_samples <= most:
            raise invalid(f"num_samples={num_samples} must lie between 1 and {most}")
        if best_of and not max(num_samples, 1) <= best_of <= most:
            raise invalid(f"best_of={best_of} must lie between num_samples ({max(num_samples, 1)}) and {most}, or be 0")
        if not prompt_ids:
            raise invalid("the prompt has no tokens")
        # A prompt that leaves no room is refused by the service, which knows the limit to name.
        limit = max_tokens or max(1, self.service.max_context - len(prompt_ids))
        return self.service.defaults.params(max_tokens=limit, **fields)

    @property
    def max_samples(self) -> int:
        """Requests to the engine that one call may make."""
        return min(MAX_SAMPLES, self.service.max_requests)

    async def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        num_samples: int,
        priority: int,
        write: Callable[[dict[int, Delta], dict[int, float]], Awaitable[None]],
        *,
        best_of: int = 0,
        tenant: str = "",
        deadline_s: float | None = None,
    ) -> None:
        """Runs `num_samples` samples of one prompt, handing their news to `write` until each has finished.

        However this ends (also by cancellation: the client left or its deadline passed), nothing of the call keeps
        running in the engine.

        Args:
          prompt_ids: the prompt, beginning-of-sequence token included.
          sampling: what to do with it; `sample` is filled in here, and only the first tells of the prompt.
          num_samples: samples of the prompt; 0 means 1.
          priority: larger goes first among the requests that wait.
          write: given the merged delta of each sample with news, and the seconds to each sample's first token so far.
          best_of: samples that are drawn; with more than num_samples, `write` is given the likeliest of them at the
            end, the best as number 0.
          tenant: see `Service.submit`.
          deadline_s: seconds after which each sample ends with what it has.

        Raises:
          Rejected: with the status the call should end with.
          InvalidRequest, QueueFull, Unavailable: from the service.
        """
        wanted = num_samples or 1
        count = best_of or wanted
        params = [dataclasses.replace(sampling, sample=i, prompt_logprobs=None if i else sampling.prompt_logprobs)
                  for i in range(count)]
        held = [Gathered() for _ in range(count if count > wanted else 0)]
        arrived = time.monotonic()
        first_token: dict[int, float] = {}
        with self._call() as (mailbox, unfinished):
            listeners = [functools.partial(mailbox.push, i) for i in range(count)]
            ids = await self._submitted(functools.partial(
                self.service.submit_samples, prompt_ids, params, listeners, priority, tenant=tenant,
                deadline_s=deadline_s), apart=sampling.constraint is not None or count * len(prompt_ids) > MANY_TOKENS)
            unfinished.update(enumerate(ids))
            while unfinished:
                news = await mailbox.take()
                for sample, delta in news.items():
                    if delta.token_ids:
                        first_token.setdefault(sample, time.monotonic() - arrived)
                    if delta.finish_reason is not None:
                        del unfinished[sample]
                        self._raise_if_failed(delta, sample in first_token)
                    if held:
                        held[sample].add(delta)
                if not held:
                    await write(news, first_token)
        if held:
            found = [gathered.joined() for gathered in held]
            best = sorted(range(count), key=lambda i: -_mean_logprob(found[i]))[:wanted]
            ranked = {rank: dataclasses.replace(found[i], prompt_logprobs=() if rank else found[0].prompt_logprobs)
                      for rank, i in enumerate(best)}
            await write(ranked, {rank: first_token[i] for rank, i in enumerate(best) if i in first_token})

    async def embed(self, prompts: Sequence[Sequence[int]], pooling: str, priority: int) -> list[Delta]:
        """The embedding of each prompt, as the last delta of its request.

        Args:
          prompts: token ids.
          pooling, priority: see `Service.embed`.

        Raises:
          as `stream`.
        """
        found: dict[int, Delta] = {}
        with self._call() as (mailbox, unfinished):
            for i, prompt_ids in enumerate(prompts):
                unfinished[i] = self.service.embed(prompt_ids, pooling, functools.partial(mailbox.push, i), priority)
                await asyncio.sleep(0)  # each takes time with the prompt's length: other calls come in between
            while unfinished:
                for i, delta in (await mailbox.take()).items():
                    del unfinished[i]  # there is but one delta of each
                    self._raise_if_failed(delta, False)
                    found[i] = delta
        return [found[i] for i in range(len(prompts))]

    @contextlib.contextmanager
    def _call(self) -> Iterator[tuple[Mailbox, dict[int, int]]]:
        """A call while it runs: where its news arrive, and the ids of its requests, to be kept up by the caller."""
        if not self.accepting:
            raise Unavailable("the server is shutting down and takes no new requests")
        mailbox = Mailbox(asyncio.get_running_loop())
        unfinished: dict[int, int] = {}
        self._running.add(mailbox)
        self._idle.clear()
        try:
            yield mailbox, unfinished
        except Closed:
            raise Unavailable("the server shut down before this request was finished") from None
        finally:
            for request_id in unfinished.values():
                self.service.cancel(request_id)
            self._running.discard(mailbox)
            if not self._running:
                self._idle.set()

    async def _submitted(self, submit: Callable[[], list[int]], apart: bool) -> list[int]:
        """The ids of what `submit` queues; in another thread (`apart`) if that may take long."""
        if not apart:
            return submit()
        async with self._preparing:
            task = asyncio.ensure_future(asyncio.to_thread(submit))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:  # the client left, but a thread can't be stopped
                task.add_done_callback(self._cancel_all)
                raise

    def _cancel_all(self, submitted: asyncio.Future[list[int]]) -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            for request_id in submitted.result():
                self.service.cancel(request_id)

    def _raise_if_failed(self, delta: Delta, began: bool) -> None:
        """Rejected, if that is how the sample ended; `began`: whether it has any token."""
        if delta.finish_reason == "error":  # a failed step, or a constraint that its tokens can't follow to the end
            raise Rejected(grpc.StatusCode.INTERNAL, delta.error or "the engine failed on this request")
        if delta.finish_reason == "deadline" and not began:
            raise Rejected(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's deadline, or the longest wait that the "
                           "server allows, passed before its first token")
        if delta.finish_reason == "cancelled":
            if not self.is_live:
                raise Unavailable("the server shut down before this request was finished")
            raise Rejected(grpc.StatusCode.CANCELLED, delta.error or "the request was cancelled by the server")


def _mean_logprob(delta: Delta) -> float:
    return math.fsum(delta.logprobs) / len(delta.logprobs) if delta.logprobs else -math.inf
