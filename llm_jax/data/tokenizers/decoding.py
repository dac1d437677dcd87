"""How the tokens of a `tokenizer.json` are spelt: its decoder, read as the bytes of each token by itself.

A decoder of the `tokenizers` library turns a list of tokens into text. Those in use treat every token alike, but for
spaces at the very beginning, so that text can be streamed; the few that do not are refused.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from llm_jax.errors import UserError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# WordPiece's "cleanup": what is written without a space before it in English.
_CLEANUP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
            (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet (Radford et al. 2019): the byte that each character of a byte-level token stands for.

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on, in order.
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = byte_alphabet()


@dataclasses.dataclass
class Spelling:
    """From a token as the vocabulary has it to the bytes it stands for.

    Attributes:
      byte_level: tokens are written in GPT-2's alphabet.
      byte_fallback: tokens like <0xE4> are single bytes.
      replacements: what is written instead of what, in order.
      word_prefix: of tokens that continue a word; the others begin one, with a space. None: no words.
      cleanup: whether spaces before English punctuation go.
      stripped_spaces: spaces that go at the beginning of a text, at most.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    word_prefix: str | None = None
    cleanup: bool = False
    stripped_spaces: int = 0

    @classmethod
    def of(cls, decoder: Any) -> Spelling:
        """Reads the `decoder` of a tokenizer.json; None, as the library does, puts a space between tokens.

        Raises:
          UserError: a decoder whose text depends on more than each token by itself, or a damaged one.
        """
        if decoder is None:
            return cls(word_prefix="", stripped_spaces=1)
        spelling, fused = cls(), False
        for step in _steps(decoder):
            try:
                fused = spelling._take(step, fused) or fused
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"its decoder is damaged: {step!r:.120}") from error
        return spelling

    def bytes_of(self, token: str) -> bytes:
        """The bytes of a token of the vocabulary."""
        if self.byte_level:
            if all(c in _ALPHABET for c in token):
                return bytes(_ALPHABET[c] for c in token)
            return token.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.word_prefix is not None:
            if self.word_prefix and token.startswith(self.word_prefix):
                token = token[len(self.word_prefix):]
            else:
                token = " " + token
            for old, new in _CLEANUP if self.cleanup else ():
                token = token.replace(old, new)
        return token.encode()

    def _take(self, step: dict[str, Any], fused: bool) -> bool:
        """Adds one step; returns whether it makes one text of all tokens."""
        kind = step["type"]
        if kind == "ByteLevel":
            self.byte_level = True
        elif kind == "ByteFallback":
            self.byte_fallback = True
        elif kind == "Fuse":
            return True
        elif kind == "Replace" and isinstance(step["pattern"].get("String"), str) and (
                not fused or len(step["pattern"]["String"]) == 1):
            self.replacements.append((step["pattern"]["String"], str(step["content"])))
        elif kind == "Strip" and fused and step["content"] == " " and not step["stop"]:
            self.stripped_spaces = int(step["start"])
        elif kind == "Metaspace":
            self.replacements.append((str(step["replacement"]), " "))
            scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
            self.stripped_spaces = int(scheme != "never")
        elif kind == "WordPiece":
            self.word_prefix, self.cleanup = str(step["prefix"]), bool(step.get("cleanup", True))
            self.stripped_spaces = 1
        else:
            raise UserError(f"its decoder {step!r:.120} is not supported: tokens could not be streamed one by one")
        return False


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence" and isinstance(decoder.get("decoders"), list):
        return [step for part in decoder["decoders"] for step in _steps(part)]
    if not isinstance(decoder, dict) or not isinstance(decoder.get("type"), str):
        raise UserError(f"its decoder is damaged: {decoder!r:.120}")
    return [decoder]
