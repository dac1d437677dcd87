"""Hugging Face's `tokenizer.json`, run by the `tokenizers` library."""

from __future__ import annotations

import copy
import json
import secrets
from typing import Any

import tokenizers

from llm_jax.data.tokenizer import Tokenizer, bert_special_ids, special_ids
from llm_jax.data.tokenizers import folder
from llm_jax.data.tokenizers.decoding import Spelling
from llm_jax.errors import UserError


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of any model kind: BPE over bytes or with byte fallback, Unigram, WordPiece, WordLevel.

    Whether `decode(encode(text)) == text` is up to the file: a BPE over bytes loses nothing; WordPiece loses white
    space, unknown characters and (where it lowers it) case, and puts spaces between words.
    """

    def __init__(self, files: folder.Files) -> None:
        """Reads the file and what lies beside it.

        Raises:
          UserError: it is damaged or its parts do not fit each other.
        """
        data = folder.parse_object(files.main, files.where)
        if not isinstance(data.get("model"), dict):
            raise UserError("it has no model: not a tokenizer.json of the tokenizers library")
        self._meant = _parse(files.main.decode("utf-8", errors="replace"))
        self._more = _add_tokens(files, self._meant)
        ids = self._meant.get_vocab(with_added_tokens=True)
        size = max(ids.values(), default=-1) + 1
        if size == 0 or size > len(ids) + (1 << 20):
            raise UserError(f"its ids are damaged: {len(ids)} tokens with ids up to {size - 1}")
        self._texts = [""] * size
        for text, i in ids.items():
            self._texts[i] = text
        added = self._meant.get_added_tokens_decoder()
        control = {i for i, token in added.items() if token.special}
        roles = special_ids(files, ids, size)
        if _kind(data["model"]) == "WordPiece":
            named = files.named()
            roles |= {role: i for role, i in bert_special_ids(ids).items()
                      if role not in named and roles[role] is None}
        control |= {i for role, i in roles.items() if i is not None}
        spelling = Spelling.of(data.get("decoder"))
        table = [b"" if i in control else added[i].content.encode() if i in added and spelling.byte_level else
                 spelling.bytes_of(text) for i, text in enumerate(self._texts)]
        spells_bytes = spelling.byte_level or (spelling.byte_fallback and "<0xFF>" in ids)
        super().__init__(files, table, roles, control, spelling.stripped_spaces,
                         spells_all=spells_bytes and _keeps_all(data.get("normalizer")))
        unknown = None if self.unk_id is None else self._texts[self.unk_id]
        self._named = [self._texts[i] for i in sorted(control) if i not in added]
        self._meant.add_special_tokens([_added(text) for text in self._named])
        self._plain = self._make_plain(data, {self._texts[i] for i in control} - {unknown})
        self.prefix_ids, self.suffix_ids = self._affixes(data)

    def _encode(self, text: str, special: bool) -> list[int]:
        return (self._meant if special else self._plain).encode(text, add_special_tokens=False).ids

    def token_text(self, token_id: int) -> str:
        return self._texts[token_id] if token_id < self.vocab_size else ""

    def _make_plain(self, data: dict[str, Any], control: set[str]) -> tokenizers.Tokenizer:
        """The same tokenizer, but no text gives a control token."""
        model = data["model"]
        kind, vocab = _kind(model), model.get("vocab") or ()
        # Control tokens that are pieces of the model as well: BPE reaches them by its merges alone, if at all, the
        # others find any piece. There they get names that nobody can write.
        if kind == "BPE" and not model.get("ignore_merges"):
            pieces: set[str] = set()
        elif kind == "Unigram":
            pieces = {item[0] for item in vocab} & control
        else:
            pieces = set(vocab) & control
        if kind == "BPE":
            pieces -= {"".join(m) if isinstance(m, list) else m.replace(" ", "") for m in model.get("merges", ())}
        if pieces:
            changed = copy.copy(data)
            secret = secrets.token_hex(8)
            names = {text: f"\ufdd0{secret}{i}\ufdd1" for i, text in enumerate(sorted(pieces))}
            changed["model"] = model | {"vocab": (
                [[names.get(text, text), score] for text, score in vocab] if kind == "Unigram" else
                {names.get(text, text): i for text, i in vocab.items()})}
            changed["added_tokens"] = [token | {"content": names.get(token["content"], token["content"])}
                                       for token in data.get("added_tokens") or ()]
            changed["post_processor"] = None
            plain = _parse(json.dumps(changed))
            plain.add_tokens([token for token in self._more if token.content not in pieces])
        else:
            plain = _parse(self._meant.to_str())
        plain.encode_special_tokens = True
        return plain

    def _affixes(self, data: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts before and behind a prompt, as transformers 5 reads the files."""
        config = self.files.config
        if data.get("post_processor") is None or {"add_bos_token", "add_eos_token"} & config.keys():
            bos = self.bos_id if self.files.flag("add_bos_token", False) else None
            eos = self.eos_id if self.files.flag("add_eos_token", False) else None
            return ((bos,) if bos is not None else ()), ((eos,) if eos is not None else ())
        example = self._meant.encode("a")
        marks, ids = example.special_tokens_mask, example.ids
        before = next((i for i, mark in enumerate(marks) if not mark), len(marks))
        behind = next((i for i, mark in enumerate(reversed(marks)) if not mark), 0)
        return tuple(ids[:before]), tuple(ids[len(ids) - behind:])


