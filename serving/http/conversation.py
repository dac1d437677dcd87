"""From messages and tools to the tokens that the model goes on from, by its own chat template."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.data.tokenizers import chat as templates
from llm_jax.errors import UserError
from llm_jax.inference.request import Constraint
from serving.asking import LONG_TEXT
from serving.calls import Calls
from serving.errors import invalid
from serving.http.chat_schemas import (
    AssistantMessage,
    Message,
    SystemMessage,
    TemplateFields,
    TextPart,
    ToolMessage,
)
from serving.http.errors import too_long
from serving.http.tool_formats import FORMATS
from serving.http.tools import Function, Toolbox, ToolSyntax, json_constraint

SHORT = 16  # messages
# What templates are given in any case, and what Python's call of them means by itself.
_RESERVED = frozenset(("messages", "tools", "add_generation_prompt", "template", "self"))


class Conversations:
    """What the served model makes of conversations.

    Args:
      calls: the pipeline.
      tool_format: how the model writes calls, one of `tool_formats.FORMATS`; None asks its chat template.

    Raises:
      UserError: there is no such format.
    """

    def __init__(self, calls: Calls, tool_format: str | None = None) -> None:
        self._calls = calls
        tokenizer = calls.front.tokenizer
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self._token_bytes = _most_bytes(tokenizer) if self._has_template else None
        self._source = "\n".join(templates.templates(tokenizer.files).values()) if self._has_template else ""
        self._syntax = ToolSyntax.of(tokenizer, tool_format)

    def check_template(self, field: str) -> None:
        """Refuses conversations with a model that was not made for them; `field` is where the request has one.

        Raises:
          Rejected: saying what can be done instead.
        """
        if not self._has_template:
            raise invalid("the served model has no chat template, so it can't be talked with: ask /v1/completions to "
                          "go on with a text, or put a chat_template.jinja beside the model's tokenizer", field)

    def reads(self, variable: str) -> bool:
        """Whether the template looks at `variable`."""
        return variable in self._source

    def toolbox(self, functions: Sequence[Function], choice: str, allowed: Sequence[str] | None,
                parallel: bool) -> Toolbox | None:
        """What a request may call; None if nothing.

        Args:
          functions: all that it names.
          choice: "none", "auto", "required", or a function's name.
          allowed: names of those that may be called; None is all.
          parallel: whether there may be several calls.

        Raises:
          Rejected: the functions or the choice can't be, or the model takes none.
        """
        names = [one.name for one in functions]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise invalid(f"tools must have a name each, and {twice!r} is there twice", "tools")
        named = [] if choice in ("none", "auto", "required") else [choice]
        for name in (*named, *(allowed or ())):
            if name not in names:
                raise invalid(f"tool_choice names {name!r}, which is not among the tools "
                              f"({', '.join(names) or 'there are none'})", "tool_choice")
        if not names and choice == "required":
            raise invalid("tool_choice is required, and there are no tools", "tool_choice")
        if not names or choice == "none":
            return None
        if self._syntax is None:
            raise invalid("the served model's chat template takes no tools, or writes calls in no format that is known "
                          f"here (the server's tool_format names one: {', '.join(FORMATS)})", "tools")
        offered = tuple(one for one in functions if allowed is None or one.name in allowed)
        return Toolbox(self._syntax, offered, choice, parallel, shown=tuple(functions))

    def make_call_id(self) -> str:
        """An id for a new call."""
        return (self._syntax.format if self._syntax else FORMATS["hermes"]).make_id()

    def for_template(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as chat templates expect them: content is text, arguments are objects.

        Raises:
          Rejected: naming the field.
        """
        found: list[dict[str, Any]] = []
        called: dict[str, str] = {}  # names by id
        for i, message in enumerate(messages):
            where = f"messages[{i}]"
            one: dict[str, Any] = {"role": message.role, "content": _text(message.content)}
            if message.name is not None:
                one["name"] = message.name
            if isinstance(message, SystemMessage) and not self.reads("developer"):
                one["role"] = "system"
            elif isinstance(message, AssistantMessage):
                one["content"] = one["content"] or message.refusal or ""
                if message.tool_calls:
                    called |= {call.id: call.function.name for call in message.tool_calls}
                    one["tool_calls"] = [
                        self.earlier_call(call.id, call.function.name, call.function.arguments,
                                          f"{where}.tool_calls[{k}].function.arguments")
                        for k, call in enumerate(message.tool_calls)]
                elif message.content is None and message.refusal is None:
                    raise invalid(f"{where}.content must be there, unless there are tool_calls", f"{where}.content")
            elif isinstance(message, ToolMessage):
                if message.tool_call_id not in called:
                    raise invalid(f"{where}.tool_call_id must be the id of a call in a message before it; "
                                  f"{message.tool_call_id!r:.80} is none", f"{where}.tool_call_id")
                one |= {"tool_call_id": message.tool_call_id, "name": message.name or called[message.tool_call_id]}
            found.append(one)
        return found

    def earlier_call(self, call_id: str, name: str, arguments: str, field: str) -> dict[str, Any]:
        """A call that the model made before, as chat templates expect it.

        Raises:
          Rejected: the arguments are not a JSON object; `field` is where the request has them.
        """
        try:
            value = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise invalid(f"{field} must be a JSON object as text, not {arguments!r:.80}", field)
        as_text = self._syntax is not None and self._syntax.format.arguments_as_text
        return {"id": call_id, "type": "function",
                "function": {"name": name, "arguments": arguments or "{}" if as_text else value}}

    def variables(self, sent: Mapping[str, Any] | None, effort: str | None = None, field: str = "") -> dict[str, Any]:
        """What else the template is given.

        Args:
          sent: the request's `chat_template_kwargs`.
          effort: how much the model is to think, and `field` what the request calls that.

        Raises:
          Rejected: the template does not read it, or there is something that follows from the rest of the request.
        """
        found = dict(sent or {})
        wrong = _RESERVED.intersection(found)
        if wrong:
            raise invalid(f"chat_template_kwargs must not hold {', '.join(sorted(wrong))}: the rest of the request "
                          "says that", "chat_template_kwargs")
        if effort is not None:
            if not self.reads("reasoning_effort"):
                raise invalid(f"{field} is nothing that the served model knows: its chat template does not read it",
                              field)
            found["reasoning_effort"] = effort
        return found

    async def encode(self, messages: Sequence[Mapping[str, Any]], toolbox: Toolbox | None,
                     variables: Mapping[str, Any], field: str) -> list[int]:
        """The tokens of a conversation up to where the model goes on.

        Args:
          messages: as `for_template` gives them.
          toolbox: what may be called.
          variables: as `variables` gives them.
          field: where the request has the conversation.

        Raises:
          Rejected: the template refuses it, or it leaves no room for an answer; one that is far too long is not even
            tokenized.
        """

        def encoded() -> list[int]:
            text = self.render(messages, toolbox, variables, field)
            if self._token_bytes is not None:
                self._check_length(-(-len(text.encode(errors="replace")) // self._token_bytes), "at least ", field)
            return self._calls.front.tokenizer.encode(text, special=True)

        # What takes more than a millisecond leaves the event loop to other calls.
        short = len(messages) <= SHORT and sum(len(message["content"]) for message in messages) < LONG_TEXT // 4
        ids = encoded() if short and toolbox is None and not variables else await asyncio.to_thread(encoded)
        self._check_length(len(ids), "", field)
        return ids

    def render(self, messages: Sequence[Mapping[str, Any]], toolbox: Toolbox | None, variables: Mapping[str, Any],
               field: str) -> str:
        """The text of a conversation up to where the model goes on, special tokens spelled out.

        Args:
          as of `encode`.

        Raises:
          Rejected: the template refuses it.
        """
        self.check_template(field)
        tools = toolbox.for_template() if toolbox else None
        try:
            text = self._calls.front.tokenizer.render_chat(messages, tools, **variables)
        except UserError as error:  # it names files of the server's
            raise invalid("the model's chat template refuses the conversation: "
                          + str(error).split(" refuses: ", 1)[-1], field) from error
        return text + (toolbox.prompt if toolbox else "")

    def _check_length(self, num_tokens: int, least: str, field: str) -> None:
        front = self._calls.front
        if num_tokens > front.max_prompt_tokens:
            raise too_long(f"the conversation has {least}{num_tokens} tokens; at most {front.max_prompt_tokens} fit "
                           f"(context {front.max_context}, one for the answer)", field)


def _most_bytes(tokenizer: Any) -> int | None:
    """Bytes of a rendered conversation that one token can stand for; None if there is no limit."""
    if tokenizer.max_token_bytes is None:
        return None
    return max(tokenizer.max_token_bytes, *(len(tokenizer.token_text(i).encode()) for i in tokenizer.special_ids), 1)


def _text(content: Any) -> str:
    """Content, whose pieces are joined by nothing."""
    if isinstance(content, list):
        return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
    return content or ""


def asked_for(body: TemplateFields, toolbox: Toolbox | None, schema: Any, field: str) -> Constraint | None:
    """The one constraint that a request's tools, its answer's schema and its guided fields come to.

    Raises:
      Rejected: they don't go together.
    """
    guided = body.constraint()
    if guided is not None and schema is not None:
        raise invalid(f"{field} and guided_json, guided_regex and guided_grammar can't hold together: give one of them",
                      field)
    if guided is not None and toolbox is not None:
        raise invalid("guided_json, guided_regex and guided_grammar can't hold where tools may be called: leave them "
                      "out, or set tool_choice to none", "tools")
    if toolbox is not None:
        return toolbox.constraint(schema)
    return guided if schema is None else json_constraint(schema)


def constraint_names(body: TemplateFields, field: str, asked: Any) -> dict[str, str]:
    """What to call the engine's constraint in an error: the field that it came from."""
    if any(one is not None for one in (body.guided_json, body.guided_regex, body.guided_grammar)):
        return {}
    return {"json_schema": field, "grammar": "tools" if asked is None else field}
