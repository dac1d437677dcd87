"""What the service keeps of a request while it runs: from drawn tokens to the news of its listener."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llm_jax.errors import UserError
from llm_jax.inference.batch import Asked
from llm_jax.inference.lookup import Lookup
from llm_jax.inference.request import Delta, PromptLogprob, SamplingParams, Usage
from llm_jax.inference.scheduler import Sequence as Running
from llm_jax.inference.speculation import Throttle
from llm_jax.inference.steps import Drawn
from llm_jax.inference.text import TextStream

if TYPE_CHECKING:
    from llm_jax.inference.constraints import Matcher

Listener = Callable[[Delta], None]
POOLINGS = ("mean", "last")


@dataclasses.dataclass
class Request:
    """A request under way.

    Attributes:
      sequence: its tokens and pages.
      params: as asked for, the seed filled in.
      text: what of its text is final.
      listener: receives its deltas.
      end_ids: tokens that end it.
      matcher: keeps it to its constraint; None without one.
      lookup: proposes tokens from its own text; None where a draft model does, or nobody.
      throttle: how many are proposed; None where none are.
      wanted: how many tokens to propose for the coming step.
      pooling: "mean" or "last" if its embedding is wanted, and no text; else None.
      completion_tokens: tokens of the completion so far.
      failure: why its constraint can't be followed any further.
      arrived: when it was made, on `time.monotonic`.
      started: when the first step that it takes part in was planned; None before.
    """

    sequence: Running
    params: SamplingParams
    text: TextStream
    listener: Listener
    end_ids: frozenset[int]
    matcher: Matcher | None = None
    lookup: Lookup | None = None
    throttle: Throttle | None = None
    wanted: int = 0
    pooling: str | None = None
    completion_tokens: int = 0
    failure: str | None = None
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    started: float | None = None
    _admission: int = -1
    _prompt: dict[int, PromptLogprob] = dataclasses.field(default_factory=dict)
    _told_prompt: bool = False
    _hidden: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> int:
        """Of the request and its sequence."""
        return self.sequence.id

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of its prompt are asked for and not known yet."""
        return self.params.prompt_logprobs is not None and len(self._prompt) < self.sequence.num_prompt - 1

    @property
    def may_speculate(self) -> bool:
        """Whether tokens may be proposed for it now: its next draws change nothing about one another."""
        s, p = self.sequence, self.params
        return self.throttle is not None and s.num_generated >= p.min_tokens

    def asked(self) -> Asked:
        """What its next draw is to be like; called for each step in which it draws."""
        s, p = self.sequence, self.params
        forbidden = tuple(sorted(self.end_ids)) if s.num_generated < p.min_tokens else ()
        mask = None
        if self.matcher is not None and self.failure is None:
            try:
                mask = self.matcher.mask()
            except UserError as error:
                self.failure = str(error)
        made = Asked(p, s.slot, len(s.tokens), forbidden, mask)
        if made.is_counted and self._admission != s.admissions:
            self._admission = s.admissions  # its counts were another's until now
            made = dataclasses.replace(made, entering=tuple(s.tokens), num_prompt=s.num_prompt)
        return made

    def scored(self, found: Sequence[PromptLogprob], start: int) -> None:
        """Notes how likely the prompt's tokens after position `start` are."""
        most = self.params.prompt_logprobs or 0
        for i, one in enumerate(found):
            self._prompt[start + 1 + i] = dataclasses.replace(one, top=one.top[:most])

    def computed(self, hidden_TD: np.ndarray, start: int) -> None:
        """Notes the hidden states from position `start` on, for the embedding."""
        if start == 0:
            self._hidden.clear()  # from the beginning, perhaps again
        self._hidden[start] = hidden_TD[-1:] if self.pooling == "last" else hidden_TD.sum(0, dtype=np.float64)[None]

    def embedding(self) -> np.ndarray:
        """float32 [D]: the mean of the prompt's hidden states, or the last one."""
        if self.pooling == "last":
            return self._hidden[max(self._hidden)][0]
        return (np.concatenate(list(self._hidden.values())).sum(0) / self.sequence.num_prompt).astype(np.float32)

    def advance(self, drawn: Drawn) -> tuple[Delta, int]:
        """Takes the next tokens.

        Args:
          drawn: one, or several that were proposed and found right and one more.
        Returns:
          the delta, with a finish_reason (and no usage yet) if they end the request, and how many tokens were taken.
        """
        text, ids, logprobs, top, reason = "", [], [], [], None
        taken = 0
        for i, token in enumerate(drawn.tokens):
            taken += 1
            if self.failure is not None:
                return Delta(finish_reason="error", error=self.failure), taken
            if token in self.end_ids or (self.matcher is not None and self.matcher.finished):
                text += self.text.flush()
                reason = "stop"
                break
            self.completion_tokens += 1
            ids.append(token)
            logprobs.append(drawn.logprobs[i])
            if self.params.logprobs:
                top.append(drawn.top[i][:self.params.logprobs])
            text += self.text.push(token)
            self._accept(token)
            if self.lookup is not None:
                self.lookup.extend(token)
            if self.text.stopped:
                reason = "stop"
                break
            if self.matcher is not None and self.matcher.finished:
                text += self.text.flush()
                reason = "stop"
                break
            if self.completion_tokens >= self.sequence.max_tokens:
                text += self.text.flush()
                # The last characters, released only now, may complete a stop string.
                reason = "stop" if self.text.stopped else "length"
                break
        delta = Delta(text, tuple(ids), tuple(logprobs), tuple(top), self._first(), finish_reason=reason)
        return delta, taken

    def _accept(self, token: int) -> None:
        if self.matcher is not None:
            try:
                self.matcher.accept(token)
            except UserError as error:
                self.failure = str(error)  # told with the next draw

    def _first(self) -> tuple[PromptLogprob, ...]:
        """The prompt's log-probabilities, once."""
        if self._told_prompt or self.params.prompt_logprobs is None:
            return ()
        self._told_prompt = True
        return tuple(self._prompt[i] for i in sorted(self._prompt))

    def usage(self) -> Usage:
        """Tokens so far."""
        started = time.monotonic() if self.started is None else self.started
        return Usage(self.sequence.num_prompt, self.completion_tokens, self.sequence.cached_tokens,
                     started - self.arrived)
