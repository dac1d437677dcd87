"""Requests and answers of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from llm_jax.inference.request import MAX_LOGPROBS
from serving.http.response_format import ResponseFormat
from serving.http.schemas import INT32, Body, CompletionUsage, SamplingFields, unsupported
from serving.http.tools import MAX_TOOLS

MAX_MESSAGES = 2048
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=256)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Unsupported = Annotated[None, unsupported("the model reads and writes text")]
Breakpoint = Annotated[dict[str, Any] | None, Field(
    description="Accepted; the prefix cache finds what is the same by itself.")]


class TextPart(Body):
    """A piece of text."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Breakpoint = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError("part_type", "must be of the type text, not {kind}: the model reads nothing else",
                                      {"kind": kind[:80]})
        return value


class RefusalPart(Body):
    """What the assistant declined with."""

    type: Literal["refusal"]
    refusal: str


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class SystemMessage(Body):
    """Instructions, from whoever runs the conversation."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    """What the person says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Body):
    """The function of a call."""

    name: FunctionName
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Body):
    """A call that the model made."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Body):
    """What the model has said."""

    role: Literal["assistant"]
    content: str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]] | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Annotated[None, unsupported("calls are in tool_calls")] = None
    audio: Unsupported = None
    annotations: list[Any] | None = Field(None, description="As answers hold it; not read.")


class ToolMessage(Body):
    """What a call has returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: CallId
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments.")
    strict: bool | None = Field(None, description="Hold the arguments to the schema, also where the model is free to "
                                                  "call or not.")


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionReference(Body):
    """A function by its name."""

    name: FunctionName


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionReference


class AllowedTools(Body):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolsChoice(Body):
    """The template is shown all tools, and those that are listed may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (Literal["none", "auto", "required"]
              | Annotated[NamedTool | AllowedToolsChoice, Field(discriminator="type")])


class CacheOptions(Body):
    """For caches that have to be told what to keep."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: str | None = None


class TemplateFields(SamplingFields):
    """What requests for a turn of a conversation have in common."""

    parallel_tool_calls: bool | None = Field(None, description="false: one call at most.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="So many of the likeliest beside each "
                                     "token.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=32, description="More for the chat template: "
                                                        "{\"enable_thinking\": false} and the like.")
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one.")
    prompt_cache_key: str | None = Field(None, description="Accepted; the prefix cache finds what is the same.")
    prompt_cache_options: CacheOptions | None = Field(None, description="Accepted; changes nothing.")
    prompt_cache_retention: Literal["in_memory", "24h"] | None = Field(None, description="Accepted; what is cached is "
                                                                       "in memory.")
    moderation: Annotated[None, unsupported("there is no model for it; content filters are the operator's")] = None
    safety_identifier: str | None = Field(None, description="Accepted; changes nothing.")


class ChatRequest(TemplateFields):
    """OpenAI's request, and the engine's own fields."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32, description="As many as fit if absent.")
    max_tokens: int | None = Field(None, ge=1, le=INT32, description="The older name of max_completion_tokens.")
    logprobs: bool | None = Field(None, description="Log-probabilities of each token of the answer.")
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = Field(None, description="For chat templates that read it; refused by others.")
    verbosity: Literal["medium"] | None = Field(None, description="The model knows no other.")
    store: Literal[False] | None = Field(None, description="Nothing is kept; `/v1/responses` can.")
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=2)] | None = None
    functions: Annotated[None, unsupported("it is the older form of tools: send those")] = None
    function_call: Annotated[None, unsupported("it is the older form of tool_choice: send that")] = None
    audio: Unsupported = None
    prediction: Annotated[None, unsupported("what may be proposed is looked up in the request's own text")] = None
    web_search_options: Annotated[None, unsupported("nothing is searched for")] = None


class FunctionCall(pydantic.BaseModel):
    """A function's name and arguments, as the model wrote them."""

    name: str | None = None
    arguments: str


class AnswerCall(pydantic.BaseModel):
    """A call; of those in a stream, the first piece has id and name, and each has its index."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ChatLogprob(pydantic.BaseModel):
    """One of the likeliest tokens of a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ChatLogprob):
    """A token of the answer."""

    top_logprobs: list[ChatLogprob]


class ChatLogprobs(pydantic.BaseModel):
    """Every token of an answer, or of a piece of it."""

    content: list[ChatTokenLogprob] | None
    refusal: None = None


class AnswerMessage(pydantic.BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[AnswerCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "deadline"]


class ChatChoice(pydantic.BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(pydantic.BaseModel):
    """The answer; a stream has events of the type `chat.completion.chunk`, with a `delta` for the message."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