def _parse(text: str) -> tokenizers.Tokenizer:
    try:
        parsed = tokenizers.Tokenizer.from_str(text)
        parsed.no_padding()
        parsed.no_truncation()
        return parsed
    except BaseException as error:  # a panic of the library derives from BaseException
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise UserError(f"not a tokenizer.json that the tokenizers library reads: {error}") from error


def _keeps_all(normalizer: Any) -> bool:
    """Whether a normalizer only marks spaces."""
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        return all(map(_keeps_all, normalizer.get("normalizers") or ()))
    return normalizer is None or isinstance(normalizer, dict) and (
        normalizer.get("type") == "Prepend"
        or normalizer.get("type") == "Replace" and normalizer.get("pattern") == {"String": " "})


def _kind(model: dict[str, Any]) -> str:
    """The model's kind; older files do not say it."""
    if isinstance(model.get("type"), str):
        return model["type"]
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _added(text: str, token: folder.Added | None = None) -> tokenizers.AddedToken:
    token = token or folder.Added(text, True)
    return tokenizers.AddedToken(text, special=token.special, lstrip=token.lstrip, rstrip=token.rstrip,
                                 single_word=token.single_word, normalized=False)


def _add_tokens(files: folder.Files, parsed: tokenizers.Tokenizer) -> list[tokenizers.AddedToken]:
    """Adds what only tokenizer_config.json or added_tokens.json list; returns what was added."""
    made = []
    for i, token in sorted(files.added(parsed.get_vocab_size(with_added_tokens=True)).items()):
        known = parsed.token_to_id(token.content)
        if known is None:
            made.append(_added(token.content, token))
            parsed.add_tokens(made[-1:])
            known = parsed.token_to_id(token.content)
        if known != i:
            raise UserError(f"{files.beside(folder.CONFIG)}: added token {token.content!r:.80} has id {i}, and "
                            f"{files.name} gives it id {known}")
    known_ids = parsed.get_added_tokens_decoder()
    for text in files.more_special():
        i = parsed.token_to_id(text)
        if i is None:
            raise UserError(f"{files.beside(folder.CONFIG)} names the special token {text!r:.80}, and the vocabulary "
                            "has no such token")
        if i not in known_ids or not known_ids[i].special:
            made.append(_added(text))
            parsed.add_special_tokens(made[-1:])
    return made


