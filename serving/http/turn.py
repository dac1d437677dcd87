"""One answer of the assistant while it is made, for whichever interface tells it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from llm_jax.data.tokenizer import StreamDecoder, Tokenizer
from llm_jax.inference.request import Delta
from serving.http.logprobs import finite, spelled
from serving.http.tool_parsing import Content, Event, Parser
from serving.http.tools import Toolbox


class Turn:
    """One answer while it is made: what is content and what are calls.

    Attributes:
      finish_reason: as of the chat interface; None while it goes on.
    """

    def __init__(self, tokenizer: Tokenizer, toolbox: Toolbox | None) -> None:
        """Args: the model's tokenizer; the functions that may be called, None if nothing is looked for."""
        self.finish_reason: str | None = None
        self._parser: Parser | None = None
        self._marked: _Marked | None = None
        if toolbox is not None:
            self._most = None if toolbox.many else 1
            self._parser = toolbox.format.parser({one.name: one.parameters or {} for one in toolbox.functions})
            if toolbox.prompt:
                self._parser.push(toolbox.prompt)
            if toolbox.syntax.tokens:
                self._marked = _Marked(tokenizer, toolbox.syntax.tokens)

    @property
    def may_call(self) -> bool:
        """Whether calls are looked for."""
        return self._parser is not None

    def push(self, delta: Delta) -> list[Event]:
        """The events of the next delta."""
        if self._parser is None:
            self.finish_reason = delta.finish_reason
            return [Content(delta.text)] if delta.text else []
        text = delta.text if self._marked is None else self._marked.push(delta)
        events = self._parser.push(text) if text else []
        if delta.finish_reason is not None:
            events += self._parser.finish()
            called = self._parser.count and delta.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else delta.finish_reason
        if self._most is None:
            return events
        return [event for event in events if isinstance(event, Content) or event.index < self._most]


class _Marked:
    """The text of a completion with the control tokens that are part of the calls' syntax."""

    def __init__(self, tokenizer: Tokenizer, texts: Mapping[int, str]) -> None:
        self._texts = texts
        self._decoder = StreamDecoder(tokenizer)
        self._decoded = 0  # characters of the tokens so far
        self._given = 0  # of the text so far, which may lag: a stop string may have begun
        self._waiting: deque[tuple[int, str]] = deque()

    def push(self, delta: Delta) -> str:
        for token_id in delta.token_ids:
            if token_id in self._texts:
                self._waiting.append((self._decoded, self._texts[token_id]))
            else:
                self._decoded += len(self._decoder.push(token_id))
        text, pieces = delta.text, []
        while self._waiting and self._waiting[0][0] <= self._given + len(text):
            place, marker = self._waiting.popleft()
            cut = max(0, place - self._given)
            pieces += [text[:cut], marker]
            text = text[cut:]
            self._given += cut
        self._given += len(text)
        return "".join([*pieces, text])


def token_logprobs(tokenizer: Tokenizer, delta: Delta) -> list[dict[str, Any]]:
    """Each of the delta's tokens with its log-probability, and the likeliest there, as chat interfaces tell them."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": spelled(tokenizer, token_id), "logprob": finite(logprob), "bytes": list(data) or None}

    tops = delta.top_logprobs or [()] * len(delta.token_ids)
    return [one(token_id, logprob) | {"top_logprobs": [one(i, value) for i, value in top]}
            for token_id, logprob, top in zip(delta.token_ids, delta.logprobs, tops, strict=True)]
