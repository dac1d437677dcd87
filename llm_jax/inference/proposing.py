"""Speculative decoding in the service: for whom tokens are proposed, which, and how many were right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llm_jax.inference.draft import Wish
from llm_jax.inference.engine import Engine
from llm_jax.inference.requests import Request
from llm_jax.inference.scheduler import PENDING, Scheduler
from llm_jax.inference.speculation import Acceptance, Gate
from llm_jax.inference.steps import Drawn


class Proposer:
    """Proposes tokens by the draft model, or by look-up in the sequence itself.

    Attributes:
      total: what became of all proposals.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self.total = Acceptance()
        self._gate = Gate()

    def decide(self, running: Sequence[Request]) -> bool:
        """Decides how many tokens to propose for each in the coming step; whether any, so that the step has to wait for
        the one before it."""
        policy = self._engine.policy
        throttles = [r.throttle for r in running if r.throttle is not None and r.may_speculate]
        opens = 0 < len(running) <= self._engine.wide_rows and self._gate.opens(policy, throttles, len(running))
        for request in running:
            s = request.sequence
            room = s.max_tokens - s.num_generated - 1
            request.wanted = max(0, min(policy.most, room)) if opens and request.may_speculate else 0
            s.needs_host = request.matcher is not None or request.wanted > 0
        return any(request.wanted for request in running)

    def propose(self, running: Sequence[Request], scheduler: Scheduler) -> None:
        """Sets the proposals that `decide` found worth making; all tokens must be known."""
        wishes: list[Wish] = []
        for request in running:
            s = request.sequence
            s.proposal = []
            if not request.wanted or s.remaining != 1 or s.tokens[-1] == PENDING:
                continue
            if request.lookup is not None:
                s.proposal = request.lookup.propose(request.wanted)
                if not s.proposal and request.throttle is not None:
                    request.throttle.missed()
            elif count := scheduler.reserve(s, request.wanted):
                wishes.append(Wish(s, request.asked(), count))
        if self._engine.draft is not None:
            for wish, tokens in zip(wishes, self._engine.draft.propose(wishes), strict=True):
                wish.sequence.proposal = tokens

    def checked(self, request: Request, drawn: Drawn) -> Drawn:
        """The draws that count: up to the first that differs from what was proposed."""
        proposed = len(drawn.tokens) - 1
        if not proposed:
            return drawn
        proposal = request.sequence.proposal[:proposed]
        right = next((k for k, token in enumerate(proposal) if token != drawn.tokens[k]), proposed)
        assert request.throttle is not None
        request.throttle.update(proposed, right)
        self.total.add(proposed, right)
        return dataclasses.replace(drawn, tokens=drawn.tokens[:right + 1])
