"""Tokens and their log-probabilities as clients read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llm_jax.data.tokenizer import StreamDecoder, Tokenizer
from llm_jax.inference.request import Delta, PromptLogprob, TopLogprobs

LEAST = -9999.0  # what JSON gets for a token that can't be: it has no infinity


def spelled(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; `bytes:\\xe4` for a part of a character, the vocabulary's own name for a special token."""
    data = tokenizer.token_bytes(token_id)
    if not data:
        return tokenizer.token_text(token_id) if token_id < tokenizer.vocab_size else ""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(float(logprob), LEAST)


class CompletionLogprobs:
    """The `logprobs` of one choice of a completion, delta by delta: where each token begins is counted on.

    Args:
      tokenizer: the model's.
      echo: what stands before the completion in the choice's text.
    """

    def __init__(self, tokenizer: Tokenizer, echo: str) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._offset = len(echo)

    def of(self, delta: Delta) -> dict[str, list[Any]]:
        """Of what has come."""
        offsets, self._offset = _offsets(self._tokenizer, self._decoder, delta.token_ids, self._offset)
        return self._told(delta.token_ids, offsets, delta.logprobs, delta.top_logprobs or [()] * len(offsets))

    def before(self, prompt_ids: Sequence[int], told: Sequence[PromptLogprob],
               follows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """`follows` with the prompt's tokens in front; nothing is known of the first, which follows none."""
        offsets, _ = _offsets(self._tokenizer, StreamDecoder(self._tokenizer), prompt_ids, 0)
        prompt = self._told(prompt_ids, offsets, [None, *(one.logprob for one in told)],
                            [(), *(one.top for one in told)])
        return {name: values + follows[name] for name, values in prompt.items()}

    def _told(self, token_ids: Sequence[int], offsets: list[int], logprobs: Sequence[float | None],
              tops: Iterable[TopLogprobs]) -> dict[str, list[Any]]:
        texts = [spelled(self._tokenizer, i) for i in token_ids]
        return {
            "tokens": texts, "text_offset": offsets,
            "token_logprobs": [None if value is None else finite(value) for value in logprobs],
            "top_logprobs": [None if value is None else self._best(top) | {text: finite(value)}
                             for text, value, top in zip(texts, logprobs, tops, strict=True)]}

    def _best(self, top: TopLogprobs) -> dict[str, float]:
        return {spelled(self._tokenizer, i): finite(value) for i, value in top}


def _offsets(tokenizer: Tokenizer, decoder: StreamDecoder, token_ids: Iterable[int], at: int) -> tuple[list[int], int]:
    """Where in the text each token begins, and where the text that is complete ends."""
    found = []
    for token_id in token_ids:
        piece = decoder.push(token_id)
        # Bytes before it that were the beginning of no character have become one in front of it.
        own = len(tokenizer.token_bytes(token_id).decode(errors="replace"))
        found.append(at + max(0, len(piece) - own))
        at += len(piece)
    return found, at
