"""The lossless SentencePiece tokenizers of this project (`data.tokenizer_training`) in the form `transformers` loads.

`transformers` would read `tokenizer.model` alone as Llama's, which puts a space in front of every text. A
`tokenizer.json` says exactly what ours does: spaces are spelt "▁", nothing else is touched, and pairs are merged in the
order in which they were learnt. One thing it can't say: the character "▁" itself, which we spell in bytes, means a
space there.
"""

from __future__ import annotations

from typing import Any

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.data.tokenizers import folder
from llm_jax.errors import UserError

_BPE = 2  # TrainerSpec.ModelType
_NORMAL = 1  # ModelProto.SentencePiece.Type
_SPACE, _MARK = " ", "\u2581"


def is_lossless(tokenizer: Tokenizer) -> bool:
    """Whether it is a SentencePiece model of the kind that this project trains."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    if tokenizer.files.name != folder.SENTENCEPIECE:
        return False
    model = messages.ModelProto.FromString(tokenizer.files.main)  # type: ignore[attr-defined]
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    return (trainer.model_type == _BPE and trainer.byte_fallback and not normalizer.precompiled_charsmap
            and not normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces)


def files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """`tokenizer.json` and `tokenizer_config.json` as objects, by name.

    Raises:
      UserError: the tokenizer is no SentencePiece model of the kind that this project trains.
    """
    from sentencepiece import sentencepiece_model_pb2 as messages

    if not is_lossless(tokenizer):
        raise UserError(f"{tokenizer.files.where} is not lossless, so no tokenizer.json can be made for it; put one "
                        f"beside it")
    model = messages.ModelProto.FromString(tokenizer.files.main)  # type: ignore[attr-defined]
    pieces = [piece.piece for piece in model.pieces]
    learnt = sorted((i for i, piece in enumerate(model.pieces) if piece.type == _NORMAL),
                    key=lambda i: (-model.pieces[i].score, i))
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id,
             "pad_token": tokenizer.pad_id}
    special = {name: pieces[i] for name, i in roles.items() if i is not None}
    begin = special["bos_token"]
    return {
        folder.JSON: {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": pieces[i], "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True} for i in sorted(tokenizer.special_ids)],
            "normalizer": {"type": "Replace", "pattern": {"String": _SPACE}, "content": _MARK},
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [_named(begin, 0), _text("A", 0)],
                "pair": [_named(begin, 0), _text("A", 0), _named(begin, 1), _text("B", 1)],
                "special_tokens": {begin: {"id": begin, "ids": [tokenizer.bos_id], "tokens": [begin]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": _MARK}, "content": _SPACE},
                {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": special["unk_token"],
                      "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                      "byte_fallback": True, "ignore_merges": False,
                      "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": _merges(pieces, learnt)},
        },
        folder.CONFIG: special | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                                  "add_bos_token": True, "add_eos_token": False,
                                  "model_input_names": ["input_ids", "attention_mask"]},
    }


def _merges(pieces: list[str], learnt: list[int]) -> list[list[str]]:
    """Every pair that makes a learnt piece, best pieces first: SentencePiece ranks a merge by what it makes."""
    rank = {pieces[i]: order for order, i in enumerate(learnt)}
    merges = []
    for i in learnt:
        piece = pieces[i]
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in rank and pair[1] in rank]
        merges += [list(pair) for pair in sorted(pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]]))]
    return merges


def _named(token: str, kind: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": kind}}


def _text(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}
