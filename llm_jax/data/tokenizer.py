"""Text to tokens and back: one interface for every kind of tokenizer, and the decoder that streams whole characters."""

from __future__ import annotations

import abc
import codecs
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax import storage
from llm_jax.data.tokenizers import folder
from llm_jax.errors import UserError

FILE_NAME = folder.SENTENCEPIECE  # of the tokenizers that this project trains

# Which tokens families use for what, where no file says so: the defaults of their classes in transformers.
_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_LLAMA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_FAMILIES: dict[str, dict[str, str]] = {
    "gpt2": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    "bert": _BERT,
    "t5": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
    "llama": _LLAMA, "mistral": _LLAMA, "mixtral": _LLAMA,
}


class Tokenizer(abc.ABC):
    """What every tokenizer can do, whichever files it comes from; `Tokenizer.load` makes the right kind.

    Attributes:
      vocab_size: largest token id plus one, added and special tokens included.
      text_vocab_size: largest id that `encode(text)` can give, plus one.
      bos_id, eos_id, unk_id, cls_id, sep_id, mask_id: special tokens, None where the tokenizer has none.
      pad_id: the padding token; without one the end token, without that 0.
      special_ids: control tokens: `encode(text)` gives none of them but the one for unknown text, `decode` drops them.
      end_ids: tokens at which generation ends: generation_config.json's; without any there config.json's, else EOS.
      prefix_ids, suffix_ids: what the model expects before and behind a prompt.
      max_token_bytes: UTF-8 bytes of text that one token of `encode(text)` can stand for, at most; None where there is
        no limit, because text is normalised or any length of unknown text is one token.
      byte_lengths: int32 [vocab_size], UTF-8 bytes that each token stands for (0 for special tokens).
      stripped_spaces: spaces that decoding takes away at the beginning of a text, at most.
    """

    special_ids: frozenset[int]

    def __init__(self, files: folder.Files, table: list[bytes], special: Mapping[str, int | None],
                 special_ids: Iterable[int], stripped_spaces: int = 0, spells_all: bool = True) -> None:
        """Sets what all kinds have in common.

        Args:
          files: what it was read from.
          table: the bytes of every token, empty for special ones.
          special: ids by role (`folder.ROLES`).
          special_ids: all control tokens, those with a role among them.
          stripped_spaces: as the attribute.
          spells_all: whether the tokens of any text spell all of it.
        """
        self.files = files
        self._bytes = table
        self.vocab_size = len(table)
        self.special_ids = frozenset(special_ids)
        plain = set(range(self.vocab_size)) - (self.special_ids - {special.get("unk")})
        self.text_vocab_size = max(plain, default=-1) + 1
        self.bos_id = special.get("bos")
        self.eos_id = special.get("eos")
        self.unk_id = special.get("unk")
        self.cls_id = special.get("cls")
        self.sep_id = special.get("sep")
        self.mask_id = special.get("mask")
        self.pad_id: int = next((i for i in (special.get("pad"), self.eos_id) if i is not None), 0)
        self.end_ids = files.end_ids(self.eos_id, self.vocab_size)
        self.prefix_ids: tuple[int, ...] = ()
        self.suffix_ids: tuple[int, ...] = ()
        self.stripped_spaces = stripped_spaces
        self.byte_lengths = np.array([len(b) for b in table], np.int32)
        self.max_token_bytes = int(self.byte_lengths.max()) if spells_all else None

    @staticmethod
    def load(path: str | os.PathLike) -> Tokenizer:
        """Reads a tokenizer, given as its file or as the folder (local or a bucket) that holds it.

        `tokenizer.json` goes before `tokenizer.model`, and that before `*.tiktoken`; `tokenizer.model` may be a
        SentencePiece model or a list of ranks. Without any of them, GPT-2's, Qwen2's and BERT's older form is read
        (vocab.json with merges.txt, vocab.txt), and saved as tokenizer.json. Special tokens, chat templates and end
        tokens come from the files beside it: tokenizer_config.json, special_tokens_map.json, added_tokens.json,
        chat_template.jinja, additional_chat_templates/, generation_config.json and config.json. Nothing in them is
        executed.

        Raises:
          UserError: there is none, a file is damaged, or of a kind that is not supported.
        """
        files = folder.read(path)
        try:
            if folder.holds_ranks(files.main):
                from llm_jax.data.tokenizers.rank_file import RankTokenizer
                return RankTokenizer(files)
            if files.name == folder.JSON:
                from llm_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
                return HuggingFaceTokenizer(files)
            from llm_jax.data.tokenizers.sentencepiece_model import SentencePieceTokenizer
            return SentencePieceTokenizer(files)
        except UserError as error:
            if str(error).startswith(files.paths()):
                raise
            raise UserError(f"{files.where}: {error}") from error

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the tokenizer's files into `directory`, each as it was read, whole or not at all.

        What only the model's config.json said of special and end tokens is written as special_tokens_map.json and
        generation_config.json. Files of another tokenizer there are taken away first.
        """
        folder.write(directory, self.files.contents | self._said_elsewhere())

    @property
    def fingerprint(self) -> str:
        """The main file's name and a hash of all files: the same wherever they lie."""
        digest = hashlib.sha256()
        for name, content in sorted((self.files.contents | self._said_elsewhere()).items()):
            digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
        return f"{self.files.name} {digest.hexdigest()[:16]}"

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The tokens of `text`; nothing is put before or behind them.

        Args:
          text: any text.
          special: whether the special tokens written in it are meant, as in a rendered chat; else they are plain text.
        Raises:
          UserError: the text holds a lone surrogate, which no UTF-8 text can.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"text is not valid Unicode: a lone surrogate at character {error.start}") from error
        return self._encode(text, special)

    @abc.abstractmethod
    def _encode(self, text: str, special: bool) -> list[int]:
        """`encode` for valid Unicode."""

    def prompt_ids(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a prompt as the model expects it: BOS in front where the tokenizer puts one, never twice.

        Args:
          text: the prompt.
          special: as in `encode`.
        """
        ids = self.encode(text, special)
        prefix, suffix = list(self.prefix_ids), list(self.suffix_ids)
        if prefix and ids[:len(prefix)] == prefix:
            prefix = []
        if suffix and ids[-len(suffix):] == suffix:
            suffix = []
        return prefix + ids + suffix

    @property
    def adds_bos(self) -> bool:
        """Whether a prompt begins with BOS."""
        return self.bos_id is not None and self.prefix_ids[:1] == (self.bos_id,)

    def document_ids(self, text: str) -> list[int]:
        """The tokens of a training document: one that begins it, the text's, one that ends it.

        BOS begins it (BERT: [CLS]; a tokenizer that has neither: the end token), EOS ends it (BERT: [SEP]).

        Raises:
          UserError: the tokenizer has no token to end a text with.
        """
        end = self.eos_id if self.eos_id is not None else self.sep_id
        if end is None:
            raise UserError(f"{self.files.where}: the tokenizer has no end-of-text token, and documents need one; name "
                            f"it as eos_token in {folder.CONFIG}")
        begin = next(i for i in (self.bos_id, self.cls_id, end) if i is not None)
        return [begin, *self.encode(text), end]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are dropped and invalid UTF-8 becomes U+FFFD."""
        content = b"".join([self.token_bytes(i) for i in ids])
        return content[self._leading(content, self.stripped_spaces):].decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, possibly part of a character, that a token stands for.

        Special tokens stand for nothing, and so do ids past the vocabulary, which a model with more rows may emit.
        """
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        return self._bytes[token_id] if token_id < self.vocab_size else b""

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template (of several, the one named "default"); None if there is none."""
        from llm_jax.data.tokenizers import chat  # Jinja is slow to import, and most who tokenize do not chat

        return chat.templates(self.files).get("default")

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
                    add_generation_prompt: bool = True, template: str | None = None, **variables: Any) -> str:
        """A conversation as the text that the model was trained on, by its chat template.

        Args:
          messages: `{"role": …, "content": …}` each.
          tools: JSON schemas of functions that the model may call.
          add_generation_prompt: whether to end where the assistant's next turn begins.
          template: the name of one of several templates; None takes "tool_use" where there is one and there are tools,
            else "default".
          **variables: what else the template reads (`enable_thinking`, `documents` …).
        Raises:
          UserError: there is no template, or none of that name, or it refuses the conversation.
        """
        from llm_jax.data.tokenizers import chat

        return chat.render(self.files, messages, tools, add_generation_prompt, template,
                           self._special_texts() | variables)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
                    add_generation_prompt: bool = True, template: str | None = None, **variables: Any) -> list[int]:
        """The tokens of `render_chat`; BOS is among them if the template writes it, and is not added."""
        text = self.render_chat(messages, tools, add_generation_prompt, template, **variables)
        return self.encode(text, special=True)

    @abc.abstractmethod
    def token_text(self, token_id: int) -> str:
        """A token as its vocabulary spells it, special ones too."""

    @staticmethod
    def _leading(content: bytes, most: int) -> int:
        return min(most, len(content) - len(content.lstrip(b" "))) if most else 0

    def _special_texts(self) -> dict[str, str]:
        ids = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "cls": self.cls_id, "sep": self.sep_id,
               "mask": self.mask_id}
        texts = {f"{role}_token": self.token_text(i) for role, i in ids.items() if i is not None}
        return texts | ({"pad_token": self.token_text(self.pad_id)} if self.files.named().get("pad") else {})

    def _said_elsewhere(self) -> dict[str, bytes]:
        if not self.files.model_config:
            return {}
        made: dict[str, bytes] = {}
        named, texts = self.files.named(), self._special_texts()
        learnt = {name: text for name, text in texts.items() if name.removesuffix("_token") not in named}
        if learnt:
            made[folder.SPECIALS] = storage.to_json(self.files.fields(folder.SPECIALS) | learnt)
        generation = self.files.fields(folder.GENERATION)
        if generation.get("eos_token_id") is None and self.end_ids != (self.eos_id,) and self.end_ids:
            made[folder.GENERATION] = storage.to_json((generation or {"_from_model_config": True})
                                                      | {"eos_token_id": list(self.end_ids)})
        return made


