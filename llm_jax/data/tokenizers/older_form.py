"""Tokenizers in the form from before `tokenizer.json`: vocabulary and merges each in a file of its own.

How text is split and normalised is in no file there; the tokenizer's class in transformers decides it. The classes
known here are made into the `tokenizer.json` that transformers would make of them.
"""

from __future__ import annotations

import io

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llm_jax.data.tokenizers import folder, known_ranks
from llm_jax.errors import UserError


def tokenizer_json(files: folder.Files) -> bytes:
    """The `tokenizer.json` of a tokenizer that lacks one.

    Args:
      files: those of the older form, and what lies beside them.
    Raises:
      UserError: its class is none of the known ones, or a file is damaged.
    """
    names = [name for name in folder.OLDER if name in files.contents]
    try:
        if files.family in ("gpt2", "qwen2") and {"vocab.json", "merges.txt"} <= set(names):
            return _byte_level(files).to_str().encode()
        if files.family == "bert" and "vocab.txt" in names:
            return _wordpiece(files).to_str().encode()
    except UserError:
        raise
    except Exception as error:  # the library's own, of no particular type
        raise UserError(f"{files.where}: the tokenizers library does not read {', '.join(names)}: {error}") from error
    raise UserError(
        f"{files.where}: there is no {folder.JSON}, and the older form ({', '.join(names)}) is read only for "
        "GPT2Tokenizer and Qwen2Tokenizer (vocab.json and merges.txt) and BertTokenizer (vocab.txt); of the class, "
        f"{folder.CONFIG} and config.json say {files.family or 'nothing'!r}. Make the new form with transformers: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")


def _byte_level(files: folder.Files) -> tokenizers.Tokenizer:
    merges = []
    for number, line in enumerate(_text(files, "merges.txt").splitlines(), 1):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise UserError(f"{files.beside('merges.txt')}: line {number} is no pair of tokens: {line!r:.80}")
        merges.append((pair[0], pair[1]))
    vocab = files.fields("vocab.json")
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in vocab.values()):
        raise UserError(f"{files.beside('vocab.json')} must map tokens to their ids")
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    spaced = files.flag("add_prefix_space", False)
    if files.family == "gpt2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    else:
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(known_ranks.QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    return made


def _wordpiece(files: folder.Files) -> tokenizers.Tokenizer:
    vocab = {line.rstrip("\n"): i for i, line in enumerate(io.StringIO(_text(files, "vocab.txt"), newline=None))}
    named = files.named()
    unknown, begin, end = (named.get(role) or default for role, default in
                           (("unk", "[UNK]"), ("cls", "[CLS]"), ("sep", "[SEP]")))
    for text in (unknown, begin, end):
        if text not in vocab:
            raise UserError(f"{files.beside('vocab.txt')} lacks BERT's token {text!r:.80}")
    strip = None if files.config.get("strip_accents") is None else files.flag("strip_accents", False)
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    made.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=files.flag("tokenize_chinese_chars", True), strip_accents=strip,
        lowercase=files.flag("do_lower_case", True))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    made.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, vocab[begin]), (end, vocab[end])])
    return made


def _text(files: folder.Files, name: str) -> str:
    try:
        return files.contents[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{files.beside(name)} is not UTF-8 text: {error.reason}") from error
