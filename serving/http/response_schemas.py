"""Requests and answers of `/v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Discriminator, Field, Tag

from serving.http.chat_schemas import (
    Breakpoint,
    CacheOptions,
    CallId,
    Effort,
    FunctionName,
    TemplateFields,
    Unsupported,
)
from serving.http.response_format import TextFormat
from serving.http.schemas import INT32, Body, unsupported
from serving.http.tools import MAX_TOOLS

MAX_ITEMS = 2048
MAX_ID_CHARACTERS = 256
ItemId = Annotated[str, Field(max_length=MAX_ID_CHARACTERS)]
Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Body):
    """A piece of what was sent."""

    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: Breakpoint = None


class OutputText(Body):
    """A piece of what was answered, as answers hold it."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = Field(None, description="Not read.")
    logprobs: list[Any] | None = Field(None, description="Not read.")
    parsed: Any = Field(None, description="Not read.")


class Refusal(Body):
    """What the assistant declined with."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[InputText | OutputText | Refusal, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(max_length=MAX_ITEMS)]


class MessageItem(Body):
    """What somebody says, or has said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    id: ItemId | None = None
    status: Status | None = None
    phase: str | None = Field(None, description="Not read.")


class FunctionCallItem(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str = Field(description="A JSON object, as text.")
    id: ItemId | None = None
    status: Status | None = None
    parsed_arguments: Any = Field(None, description="Not read.")


class FunctionCallOutputItem(Body):
    """What a call has returned."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: str | Parts
    id: ItemId | None = None
    status: Status | None = None


def _kind(item: Any) -> str | None:
    """A message may leave its type out."""
    if isinstance(item, dict):
        kind = item.get("type", "message")
        return kind if isinstance(kind, str) else None
    return getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")] | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")],
    Discriminator(_kind, custom_error_type="item_type", custom_error_message="must be of the type message, "
                  "function_call or function_call_output")]


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments.")
    strict: bool | None = Field(None, description="Hold the arguments to the schema, also where the model is free to "
                                                  "call or not. Not so if absent.")


class FunctionChoice(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: FunctionName


class AllowedChoice(Body):
    """The template is shown all tools, and those that are listed may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class TextConfig(Body):
    """What the text must be."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    """How much to think, for chat templates that read it."""

    effort: Effort | None = None
    summary: Annotated[None, unsupported("what the model thinks aloud is part of its text")] = None
    generate_summary: Annotated[None, unsupported("what the model thinks aloud is part of its text")] = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponseStreamOptions(Body):
    """Of a stream alone."""

    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is added to hide lengths.")


class ResponseCacheOptions(CacheOptions):
    """The same, and what a response may ask of the cache."""

    prewarm: Literal[False] | None = None
    comparison_response_id: Annotated[None, unsupported("the cache is not compared")] = None


class ResponseRequest(TemplateFields):
    """OpenAI's request, and the engine's own fields."""

    input: Annotated[str, Field(min_length=1)] | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = Field(None, description="A system message in front; not kept for what follows.")
    max_output_tokens: int | None = Field(None, ge=1, le=INT32, description="As many as fit if absent.")
    previous_response_id: ItemId | None = Field(None, description="What was said up to there comes before the input.")
    store: bool | None = Field(None, description="false: do not keep it. Kept for a day at most, while there is room.")
    background: bool | None = Field(None, description="Answer at once, while it is in_progress; ask for it by its "
                                    "id later.")
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Annotated[
        FunctionChoice | AllowedChoice, Field(discriminator="type")] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=8)] | None = None
    truncation: Literal["disabled"] | None = Field(None, description="What does not fit is refused.")
    stream_options: ResponseStreamOptions | None = None  # type: ignore[assignment]
    prompt_cache_options: ResponseCacheOptions | None = Field(  # type: ignore[assignment]
        None, description="Accepted; changes nothing.")
    n: Annotated[None, unsupported("a response is one answer")] = None
    conversation: Annotated[None, unsupported("use previous_response_id")] = None
    prompt: Annotated[None, unsupported("no prompts are kept here: send instructions and input")] = None
    max_tool_calls: Annotated[None, unsupported("it is for tools that the server runs, and there are none")] = None
    background_options: Annotated[None, unsupported("a response in the background begins at once")] = None
    context_management: Annotated[None, unsupported("what does not fit is refused")] = None
    access_programs: Annotated[None, unsupported("there are none")] = None
    image: Unsupported = None


class InputDetails(pydantic.BaseModel):
    """More of the input's tokens."""

    cached_tokens: int


class OutputDetails(pydantic.BaseModel):
    """More of the output's tokens."""

    reasoning_tokens: int


class ResponseUsage(pydantic.BaseModel):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Fault(pydantic.BaseModel):
    """Why a response failed."""

    code: str
    message: str


class Incomplete(pydantic.BaseModel):
    """Why it ended early."""

    reason: Literal["max_output_tokens", "content_filter", "deadline"]


class Response(pydantic.BaseModel):
    """A response. The events of a stream, which have their type in `event:` and in `type`, hold it or parts of it."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: Fault | None
    incomplete_details: Incomplete | None
    output: list[dict[str, Any]]
    usage: ResponseUsage | None
    model: str
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    user: str | None


class DeletedResponse(pydantic.BaseModel):
    """It is gone."""

    id: str
    object: Literal["response"]
    deleted: bool


class ItemList(pydantic.BaseModel):
    """A response's input."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
