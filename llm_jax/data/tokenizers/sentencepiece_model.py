"""SentencePiece models: the lossless ones that this project trains, and those of published checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import sentencepiece

from llm_jax.data.tokenizer import Tokenizer, special_ids
from llm_jax.data.tokenizers import folder
from llm_jax.data.tokenizers.cutting import Cutter
from llm_jax.data.tokenizers.folder import Added
from llm_jax.errors import UserError

# SentencePiece writes spaces as U+2581 inside its pieces and reads a literal U+2581 back as a space. In a tokenizer of
# this project the character itself is spelt with the byte tokens of its UTF-8 form; others do as SentencePiece does.
_SPACE_MARK = "\u2581"
# ModelProto.trainer_spec.required_chars = "▁" on the wire, which training here sets and hardly anyone else's has.
_OURS = b"\xa2\x02\x03" + _SPACE_MARK.encode()
# ModelProto.normalizer_spec.add_dummy_prefix = false: behind a serialized model it overrides the model's own.
_NO_PREFIX = b"\x1a\x02\x18\x00"
_T5_EXTRA_IDS = 100
_UNUSUAL = "Ａ①ﬁ\t\u00a0e\u0301"  # which every rule of normalisation changes


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model and the tokens added to it.

    One made by `tokenizer_training.train_tokenizer` is lossless: `decode(encode(text)) == text` for every valid Unicode
    text. Others are as their makers chose: many put a space in front, which decoding takes away again, and T5's also
    normalises characters and joins white space.
    """

    def __init__(self, files: folder.Files) -> None:
        """Makes a tokenizer of a serialized SentencePiece model and the files beside it.

        Raises:
          UserError: the bytes are not a SentencePiece model, or the files beside it do not fit it.
        """
        self._model = files.main
        self._processor = processor = _processor(self._model)
        ids = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
        added = _added_tokens(files, ids, processor.vocab_size())
        size = max(processor.vocab_size(), max(added, default=-1) + 1)
        self._texts = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
        self._texts += [""] * (size - len(self._texts))
        for i, token in added.items():
            self._texts[i] = token.content
        table, byte_ids, control = _token_table(processor, size)
        for i, token in added.items():
            table[i] = b"" if token.special else token.content.replace(_SPACE_MARK, " ").encode()
        roles = special_ids(files, ids | {token.content: i for i, token in added.items()}, size)
        named = files.named()
        for role, value in (("bos", processor.bos_id()), ("eos", processor.eos_id()), ("unk", processor.unk_id()),
                            ("pad", processor.pad_id())):
            if role not in named and value >= 0:
                roles[role] = value
        control |= {i for i, token in added.items() if token.special} | {i for i in roles.values() if i is not None}
        for i in control:
            table[i] = b""
        leading = processor.decode_pieces([_SPACE_MARK, _SPACE_MARK, "a"]).count(" ")
        # Where white space is joined, all that is in front goes, else the one space that encoding put there.
        strips = (sys.maxsize, 1, 0)[leading]
        changes_nothing = processor.normalize(_UNUSUAL).lstrip(_SPACE_MARK) == _UNUSUAL
        super().__init__(files, table, roles, control, strips,
                         spells_all=changes_nothing and strips <= 1 and len(byte_ids) == 256)

        self._space_mark_ids = [byte_ids[b] for b in _SPACE_MARK.encode()] if _OURS in self._model and (
            len(byte_ids) == 256 and strips == 0) else None
        # Behind a special token a space is put in front of the text again only if the tokenizer is a "legacy" one.
        self._always_prefixed = files.flag("legacy", False) or strips > 1
        self._unprefixed: sentencepiece.SentencePieceProcessor | None = None
        meant = {i: token for i, token in added.items() if not token.special}
        spelt = {i: Added(self._texts[i], True) for i in sorted(control) if self._texts[i] and i not in added}
        self._everything = Cutter([*added.items(), *spelt.items()])
        # Pieces that the model itself finds in any text, though they are control tokens: they are broken in two.
        found = [i for i in control if i < processor.vocab_size() and len(self._texts[i]) > 1
                 and not (processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i))]
        self._harmless = Cutter([*meant.items(), *((-1 - i, Added(self._texts[i], True)) for i in found)])
        is_t5 = files.family.endswith("t5")
        if self.bos_id is not None and files.flag("add_bos_token", not is_t5):
            self.prefix_ids = (self.bos_id,)
        if self.eos_id is not None and files.flag("add_eos_token", is_t5):
            self.suffix_ids = (self.eos_id,)

    @classmethod
    def of_model(cls, model: bytes) -> SentencePieceTokenizer:
        """The tokenizer of a serialized model with nothing beside it."""
        name = folder.SENTENCEPIECE
        return cls(folder.Files(name, name, {name: model}))

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for part in (self._everything if special else self._harmless).cut(text):
            if isinstance(part, tuple):
                ids += self._encode_text(part[1], begins=part[0] == 0)
            elif part >= 0:
                ids.append(part)
            else:
                content = self._texts[-1 - part]
                ids += self._encode_text(content[:1], begins=not ids) + self._encode_text(content[1:], begins=False)
        return ids

    def _encode_text(self, text: str, begins: bool) -> list[int]:
        processor = self._processor if begins or self._always_prefixed else self._without_prefix()
        content = text.encode()
        if self._space_mark_ids is None or _SPACE_MARK not in text:
            return processor.encode(content)
        first, *others = content.split(_SPACE_MARK.encode())
        ids = processor.encode(first)
        for part in others:
            ids += self._space_mark_ids
            ids += processor.encode(part)
        return ids

    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        if not self.stripped_spaces:
            return self._processor
        if self._unprefixed is None:
            self._unprefixed = _processor(self._model + _NO_PREFIX)
        return self._unprefixed

    def token_text(self, token_id: int) -> str:
        return self._texts[token_id] if token_id < self.vocab_size else ""


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = processor.LoadFromSerializedProto(model)
    except Exception as error:  # sentencepiece raises bare RuntimeError and its own subclasses of it
        raise UserError(f"not a SentencePiece model: {error}") from error
    if not loaded or processor.vocab_size() == 0:
        raise UserError("not a SentencePiece model: it holds no tokens")
    return processor


