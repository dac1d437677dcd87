"""From tokens to text that is final: whole characters, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from llm_jax.data.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """The text of one completion, released as soon as no later token can change it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that token `token_id` makes final. Sets `stopped` when a stop string is complete."""
        return self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """The end: what was held back, since no stop string came of it."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.flush())
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[:min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
