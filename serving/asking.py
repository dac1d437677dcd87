"""From what a client sends to what the engine can be asked: tokens and sampling, within the limits of the model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llm_jax.inference.request import PromptTooLong, SamplingParams
from serving.engine.front import Front
from serving.errors import invalid

MAX_SAMPLES = 64  # samples of one call, or texts to embed
LONG_TEXT = 4096  # characters (about 3 ms) from which tokenizing leaves the event loop to other calls
MAX_MESSAGE_BYTES = 64 << 20  # gRPC itself answers RESOURCE_EXHAUSTED to more, and can't be told what else to say
SMALL_MESSAGE_BYTES = 4 << 20  # a few ms to parse: no request of that size is refused for its size alone
TOKEN_ID_BYTES = 6  # of a token id in a message, tag included, at most


class Asking:
    """What every door needs to make a request.

    Args:
      front: the engine.
    """

    def __init__(self, front: Front) -> None:
        self.front = front
        self._token_bytes: int | None = front.tokenizer.max_token_bytes

    @property
    def max_message_bytes(self) -> int:
        """Size of a request from which its prompt can't fit, or is nothing but padding."""
        if self._token_bytes is None:
            return MAX_MESSAGE_BYTES
        return max(SMALL_MESSAGE_BYTES, self.front.max_prompt_tokens * max(self._token_bytes, TOKEN_ID_BYTES))

    async def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`; a long text is tokenized in another thread, one that can't fit not at all.

        Raises:
          PromptTooLong: the text has more tokens than fit, however well they match it.
        """
        if len(text) < LONG_TEXT:
            return self.front.encode(text, add_bos=add_bos)
        if self._token_bytes is not None:
            begins = add_bos and self.front.tokenizer.adds_bos
            self._check_length(begins + -(-len(text.encode(errors="replace")) // self._token_bytes), "at least ")
        return await asyncio.to_thread(self.front.encode, text, add_bos=add_bos)

    def token_ids(self, sent: Sequence[int]) -> list[int]:
        """A prompt that was sent as tokens.

        Raises:
          PromptTooLong: there are more than fit; they are not copied then.
        """
        self._check_length(len(sent))
        return list(sent)

    def _check_length(self, num_tokens: int, least: str = "") -> None:
        most = self.front.max_prompt_tokens
        if num_tokens > most:
            raise PromptTooLong(f"the prompt has {least}{num_tokens} tokens; at most {most} fit (context "
                                f"{self.front.max_context}, one for the answer)")

    def sampling(self, prompt_ids: Sequence[int], *, max_tokens: int, num_samples: int, best_of: int = 0,
                 **fields) -> SamplingParams:
        """Sampling parameters of a request over the wire, where 0 for `max_tokens` is "as many as fit".

        Other fields that are left out or None are the model's own defaults.

        Raises:
          InvalidRequest, Rejected: naming the field and the values it takes.
        """
        if max_tokens < 0:
            raise invalid(f"max_tokens={max_tokens} must be positive, or 0 for as many as fit", "max_tokens")
        most = self.max_samples
        if not 0 <= num_samples <= most:
            raise invalid(f"num_samples={num_samples} must lie between 1 and {most}", "num_samples")
        if best_of and not max(num_samples, 1) <= best_of <= most:
            raise invalid(f"best_of={best_of} must lie between num_samples ({max(num_samples, 1)}) and {most}, or be 0",
                          "best_of")
        if not prompt_ids:
            raise invalid("the prompt has no tokens", "prompt")
        # A prompt that leaves no room is refused by the service, which knows the limit to name.
        limit = max_tokens or max(1, self.front.max_context - len(prompt_ids))
        return self.front.defaults.params(max_tokens=limit, **fields)

    def most_tokens(self, prompt_ids: Sequence[int], drawn: int, max_tokens: int) -> int:
        """Tokens that so many samples of a prompt may use at most; the engine draws none that don't fit."""
        room = max(0, self.front.max_context - len(prompt_ids))
        return len(prompt_ids) + drawn * min(max_tokens, room)

    @property
    def max_samples(self) -> int:
        """Requests to the engine that one call may make."""
        return min(MAX_SAMPLES, self.front.max_requests)
