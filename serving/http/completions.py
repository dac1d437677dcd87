"""`/v1/completions`: texts that go on where prompts end, in one piece or as a stream."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Any, Literal

import pydantic
from fastapi import APIRouter, Request, Response
from pydantic import Field

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.inference.request import MAX_LOGPROBS, Delta, PromptLogprob
from serving.admission import Admission
from serving.asking import MAX_SAMPLES
from serving.calls import Calls
from serving.errors import invalid
from serving.http import prompts
from serving.http.answering import answered
from serving.http.deps import ModelInfo, caller, make_router
from serving.http.logprobs import CompletionLogprobs
from serving.http.prompts import MAX_PROMPTS, Prompt, Prompts, together
from serving.http.schemas import INT32, CompletionUsage, SamplingFields, renamed, unsupported, usage_body
from serving.http.sse import Events, described
from serving.mailbox import Gathered

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions
MANY_TOKENS = 1000  # to spell them takes some ms, in which no other request goes on


class CompletionRequest(SamplingFields):
    """OpenAI's request, and the engine's own fields."""

    prompt: Prompts = Field(description="A text, which gets the beginning-of-sequence token in front if the model "
                            "expects one, or token ids, used exactly as sent; or a list of either.")
    max_tokens: int | None = Field(None, ge=0, le=INT32, description="Tokens of each completion, at most; 16 if "
                                   "absent. 0, with echo, only tells of the prompt.")
    best_of: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="So many are drawn, and the n likeliest sent.")
    echo: bool | None = Field(None, description="Begin each completion with its prompt.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Log-probabilities of each token, and of so "
                                 "many of the likeliest beside it; with echo the prompt's too.")
    suffix: Annotated[None, unsupported("the model writes on, it does not fill in")] = None
    add_special_tokens: bool | None = Field(None, description="false: no beginning-of-sequence token before a text.")

    def check(self, num_prompts: int) -> None:
        """What no single field can tell.

        Raises:
          Rejected: naming the field.
        """
        self.check_stream()
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens must be at least 1; 0 is for echo, which tells of the prompt alone", "max_tokens")
        if (self.best_of or self.num_samples) < self.num_samples:
            raise invalid(f"best_of must be at least n ({self.num_samples}), not {self.best_of}", "best_of")
        count = num_prompts * (self.best_of or self.num_samples)
        if count > MAX_PROMPTS:
            raise invalid(f"{count} completions are asked for; one request may ask for {MAX_PROMPTS}, of all its "
                          "prompts together", "prompt")


class Logprobs(pydantic.BaseModel):
    """Parallel lists, an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(pydantic.BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "content_filter", "deadline"] | None