class StreamDecoder:
    """Decodes tokens one at a time without ever splitting a character.

    The pieces of text that `push` and `flush` return, joined, are `tokenizer.decode` of the same tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stripped = tokenizer.stripped_spaces

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the characters it completes, which may be none."""
        content = self._tokenizer.token_bytes(token_id)
        if self._stripped and content:  # still at the beginning
            count = Tokenizer._leading(content, self._stripped)
            content = content[count:]
            self._stripped = 0 if content else self._stripped - count
        return self._decoder.decode(content)

    def flush(self) -> str:
        """Ends the text: a character left incomplete comes out as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def special_ids(files: folder.Files, ids: Mapping[str, int], vocab_size: int) -> dict[str, int | None]:
    """The id of each role: as the tokenizer's files name it, else by config.json, else by the family's custom.

    Args:
      files: the tokenizer's.
      ids: every token's id by its text.
      vocab_size: number of ids.
    Raises:
      UserError: a file names a token that the vocabulary lacks.
    """
    named, custom = files.named(), _FAMILIES.get(files.family, {})
    found: dict[str, int | None] = {}
    for role in folder.ROLES:
        if role in named:
            text = named[role]
            if text is not None and text not in ids:
                raise UserError(f"the files name {text!r:.80} as {role}_token, and the vocabulary has no such token")
            found[role] = None if text is None else ids[text]
        else:
            found[role] = files.config_id(role, vocab_size)
            if found[role] is None and role in custom:
                found[role] = ids.get(custom[role])
    return found


def bert_special_ids(ids: Mapping[str, int]) -> dict[str, int]:
    """BERT's special tokens, as far as a vocabulary has them."""
    return {role: ids[text] for role, text in _BERT.items() if text in ids}
