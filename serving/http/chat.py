"""`/v1/chat/completions`: the assistant's next turn, in one piece or as a stream, with calls of tools."""

from __future__ import annotations

import secrets
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from llm_jax.inference.request import Delta
from serving.admission import Admission
from serving.calls import Calls
from serving.errors import invalid
from serving.http.answering import answered
from serving.http.chat_schemas import (
    AllowedToolsChoice,
    ChatCompletion,
    ChatRequest,
    NamedTool,
    ToolChoice,
)
from serving.http.completions import STREAM
from serving.http.conversation import Conversations, asked_for, constraint_names
from serving.http.deps import ModelInfo, caller, make_router
from serving.http.response_format import schema_of
from serving.http.schemas import renamed, usage_body
from serving.http.sse import Events
from serving.http.tool_parsing import Arguments, Call, Content
from serving.http.tools import Function, Toolbox
from serving.http.turn import Turn, token_logprobs


def router(calls: Calls, info: ModelInfo) -> APIRouter:
    """The one path."""
    routes = make_router(calls, "generate", prefix="/v1", tags=["chat"])
    conversations = Conversations(calls, info.tool_format)

    @routes.post("/chat/completions", response_model=ChatCompletion, responses=STREAM)
    async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
        """Says what comes next in a conversation."""
        answer = _Answer(calls, info, conversations, body)
        return await answered(calls, request, caller(request), answer, body.stream)

    return routes


class _Answer:
    """One request while it is answered."""

    def __init__(self, calls: Calls, info: ModelInfo, conversations: Conversations, body: ChatRequest) -> None:
        self._calls = calls
        self._info = info
        self._conversations = conversations
        self._body = body
        self._toolbox: Toolbox | None = None
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    async def whole(self, admission: Admission) -> dict[str, Any]:
        """All answers, when the last has ended."""
        with renamed(self._names()):
            deltas = await self._calls.collect(**await self._arguments(), admission=admission)
        choices = [self._choice(i, delta) for i, delta in enumerate(deltas)]
        return self._head("chat.completion") | {"choices": choices, "usage": usage_body(admission.usage)}

    async def stream(self, admission: Admission, events: Events) -> None:
        """Each piece as it comes."""
        wants_usage = self._body.wants_usage
        head = self._head("chat.completion.chunk")
        usage = {"usage": None} if wants_usage else {}
        with renamed(self._names()):
            arguments = await self._arguments()
            pieces = [_Pieces(i, Turn(self._tokenizer, self._toolbox), self) for i in range(self._body.num_samples)]

            async def write(news: dict[int, Delta], _first_token: dict[int, float]) -> None:
                for sample, delta in news.items():
                    for choice in pieces[sample].told(delta):
                        await events.send(head | {"choices": [choice]} | usage)

            await self._calls.stream(**arguments, write=write, admission=admission)
        if wants_usage:
            await events.send(head | {"choices": [], "usage": usage_body(admission.usage)})

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """Of the delta's tokens, if they were asked for."""
        if not self._body.logprobs:
            return None
        return {"content": token_logprobs(self._tokenizer, delta), "refusal": None}

    def make_call_id(self) -> str:
        """An id for a new call."""
        return self._conversations.make_call_id()

    @property
    def _tokenizer(self) -> Any:
        return self._calls.front.tokenizer

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._info.name}

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        turn = Turn(self._tokenizer, self._toolbox)
        content: list[str] = []
        found: list[dict[str, Any]] = []
        for event in turn.push(delta):
            match event:
                case Content(text):
                    content.append(text)
                case Call(_, name):
                    found.append({"id": self.make_call_id(), "type": "function",
                                  "function": {"name": name, "arguments": ""}})
                case Arguments(number, text):
                    found[number]["function"]["arguments"] += text
        message = {"role": "assistant", "content": "".join(content) if content or not found else None, "refusal": None}
        if found:
            message["tool_calls"] = found
        return {"index": index, "message": message, "logprobs": self.logprobs(delta),
                "finish_reason": turn.finish_reason}

    async def _arguments(self) -> dict[str, Any]:
        """Of `Calls.stream` and `Calls.collect`."""
        body = self._body
        self._info.check(body.model)
        body.check_stream()
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs is for logprobs: set logprobs to true, or leave it out", "top_logprobs")
        limits = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise invalid("max_tokens is the older name of max_completion_tokens: give one of them", "max_tokens")
        conversations = self._conversations
        conversations.check_template("messages")
        functions = [Function(one.function.name, one.function.description, one.function.parameters,
                              bool(one.function.strict)) for one in body.tools or ()]
        self._toolbox = conversations.toolbox(functions, *_choice(body.tool_choice),
                                              body.parallel_tool_calls is not False)
        constraint = asked_for(body, self._toolbox, schema_of(body.response_format), "response_format")
        variables = conversations.variables(body.chat_template_kwargs, body.reasoning_effort, "reasoning_effort")
        messages = conversations.for_template(body.messages)
        ids = await conversations.encode(messages, self._toolbox, variables, "messages")
        sampling = body.sampling(self._calls, ids, max_tokens=min(limits, default=0), constraint=constraint,
                                 logprobs=body.top_logprobs or 0)
        return {"prompt_ids": ids, "sampling": sampling, "num_samples": body.num_samples,
                "priority": body.priority or 0, "deadline_s": body.deadline_seconds}

    def _names(self) -> dict[str, str]:
        body = self._body
        return {"prompt": "messages", "max_tokens": "max_tokens" if body.max_tokens else "max_completion_tokens",
                "logprobs": "top_logprobs"} | constraint_names(body, "response_format", body.response_format)


class _Pieces:
    """One answer as the chunks of a stream."""

    def __init__(self, index: int, turn: Turn, answer: _Answer) -> None:
        self._index = index
        self._turn = turn
        self._answer = answer
        self._began = False
        self._logprobs: list[dict[str, Any]] = []  # of tokens that nothing was told of yet

    def told(self, delta: Delta) -> list[dict[str, Any]]:
        """The choices that tell of the delta; none if nothing of it is certain."""
        told: list[dict[str, Any]] = []
        if not self._began:
            self._began = True
            told.append({"role": "assistant", "content": None if self._turn.may_call else "", "refusal": None})
        for event in self._turn.push(delta):
            match event:
                case Content(text):
                    told.append({"content": text})
                case Call(number, name):
                    told.append({"tool_calls": [{"index": number, "id": self._answer.make_call_id(), "type": "function",
                                                 "function": {"name": name, "arguments": ""}}]})
                case Arguments(number, text):
                    told.append({"tool_calls": [{"index": number, "function": {"arguments": text}}]})
        reason = self._turn.finish_reason
        if reason is not None:
            told.append({})
        logprobs = self._answer.logprobs(delta)
        choices = [{"index": self._index, "delta": one, "logprobs": None, "finish_reason": None} for one in told]
        if logprobs is not None:
            self._logprobs += logprobs["content"]
            if choices and self._logprobs:
                # With what the tokens have made certain: the first piece after the role.
                choices[min(len(choices) - 1, "role" in told[0])]["logprobs"] = logprobs | {"content": self._logprobs}
                self._logprobs = []
        if reason is not None:
            choices[-1]["finish_reason"] = reason
        return choices


def _choice(choice: ToolChoice | None) -> tuple[str, list[str] | None]:
    """"none", "auto", "required" or a function's name; and the names of those that may be called, None for all."""
    match choice:
        case NamedTool():
            return choice.function.name, None
        case AllowedToolsChoice():
            return choice.allowed_tools.mode, [one.function.name for one in choice.allowed_tools.tools]
        case _:
            return choice or "auto", None
