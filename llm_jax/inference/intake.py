"""From what a caller asks to a request that the service can run; what can never be served is refused here."""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections.abc import Sequence as SequenceOf
from typing import Any

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.inference.batch import Asked
from llm_jax.inference.engine import Engine
from llm_jax.inference.lookup import Lookup
from llm_jax.inference.request import InvalidRequest, SamplingParams
from llm_jax.inference.requests import Listener, Request
from llm_jax.inference.scheduler import Sequence
from llm_jax.inference.speculation import Throttle
from llm_jax.inference.text import TextStream


def deadline_of(deadline_s: float | None) -> float | None:
    """The moment, on `time.monotonic`, that lies so many seconds from now; None is none.

    Raises:
      InvalidRequest: it lies in the past.
    """
    if deadline_s is None:
        return None
    if not deadline_s > 0:
        raise InvalidRequest(f"deadline_s must be more than 0, not {deadline_s}", "deadline_s")
    return time.monotonic() + deadline_s


class Intake:
    """Makes requests; thread-safe."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self._engine = engine
        self._tokenizer = tokenizer
        self._grammars: Any = None
        self._lock = threading.Lock()  # guards _grammars

    def request(self, request_id: int, prompt_ids: SequenceOf[int], params: SamplingParams, listener: Listener,
                priority: int, tenant: str, deadline: float | None) -> Request:
        """A request that is not queued yet.

        Args:
          request_id: its number.
          deadline: when it ends whatever it has, on `time.monotonic`; None is never.
          prompt_ids, params, listener, priority, tenant: as of `Service.submit`.

        Raises:
          InvalidRequest: no prompt, ids outside the vocabulary, or a constraint that is none.
        """
        tokens = [int(t) for t in prompt_ids]
        vocabulary = self._engine.config.vocab_size
        if not tokens:
            raise InvalidRequest("the prompt is empty: it needs at least one token", "prompt")
        for name, field, ids in (("token id", "prompt", tokens), ("stop_ids:", "stop_ids", params.stop_ids),
                                 ("logit_bias:", "logit_bias", [i for i, _ in params.logit_bias])):
            bad = next((t for t in ids if not 0 <= t < vocabulary), None)
            if bad is not None:
                raise InvalidRequest(f"{name} {bad} is outside the vocabulary (0 to {vocabulary - 1})", field)
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(64))
        matcher = None if params.constraint is None else self._all_grammars().matcher(params.constraint)
        sequence = Sequence(request_id, tokens, len(tokens), params.max_tokens, priority, tenant=tenant,
                            deadline=deadline, needs_host=matcher is not None, reuse=params.prompt_logprobs is None)
        # A constraint ends with an end token, whatever else is asked.
        ends = frozenset(() if params.ignore_eos and matcher is None else self._tokenizer.end_ids)
        request = Request(sequence, params, TextStream(self._tokenizer, params.stop), listener,
                          ends | frozenset(params.stop_ids), matcher)
        # Counts of tokens are of a sequence, not of each place within a proposal.
        if self._engine.wide_rows and matcher is None and not Asked(params, 0, 0).is_counted:
            request.throttle = Throttle(self._engine.policy)
            request.lookup = Lookup(tokens) if self._engine.draft is None else None
        return request

    def _all_grammars(self) -> Any:
        with self._lock:
            if self._grammars is None:  # seconds for a large vocabulary, and most services are never asked
                from llm_jax.inference.constraints import Grammars

                self._grammars = Grammars(self._tokenizer, self._engine.config.vocab_size)
            return self._grammars
