"""`/tokenize` and `/detokenize`: what the model sees of a text, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Request, Response
from pydantic import Field

from serving.admission import Admission
from serving.asking import LONG_TEXT
from serving.calls import Calls
from serving.errors import invalid
from serving.http.chat_schemas import MAX_MESSAGES, MAX_TOOLS, Message, Tool
from serving.http.conversation import Conversations
from serving.http.deps import ModelInfo, caller, make_router
from serving.http.errors import json_response, missing
from serving.http.logprobs import spelled
from serving.http.long_work import LongWork
from serving.http.schemas import Body, TokenId
from serving.http.tools import Function

SHORT = LONG_TEXT // 4  # bytes of a request, for which a millisecond is enough
MAX_CHARACTERS = 1 << 18  # of one request, and tokens to be spelled; with a large context more:
CHARACTERS_PER_TOKEN = 16


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


def router(calls: Calls, info: ModelInfo, work: LongWork) -> APIRouter:
    """Both paths; `work` is where what takes long is done."""
    routes = make_router(calls, "read", tags=["tokens"])
    conversations = Conversations(calls, info.tool_format)
    most = max(MAX_CHARACTERS, CHARACTERS_PER_TOKEN * info.max_context)

    async def done(request: Request, admission: Admission, what: Callable[[], Response]) -> Response:
        """Short work at once, long work where it delays nobody's tokens."""
        return what() if len(await request.body()) <= SHORT else await work.run(admission, what)

    @routes.post("/tokenize", response_model=Tokens)
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        """The tokens of a text, or of a conversation as the model's chat template writes it."""
        async with calls.admitted(caller(request), "read") as admission:
            info.check(body.model)
            if body.prompt is None and body.messages is None:
                raise missing("prompt", ": give either prompt or messages")
            if body.prompt is not None and body.messages is not None:
                raise invalid("give either prompt or messages", "prompt")
            tokenizer = calls.front.tokenizer

            def check(field: str, text: str) -> str:
                if len(text) > most:
                    raise invalid(f"{field} must have at most {most} characters, not {len(text)}: more are not "
                                  "tokenized at a time", field)
                return text

            def answer() -> Response:
                if body.messages is not None:
                    text = _rendered(conversations, body, body.messages)
                    ids = tokenizer.encode(check("messages", text), special=True)
                else:
                    ids = calls.front.encode(check("prompt", body.prompt or ""), body.add_special_tokens is not False)
                texts = [spelled(tokenizer, i) for i in ids] if body.return_token_strs else None
                return json_response({"count": len(ids), "max_model_len": info.max_context, "tokens": ids,
                                      "token_strs": texts})

            return await done(request, admission, answer)

    @routes.post("/detokenize", response_model=Text)
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        async with calls.admitted(caller(request), "read") as admission:
            info.check(body.model)
            tokenizer = calls.front.tokenizer
            if len(body.tokens) > most:
                raise invalid(f"tokens must be at most {most} ids, not {len(body.tokens)}", "tokens")
            if (highest := max(body.tokens, default=0)) >= tokenizer.vocab_size:
                raise invalid(f"tokens must be ids of the vocabulary, 0 to {tokenizer.vocab_size - 1}, not {highest}",
                              "tokens")
            return await done(request, admission, lambda: json_response({"prompt": tokenizer.decode(body.tokens)}))

    return routes


def _rendered(conversations: Conversations, body: TokenizeRequest, messages: list[Message]) -> str:
    """What `/v1/chat/completions` would make of it."""
    conversations.check_template("messages")
    functions = [Function(one.function.name, one.function.description, one.function.parameters)
                 for one in body.tools or ()]
    toolbox = conversations.toolbox(functions, "auto", None, True)
    more = conversations.variables(body.chat_template_kwargs)
    if body.add_generation_prompt is False:
        more["add_generation_prompt"] = False
    return conversations.render(conversations.for_template(messages), toolbox, more, "messages")