def _token_table(processor: sentencepiece.SentencePieceProcessor,
                 size: int) -> tuple[list[bytes], dict[int, int], set[int]]:
    """The bytes of every token, the id of every byte token, and the tokens that stand for no text."""
    table: list[bytes] = [b""] * size
    byte_ids: dict[int, int] = {}
    control: set[int] = set()
    for i in range(processor.vocab_size()):
        piece = processor.id_to_piece(i)
        if processor.is_byte(i):
            value = int(piece[3:5], 16)  # spelt "<0xE2>"
            byte_ids[value] = i
            table[i] = bytes([value])
        elif processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            control.add(i)
        else:
            table[i] = piece.replace(_SPACE_MARK, " ").encode()
    return table, byte_ids, control


def _added_tokens(files: folder.Files, ids: dict[str, int], vocab_size: int) -> dict[int, Added]:
    added = files.added(vocab_size)
    for i, token in added.items():
        if ids.get(token.content, i) != i:
            raise UserError(f"{files.beside(folder.CONFIG)}: added token {token.content!r:.80} has id {i}, and the "
                            f"model gives it id {ids[token.content]}")
    if not added and files.family.endswith("t5"):
        # T5's sentinels are not in its model: the last id is the first one's.
        count = files.config.get("extra_ids", _T5_EXTRA_IDS)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 10_000:
            raise UserError(f"{files.beside(folder.CONFIG)}: extra_ids must be a number of tokens, not {count!r:.40}")
        added = {vocab_size + count - 1 - k: Added(f"<extra_id_{k}>", True) for k in range(count)}
    known = set(ids) | {token.content for token in added.values()}
    _check_known(files, files.more_special(), known)
    for text in files.more_special():
        if text in ids:
            added.setdefault(ids[text], Added(text, True))
    return added


def _check_known(files: folder.Files, texts: Iterable[str], known: set[str]) -> None:
    missing = next((text for text in texts if text not in known), None)
    if missing is not None:
        raise UserError(f"{files.beside(folder.CONFIG)} names the special token {missing!r:.80}, and the vocabulary "
                        "has no such token")
