"""Between the items of `/v1/responses` and the messages that chat templates read."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import Rejected, invalid
from serving.http.conversation import Conversations
from serving.http.response_schemas import FunctionCallItem, Item, MessageItem, Refusal

Message = dict[str, Any]  # as `Conversations.for_template` gives them


def new_id(kind: str) -> str:
    """An id that begins with `kind`."""
    return f"{kind}_{secrets.token_hex(20)}"


def messages_of(sent: str | Sequence[Item], earlier: Sequence[Message], conversations: Conversations) -> list[Message]:
    """The messages that a request's input adds.

    Args:
      sent: the input.
      earlier: messages that lie before it: what calls returned may belong to them.
      conversations: the model's.

    Raises:
      Rejected: naming the item.
    """
    if isinstance(sent, str):
        return [{"role": "user", "content": sent}]
    called = {call["id"]: call["function"]["name"] for message in earlier for call in message.get("tool_calls", ())}
    found: list[Message] = []
    for i, item in enumerate(sent):
        if isinstance(item, MessageItem):
            role = "system" if item.role == "developer" and not conversations.reads("developer") else item.role
            found.append({"role": role, "content": _text(item.content)})
        elif isinstance(item, FunctionCallItem):
            called[item.call_id] = item.name
            if not (found and found[-1]["role"] == "assistant"):
                found.append({"role": "assistant", "content": ""})
            found[-1].setdefault("tool_calls", []).append(
                conversations.earlier_call(item.call_id, item.name, item.arguments, f"input[{i}].arguments"))
        else:
            if item.call_id not in called:
                raise invalid(f"input[{i}].call_id must be that of a function_call before it; {item.call_id!r:.80} is "
                              "none", f"input[{i}].call_id")
            found.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id,
                          "name": called[item.call_id]})
    return found


def message_of(output: Sequence[Mapping[str, Any]], conversations: Conversations) -> Message:
    """The assistant's message that a response's output comes to."""
    text = [part["text"] for item in output if item["type"] == "message" for part in item["content"]]
    message: Message = {"role": "assistant", "content": "".join(text)}
    calls = [_call(item, conversations) for item in output if item["type"] == "function_call"]
    return message | ({"tool_calls": calls} if calls else {})


def with_instructions(instructions: str | None, messages: Sequence[Message]) -> list[Message]:
    """The instructions as a system message in front, in one with that which stands there already."""
    if instructions is None:
        return list(messages)
    first = [{"role": "system", "content": instructions}]
    if messages and messages[0]["role"] == "system":
        first[0]["content"] += "\n\n" + messages[0]["content"]
        messages = messages[1:]
    return [*first, *messages]


def listed(sent: str | Sequence[Item]) -> list[dict[str, Any]]:
    """A request's input as items, each with its id."""
    if isinstance(sent, str):
        sent = [MessageItem.model_validate({"role": "user", "content": sent})]
    found = []
    for item in sent:
        fields = item.model_dump(exclude_none=True)
        if isinstance(item, MessageItem) and isinstance(item.content, str):
            kind = "output_text" if item.role == "assistant" else "input_text"
            fields["content"] = [{"type": kind, "text": item.content}]
        prefix = {"message": "msg", "function_call": "fc"}.get(item.type, "fco")
        found.append({"id": new_id(prefix), "status": "completed"} | fields)
    return found


def _call(item: Mapping[str, Any], conversations: Conversations) -> dict[str, Any]:
    try:
        return conversations.earlier_call(item["call_id"], item["name"], item["arguments"], "arguments")
    except Rejected:  # cut off, or never JSON: the template is shown what the model wrote
        return {"id": item["call_id"], "type": "function",
                "function": {"name": item["name"], "arguments": item["arguments"]}}


def _text(content: str | Sequence[Any]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)
