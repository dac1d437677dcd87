"""One request of `/v1/responses` while it is answered: whole, as events, or in the background."""

from __future__ import annotations

import asyncio
from typing import Any

from llm_jax.inference.request import Delta, Usage
from serving.access.identity import Caller
from serving.admission import Admission
from serving.calls import Calls
from serving.errors import Reason, Rejected, as_rejected, invalid
from serving.http.conversation import Conversations, asked_for, constraint_names
from serving.http.deps import ModelInfo
from serving.http.response_format import schema_of
from serving.http.response_items import Message, listed, message_of, messages_of, with_instructions
from serving.http.response_output import ResponseOutput, Told
from serving.http.response_schemas import AllowedChoice, FunctionChoice, ResponseRequest
from serving.http.response_store import Kept, ResponseStore
from serving.http.schemas import renamed
from serving.http.sse import Events
from serving.http.tools import Function
from serving.http.turn import Turn, token_logprobs

MAX_IN_BACKGROUND = 256  # responses that are made at a time while nobody waits for them


class ResponseAnswer:
    """One request.

    Args:
      calls: the pipeline.
      info: the served model.
      conversations: what it makes of conversations.
      store: keeps what may be asked for again.
      body: the request.
    """

    def __init__(self, calls: Calls, info: ModelInfo, conversations: Conversations, store: ResponseStore,
                 body: ResponseRequest) -> None:
        self._calls = calls
        self._info = info
        self._conversations = conversations
        self._store = store
        self._body = body
        self._tenant = ""
        self._messages: list[Message] = []
        self._admission: Admission | None = None
        self._output: ResponseOutput | None = None
        self._turn: Turn | None = None

    async def whole(self, admission: Admission) -> dict[str, Any]:
        """The response, when it has ended."""
        with renamed(self._names()):
            arguments = await self._arguments(admission)
            delta, = await self._calls.collect(**arguments, admission=admission)
        self._told(delta)
        self._finish()
        return self._made.body

    async def stream(self, admission: Admission, events: Events) -> None:
        """Its events, as they come."""

        async def send(told: Told) -> None:
            for event in told:
                await events.send(event, event["type"])

        begun = False

        async def write(news: dict[int, Delta], _first_token: dict[int, float]) -> None:
            nonlocal begun
            if not begun:  # not before: a request that is refused has a status of its own
                begun = True
                await send(self._made.begin())
            await send(self._told(news[0]))

        with renamed(self._names()):
            await self._calls.stream(**await self._arguments(admission), write=write, admission=admission)
        await send(self._finish())

    def failure(self, error: Rejected) -> tuple[Any, str]:
        """The last event of a stream that failed on the way."""
        event = self._made.fail(error, self._usage)[-1]
        self._keep()
        return event, event["type"]

    async def in_background(self, who: Caller, running: set[asyncio.Task[None]]) -> dict[str, Any]:
        """The response as it is when the engine has it; it goes on by itself, in `running`.

        Raises:
          Rejected: it is refused.
        """
        begun: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        async def write(news: dict[int, Delta], _first_token: dict[int, float]) -> None:
            self._told(news[0])

        async def run() -> None:
            try:
                async with self._calls.admitted(who, "generate") as admission:
                    with renamed(self._names()):
                        arguments = await self._arguments(admission)
                        if len(running) > MAX_IN_BACKGROUND:
                            raise Rejected(Reason.QUEUE_FULL, f"{MAX_IN_BACKGROUND} responses are made in the "
                                           "background already; try again later", retry_after_s=1)
                        self._keep(asyncio.current_task())
                        begun.set_result(self._made.snapshot())
                        await self._calls.stream(**arguments, write=write, admission=admission)
                    self._finish()
            except asyncio.CancelledError:
                if begun.cancel() or begun.cancelled():
                    return
                if self._output is not None:
                    self._made.cancel(self._usage)
                    self._keep_again()
            except Exception as error:
                if not begun.done():
                    begun.set_exception(error)
                else:
                    self._made.fail(as_rejected(error), self._usage)
                    self._keep_again()

        task = asyncio.create_task(run())
        running.add(task)
        task.add_done_callback(running.discard)
        return await asyncio.shield(begun)

    @property
    def _made(self) -> ResponseOutput:
        assert self._output is not None
        return self._output

    @property
    def _usage(self) -> Usage:
        return self._admission.usage if self._admission else Usage(0, 0)

    def _told(self, delta: Delta) -> Told:
        assert self._turn is not None
        logprobs = token_logprobs(self._calls.front.tokenizer, delta) if self._wants_logprobs else []
        for one in logprobs:  # a list in any case, here
            one["bytes"] = one["bytes"] or []
        return self._made.push(self._turn.push(delta), logprobs)

    def _finish(self) -> Told:
        assert self._turn is not None
        told = self._made.finish(self._turn.finish_reason, self._usage)
        if self._body.background:
            self._keep_again()
        else:
            self._keep()
        return told

    def _keep(self, task: asyncio.Task[Any] | None = None) -> None:
        """Keeps the response, if it may be; `task` is what makes it, if it has not ended."""
        if self._body.store is False:
            return
        made, messages = self._made, self._messages
        if task is None:
            messages = [*messages, message_of(made.body["output"], self._conversations)]
        self._store.put(self._tenant, Kept(made.snapshot(), listed(self._body.input), messages, task,
                                           None if task is None else made.snapshot))

    def _keep_again(self) -> None:
        """Keeps what has become of a response, unless it was deleted meanwhile."""
        try:
            self._store.get(self._tenant, self._made.body["id"])
        except Rejected:
            return
        self._keep()

    async def _arguments(self, admission: Admission) -> dict[str, Any]:
        """Of `Calls.stream` and `Calls.collect`; from here on there is an output."""
        body, conversations = self._body, self._conversations
        self._admission, self._tenant = admission, admission.tenant
        self._info.check(body.model)
        body.check_stream()
        if body.background and (body.stream or body.store is False):
            name = "stream" if body.stream else "store"
            raise invalid(f"{name} must be left out with background: the response is asked for by its id", name)
        conversations.check_template("input")
        earlier: list[Message] = []
        if body.previous_response_id is not None:
            previous = self._store.get(self._tenant, body.previous_response_id, "previous_response_id")
            if previous.task is not None:
                raise invalid("previous_response_id must be that of a response that has ended", "previous_response_id")
            earlier = previous.messages
        self._messages = [*earlier, *messages_of(body.input, earlier, conversations)]
        functions = [Function(one.name, one.description, one.parameters, bool(one.strict)) for one in body.tools or ()]
        toolbox = conversations.toolbox(functions, *_choice(body), body.parallel_tool_calls is not False)
        constraint = asked_for(body, toolbox, schema_of(body.text and body.text.format), "text.format")
        variables = conversations.variables(body.chat_template_kwargs, body.reasoning and body.reasoning.effort,
                                            "reasoning.effort")
        ids = await conversations.encode(with_instructions(body.instructions, self._messages), toolbox, variables,
                                         "input")
        sampling = body.sampling(self._calls, ids, max_tokens=body.max_output_tokens or 0, constraint=constraint,
                                 logprobs=body.top_logprobs or 0)
        self._turn = Turn(self._calls.front.tokenizer, toolbox)
        self._output = ResponseOutput(self._head() | {"temperature": sampling.temperature, "top_p": sampling.top_p},
                                      conversations.make_call_id)
        return {"prompt_ids": ids, "sampling": sampling, "num_samples": 1, "priority": body.priority or 0,
                "deadline_s": body.deadline_seconds}

    def _head(self) -> dict[str, Any]:
        """What the response says of its request."""
        body = self._body
        text = {"format": {"type": "text"}} | (body.text.model_dump(by_alias=True, exclude_none=True)
                                               if body.text else {})
        choice = body.tool_choice or "auto"
        return {"model": self._info.name, "background": bool(body.background), "instructions": body.instructions,
                "max_output_tokens": body.max_output_tokens, "metadata": body.metadata or {},
                "parallel_tool_calls": body.parallel_tool_calls is not False,
                "previous_response_id": body.previous_response_id,
                "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
                "service_tier": "default", "store": body.store is not False, "text": text,
                "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
                "tools": [one.model_dump() | {"strict": bool(one.strict)} for one in body.tools or ()],
                "top_logprobs": body.top_logprobs or 0, "truncation": "disabled", "user": body.user}

    @property
    def _wants_logprobs(self) -> bool:
        return bool(self._body.include or self._body.top_logprobs)

    def _names(self) -> dict[str, str]:
        body = self._body
        return {"prompt": "input", "max_tokens": "max_output_tokens", "logprobs": "top_logprobs"} | constraint_names(
            body, "text.format", body.text and body.text.format)


def _choice(body: ResponseRequest) -> tuple[str, list[str] | None]:
    """"none", "auto", "required" or a function's name; and the names of those that may be called, None for all."""
    match body.tool_choice:
        case FunctionChoice():
            return body.tool_choice.name, None
        case AllowedChoice():
            return body.tool_choice.mode, [one.name for one in body.tool_choice.tools]
        case _:
            return body.tool_choice or "auto", None
