"""A response while it is made: its object, and the typed events that tell of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from llm_jax.inference.request import Usage
from serving.errors import Rejected
from serving.http.response_items import new_id
from serving.http.tool_parsing import Arguments, Call, Content, Event

Told = list[dict[str, Any]]  # events, each with its `type`

_ENDS = {"stop": "completed", "tool_calls": "completed"}
_REASONS = {"length": "max_output_tokens"}  # others are told as they are


class ResponseOutput:
    """One response. Its events come to `body`: whoever wants no events may drop them.

    Attributes:
      body: the response object; what lies in it is changed while it is made.
    """

    def __init__(self, body: dict[str, Any], make_call_id: Callable[[], str]) -> None:
        """Begins a response.

        Args:
          body: what the object says of the request; `id`, `output`, `status` and the like are set here.
          make_call_id: gives an id for a call.
        """
        self._make_call_id = make_call_id
        self.body = body | {"id": new_id("resp"), "object": "response", "created_at": int(time.time()), "output": [],
                            "completed_at": None, "status": "in_progress", "error": None, "incomplete_details": None,
                            "usage": None}
        self._sequence = 0
        self._open: dict[str, Any] | None = None  # the item that is being made, the last of the output
        self._text: list[str] = []
        self._waiting: list[dict[str, Any]] = []  # log-probabilities of tokens whose text has not come

    def begin(self) -> Told:
        """The first events."""
        return [self._event("response.created", response=self.snapshot()),
                self._event("response.in_progress", response=self.snapshot())]

    def push(self, events: Iterable[Event], logprobs: list[dict[str, Any]]) -> Told:
        """What the answer's events come to; `logprobs` are of the tokens that brought them."""
        told: Told = []
        self._waiting += logprobs
        for event in events:
            match event:
                case Content(text):
                    if self._open is None or self._open["type"] != "message":
                        told += self._end("completed") + self._begin_message()
                    told.append(self._add_text(text))
                case Call(_, name):
                    told += self._end("completed") + self._begin_call(name)
                case Arguments(_, text):
                    told.append(self._add_arguments(text))
        return told

    def finish(self, reason: str | None, usage: Usage) -> Told:
        """The last events.

        Args:
          reason: the answer's finish reason.
          usage: tokens of the request.
        """
        told = [] if self.body["output"] else self._begin_message()
        status = _ENDS.get(reason or "stop", "incomplete")
        told += self._end(status)
        if status == "incomplete":
            self.body["incomplete_details"] = {"reason": _REASONS.get(reason or "", reason)}
        self._close(status, usage)
        return [*told, self._event(f"response.{status}", response=self.snapshot())]

    def fail(self, error: Rejected, usage: Usage) -> Told:
        """The end, if it went wrong."""
        self.body["error"] = {"code": error.reason.value.code, "message": error.message}
        self._end("incomplete")
        self._close("failed", usage)
        return [self._event("response.failed", response=self.snapshot())]

    def cancel(self, usage: Usage) -> None:
        """The end, if somebody wants no more of it."""
        self._end("incomplete")
        self._close("cancelled", usage)

    def snapshot(self) -> dict[str, Any]:
        """The object as it is now."""
        output = [_copied(item) for item in self.body["output"]]
        if self._open is not None:
            holder = output[-1]["content"][0] if self._open["type"] == "message" else output[-1]
            holder["text" if self._open["type"] == "message" else "arguments"] = "".join(self._text)
        return self.body | {"output": output}

    def _close(self, status: str, usage: Usage) -> None:
        self.body |= {"status": status, "completed_at": int(time.time()), "usage": {
            "input_tokens": usage.prompt_tokens, "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens}}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1} | fields

    def _begin_item(self, item: dict[str, Any]) -> dict[str, Any]:
        self._open = item
        self._text = []
        self.body["output"].append(item)
        return self._event("response.output_item.added", output_index=self._index, item=_copied(item))

    def _begin_message(self) -> Told:
        added = self._begin_item({"id": new_id("msg"), "type": "message", "status": "in_progress",
                                  "role": "assistant", "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._item["content"].append(part)
        return [added, self._event("response.content_part.added", **self._place, content_index=0,
                                   part=part | {"logprobs": []})]

    def _begin_call(self, name: str) -> Told:
        return [self._begin_item({"id": new_id("fc"), "type": "function_call", "status": "in_progress",
                                  "call_id": self._make_call_id(), "name": name, "arguments": ""})]

    def _add_text(self, text: str) -> dict[str, Any]:
        self._text.append(text)
        logprobs, self._waiting = self._waiting, []
        self._item["content"][0]["logprobs"] += logprobs
        return self._event("response.output_text.delta", **self._place, content_index=0, delta=text, logprobs=logprobs)

    def _add_arguments(self, text: str) -> dict[str, Any]:
        self._text.append(text)
        return self._event("response.function_call_arguments.delta", **self._place, delta=text)

    def _end(self, status: str) -> Told:
        """Ends the item that is being made, if one is."""
        if self._open is None:
            return []
        item, text, told = self._open, "".join(self._text), []
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            part["text"] = text
            part["logprobs"] += self._waiting
            told = [self._event("response.output_text.done", **self._place, content_index=0, text=text,
                                logprobs=list(part["logprobs"])),
                    self._event("response.content_part.done", **self._place, content_index=0, part=dict(part))]
        else:
            item["arguments"] = text
            told = [self._event("response.function_call_arguments.done", **self._place, name=item["name"],
                                arguments=text)]
        self._waiting = []
        told.append(self._event("response.output_item.done", output_index=self._index, item=_copied(item)))
        self._open = None
        return told

    @property
    def _item(self) -> dict[str, Any]:
        assert self._open is not None
        return self._open

    @property
    def _index(self) -> int:
        return len(self.body["output"]) - 1

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": self._index}


def _copied(item: dict[str, Any]) -> dict[str, Any]:
    if item["type"] != "message":
        return dict(item)
    return item | {"content": [part | {"logprobs": list(part["logprobs"])} for part in item["content"]]}