class Completion(pydantic.BaseModel):
    """The answer; an event of a stream is the same, with what is new."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


STREAM = described("With stream: an event for each piece, then `data: [DONE]`. A request that fails on the way ends "
                   "with an event that holds the error, and no [DONE].")


def router(calls: Calls, info: ModelInfo) -> APIRouter:
    """The one path."""
    routes = make_router(calls, "generate", prefix="/v1", tags=["completions"])

    @routes.post("/completions", response_model=Completion, responses=STREAM)
    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        """Goes on with a text, or with each of several."""
        return await answered(calls, request, caller(request), _Answer(calls, info, body), body.stream)

    return routes


class _Answer:
    """One request while it is answered."""

    def __init__(self, calls: Calls, info: ModelInfo, body: CompletionRequest) -> None:
        self._calls = calls
        self._info = info
        self._body = body
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
                      "model": info.name}

    async def whole(self, admission: Admission) -> dict[str, Any]:
        """All completions, when the last has ended."""
        found: dict[int, dict[str, Any]] = {}

        async def one(choices: _Choices, arguments: dict[str, Any]) -> None:
            deltas = await self._calls.collect(**arguments, admission=admission)
            found.update((choice["index"], choice) for choice in await choices.told(dict(enumerate(deltas))))

        await self._each_prompt(admission, one)
        return self._head | {"choices": [found[i] for i in sorted(found)], "usage": self._usage(admission)}

    async def stream(self, admission: Admission, events: Events) -> None:
        """Each piece as it comes."""
        usage = {"usage": None} if self._body.wants_usage else {}

        async def one(choices: _Choices, arguments: dict[str, Any]) -> None:
            async def write(news: dict[int, Delta], _first_token: dict[int, float]) -> None:
                for choice in await choices.told(news):
                    await events.send(self._head | {"choices": [choice]} | usage)

            await self._calls.stream(**arguments, write=write, admission=admission)

        await self._each_prompt(admission, one)
        if self._body.wants_usage:
            await events.send(self._head | {"choices": [], "usage": self._usage(admission)})

    async def _each_prompt(self, admission: Admission,
                           one: Callable[[_Choices, dict[str, Any]], Awaitable[None]]) -> None:
        """Runs `one` for every prompt, so many at a time that the engine's queue has room for them."""
        body, calls = self._body, self._calls
        self._info.check(body.model)
        sent = prompts.listed(body.prompt)
        body.check(len(sent))
        # All are read before any begins: a request is refused as a whole.
        read = await prompts.read(calls, sent, "prompt", body.add_special_tokens is not False)
        drawn = max(body.best_of or 0, body.num_samples)
        with renamed():
            asked = [self._arguments(prompt) for prompt in read]
            admission.reserve_all(sum(calls.most_tokens(prompt.ids, drawn, arguments["sampling"].max_tokens)
                                      for prompt, arguments in zip(read, asked, strict=True)))
            await together([functools.partial(
                one, _Choices(i * body.num_samples, prompt, body, calls.front.tokenizer), arguments)
                for i, (prompt, arguments) in enumerate(zip(read, asked, strict=True))],
                max(1, calls.max_samples // drawn))

    def _arguments(self, prompt: Prompt) -> dict[str, Any]:
        """Of `Calls.stream` and `Calls.collect`."""
        body = self._body
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
        sampling = body.sampling(self._calls, prompt.ids, max_tokens=max_tokens, best_of=body.best_of or 0,
                                 logprobs=body.logprobs or 0, prompt_logprobs=body.logprobs if body.echo else None)
        return {"prompt_ids": prompt.ids, "sampling": sampling, "num_samples": body.num_samples,
                "priority": body.priority or 0, "best_of": body.best_of or 0, "deadline_s": body.deadline_seconds}

    def _usage(self, admission: Admission) -> dict[str, Any]:
        usage = usage_body(admission.usage)
        if self._body.max_tokens == 0:  # the one token that the engine draws in any case was not asked for
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage


class _Choices:
    """The completions of one prompt, as far as they have been told."""

    def __init__(self, first_index: int, prompt: Prompt, body: CompletionRequest, tokenizer: Tokenizer) -> None:
        self._first_index = first_index
        self._prompt = prompt
        self._silent = body.max_tokens == 0
        self._echo = ""
        if body.echo:
            self._echo = tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text
        self._logprobs = None if body.logprobs is None else [CompletionLogprobs(tokenizer, self._echo)
                                                             for _ in range(body.num_samples)]
        # The engine tells of the prompt with the first sample alone; the others wait for that.
        self._prompt_logprobs: tuple[PromptLogprob, ...] | None = None if self._echo and self._logprobs else ()
        self._held: dict[int, Gathered] = {}
        self._begun: set[int] = set()

    async def told(self, news: dict[int, Delta]) -> list[dict[str, Any]]:
        """The news as choices; none for a sample without any that can be seen."""
        if self._prompt_logprobs is None and len(self._prompt.ids) > MANY_TOKENS:
            return await asyncio.to_thread(lambda: list(self._told(news)))
        return list(self._told(news))

    def _told(self, news: dict[int, Delta]) -> Iterator[dict[str, Any]]:
        if self._prompt_logprobs is None:
            for sample, delta in news.items():
                self._held.setdefault(sample, Gathered()).add(delta)
            if 0 not in news:
                return
            self._prompt_logprobs = news[0].prompt_logprobs
            news = {sample: held.joined() for sample, held in self._held.items()}
            self._held.clear()
        for sample, delta in news.items():
            if self._silent:
                delta = Delta(finish_reason=delta.finish_reason and "length")
            text, logprobs = delta.text, None
            if self._logprobs is not None:
                logprobs = self._logprobs[sample].of(delta)
            if sample not in self._begun:
                self._begun.add(sample)
                text = self._echo + text
                if self._logprobs is not None and self._echo:
                    logprobs = self._logprobs[sample].before(self._prompt.ids, self._prompt_logprobs, logprobs)
            if text or delta.finish_reason or (logprobs and logprobs["tokens"]):
                yield {"index": self._first_index + sample, "text": text, "logprobs": logprobs,
                       "finish_reason": delta.finish_reason}
