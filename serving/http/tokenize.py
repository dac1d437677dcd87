"""`/tokenize` and `/detokenize`: what the model sees of a text, and the way back."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Request, Response
from pydantic import Field

from serving.calls import Calls
from serving.errors import invalid
from serving.http.chat_schemas import MAX_MESSAGES, MAX_TOOLS, Message, Tool
from serving.http.conversation import Conversations
from serving.http.deps import ModelInfo, caller, make_router
from serving.http.errors import json_response
from serving.http.logprobs import spelled
from serving.http.schemas import Body, TokenId
from serving.http.tools import Function


class TokenizeRequest(Body):
    """A text or a conversation."""

    model: str | None = Field(None, description="The served model's name; absent is the served model.")
    prompt: str | None = Field(None, description="A text.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = Field(
        None, description="A conversation, instead.")
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call; for messages.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=32, description="More for the chat template.")
    add_special_tokens: bool | None = Field(None, description="false: no beginning-of-sequence token before a prompt.")
    add_generation_prompt: bool | None = Field(None, description="false: a conversation does not end where the next "
                                               "answer begins.")
    return_token_strs: bool | None = Field(None, description="Spell each token, too.")


class Tokens(pydantic.BaseModel):
    """The tokens, as many as there are, whether they fit or not."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = Field(None, description="The served model's name; absent is the served model.")
    tokens: list[TokenId]


class Text(pydantic.BaseModel):
    """The tokens' text; special tokens have none, and what is no UTF-8 is U+FFFD."""

    prompt: str


def router(calls: Calls, info: ModelInfo) -> APIRouter:
    """Both paths."""
    routes = make_router(calls, "read", tags=["tokens"])
    conversations = Conversations(calls, info.tool_format)

    @routes.post("/tokenize", response_model=Tokens)
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        """The tokens of a text, or of a conversation as the model's chat template writes it."""
        async with calls.admitted(caller(request), "read"):
            info.check(body.model)
            tokenizer = calls.front.tokenizer
            if (body.prompt is None) == (body.messages is None):
                raise invalid("give either prompt or messages", "prompt")
            if body.messages is not None:
                ids = await _conversation(conversations, body, body.messages)
            else:  # in a thread, whatever its length: this must not delay what is being generated
                begins = body.add_special_tokens is not False
                ids = await asyncio.to_thread(calls.front.encode, body.prompt or "", begins)
            texts = [spelled(tokenizer, i) for i in ids] if body.return_token_strs else None
            return json_response({"count": len(ids), "max_model_len": info.max_context, "tokens": ids,
                                  "token_strs": texts})

    @routes.post("/detokenize", response_model=Text)
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        async with calls.admitted(caller(request), "read"):
            info.check(body.model)
            tokenizer = calls.front.tokenizer
            if (most := max(body.tokens, default=0)) >= tokenizer.vocab_size:
                raise invalid(f"tokens must be ids of the vocabulary, 0 to {tokenizer.vocab_size - 1}, not {most}",
                              "tokens")
            return json_response({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)})

    return routes


async def _conversation(conversations: Conversations, body: TokenizeRequest, messages: list[Message]) -> list[int]:
    """What `/v1/chat/completions` would make of it."""
    conversations.check_template("messages")
    functions = [Function(one.function.name, one.function.description, one.function.parameters)
                 for one in body.tools or ()]
    toolbox = conversations.toolbox(functions, "auto", None, True)
    more = conversations.variables(body.chat_template_kwargs)
    if body.add_generation_prompt is False:
        more["add_generation_prompt"] = False
    return await conversations.encode(conversations.for_template(messages), toolbox, more, "messages",
                                      must_fit=False)
