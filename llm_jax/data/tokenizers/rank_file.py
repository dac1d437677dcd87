"""Rank files as tiktoken reads them: lines of a token in base64 and its rank."""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata

import tiktoken

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.data.tokenizers import folder, known_ranks
from llm_jax.errors import UserError

# tiktoken panics on a million white spaces in a row (its regular expressions go back from the last): those are cut.
_LONG_SPACE = re.compile(r"(\s{100000})")
_KINDS = "GPT-2, cl100k_base, o200k_base, Llama 3, Qwen and GLM-4"


class RankTokenizer(Tokenizer):
    """Byte-pair encoding by ranks, over bytes; `decode(encode(text)) == text` (Qwen's: up to composed characters).

    The file holds ranks alone. How text is split before merging, and the special tokens, are known for the published
    vocabularies in `known_ranks`; for others tokenizer_config.json beside the file says it: `pat_str` (the regular
    expression, by tiktoken's name for it) and `added_tokens_decoder`.
    """

    def __init__(self, files: folder.Files) -> None:
        """Reads the ranks.

        Raises:
          UserError: a damaged line, or a vocabulary of which nobody says how it splits text.
        """
        ranks = _read_ranks(files)
        known = known_ranks.find(ranks.values())
        pattern = files.config.get("pat_str", known.pattern if known else None)
        if pattern is None:
            raise UserError(f"its {len(ranks)} ranks are none of the known vocabularies ({_KINDS}), so nothing says "
                            f"how it splits text; put pat_str and added_tokens_decoder into {folder.CONFIG} beside it")
        size = max(ranks.values()) + 1
        special = dict(known.special if known else {})
        for i, token in files.added(size).items():
            special[i] = token.content
        taken = next(iter(special.keys() & set(ranks.values())), None)
        if taken is not None:
            raise UserError(f"the special token {special[taken]!r:.80} has the id {taken} of an ordinary one")
        ids = {text: i for i, text in special.items()}
        if len(ids) != len(special):
            raise UserError("two special tokens are written the same")
        size = max(size, max(special, default=-1) + 1)
        table = [b""] * size
        for content, rank in ranks.items():
            table[rank] = content
        self._special = special
        roles = self._roles(files, known, ids)
        self._composed = known is not None and known.composed
        super().__init__(files, table, roles, special, spells_all=not self._composed)
        try:
            self._encoding = tiktoken.Encoding(files.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=ids)
            self._encoding.encode_ordinary("a b")
        except Exception as error:  # the library raises what its regular expressions raise
            raise UserError(f"tiktoken can't use its ranks with the pattern {pattern!r:.200}: {error}") from error
        if {"add_bos_token", "add_eos_token"} & files.config.keys() or known is None:
            self.prefix_ids = (self.bos_id,) if self.bos_id is not None and files.flag("add_bos_token", False) else ()
            self.suffix_ids = (self.eos_id,) if self.eos_id is not None and files.flag("add_eos_token", False) else ()
        else:
            self.prefix_ids = tuple(ids[text] for text in known.prefix if text in ids)

    def _encode(self, text: str, special: bool) -> list[int]:
        if self._composed:
            text = unicodedata.normalize("NFC", text)
        ids: list[int] = []
        for part in _LONG_SPACE.split(text):
            ids += (self._encoding.encode(part, allowed_special="all", disallowed_special=()) if special else
                    self._encoding.encode_ordinary(part))
        return ids

    def token_text(self, token_id: int) -> str:
        return self._special.get(token_id) or self.token_bytes(token_id).decode("utf-8", errors="replace")

    @staticmethod
    def _roles(files: folder.Files, known: known_ranks.Known | None, ids: dict[str, int]) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for role in ("bos", "eos", "pad"):
            text = getattr(known, role) if known else None
            found[role] = ids.get(text) if text else None
        for role, text in files.named().items():
            if text is not None and text not in ids:
                raise UserError(f"the files name {text!r:.80} as {role}_token, and there is no such special token")
            found[role] = None if text is None else ids[text]
        return found


def _read_ranks(files: folder.Files) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(files.main.splitlines(), 1):
        if not line:
            continue
        match = re.fullmatch(rb"(\S+) (\d{1,8})", line)
        try:
            content = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            content = b""
        if match is None or not content:
            raise UserError(f"line {number} is no token in base64 and its rank: {line[:60]!r}; the file is damaged")
        ranks[content] = int(match[2])
    if len(set(ranks.values())) != len(ranks):
        raise UserError("two tokens have the same rank; the file is damaged")
    missing = next((b for b in range(256) if bytes([b]) not in ranks), None)
    if missing is not None:
        raise UserError(f"it has no token for the byte 0x{missing:02x}; the file was cut short")
    if max(ranks.values()) > len(ranks) + (1 << 20):
        raise UserError(f"its ranks go up to {max(ranks.values())} with {len(ranks)} tokens; the file is damaged")
    return ranks
