"""Folders with tiny tokenizers of every kind, trained on the spot, as checkpoints carry them."""

from __future__ import annotations

import base64
import io
import json
import pathlib

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm_jax.data.tokenizers.decoding import byte_alphabet

CORPUS = ["The quick brown fox jumps over the lazy dog.\n", "def main(argv):\n    return sum(x for x in argv)\n\n",
          "满纸荒唐言，一把辛酸泪。都云作者痴，谁解其中味？\n", "it's we're I'll don't  1234 5,678\t\r\n",
          "naïve café 🙂🎉 👩‍👩‍👧 наука\n"] * 20
# Mixed English, Chinese, code, emoji and white space; the last are what only an attacker or a test would write.
TEXTS = ["", " ", "  ", "\n", "a", " a", "  two  spaces ", "The fox\n\n\n\tand the   dog's  1234567 eyes", CORPUS[1],
         "满纸 荒唐言，and so it goes！　全角", "🙂👩‍👩‍👧🎉 🇨🇳 e\u0301 é \u00a0 \u200b ﬁ Ⅷ",
         "if x:\r\n\treturn {'a': [1,2]}  # 注释 🙂\r\n", "unseen: ỳ 𝔘 ☃ ▁ ▁▁x \x00\x01",
         "trailing  \n  "]
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def write(folder: pathlib.Path, **files: object) -> pathlib.Path:
    """Writes JSON objects, bytes or text as `name__json` → name.json and so on (two underscores for the dot)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        content = value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(
            value, ensure_ascii=False)).encode()
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def byte_level(folder: pathlib.Path) -> pathlib.Path:
    """As Llama 3 and Qwen: BPE over bytes, chat markers, a tool marker that is not special, BOS by the template."""
    t = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, show_progress=False,
                                                     initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.add_special_tokens(["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"])
    t.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    begin = t.token_to_id("<|begin|>")
    t.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    return write(folder, tokenizer__json=t.to_str(), generation_config__json={
        "eos_token_id": [t.token_to_id("<|im_end|>"), t.token_to_id("<|end|>")], "do_sample": True, "top_p": 0.9},
        tokenizer_config__json={"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>",
                                "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}})


def metaspace(folder: pathlib.Path) -> pathlib.Path:
    """As Llama 2's tokenizer.json: BPE over characters with byte fallback and a space in front."""
    t = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False))
    data = json.loads(t.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    data["post_processor"] = json.loads(processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]).__getstate__())
    return write(folder, tokenizer__json=data, special_tokens_map__json={
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def unigram(folder: pathlib.Path) -> pathlib.Path:
    """As T5's tokenizer.json: Unigram, normalised, its control tokens among the model's own pieces."""
    t = tokenizers.Tokenizer(models.Unigram())
    t.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    t.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    t.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    t.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    t.add_special_tokens([AddedToken(f"<extra_id_{i}>", special=True, normalized=False) for i in (1, 0)])
    t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return write(folder, tokenizer__json=t.to_str(), tokenizer_config__json={
        "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
        "additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"]})


def wordpiece(folder: pathlib.Path) -> pathlib.Path:
    """As BERT's: nothing beside it names its special tokens."""
    t = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer(lowercase=True)
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    t.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    t.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return write(folder, tokenizer__json=t.to_str())


def sentencepiece_model(**options: object) -> bytes:
    """A serialized model trained with the given options on top of stock ones."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2,
                                             **{"vocab_size": 420, "hard_vocab_limit": False, **options})
    return model.getvalue()


def llama(folder: pathlib.Path, **config: object) -> pathlib.Path:
    """As Llama 2's tokenizer.model, with a token added for padding and one for tools."""
    model = sentencepiece_model(model_type="bpe", byte_fallback=True, split_digits=True, vocab_size=450,
                                normalization_rule_name="identity", remove_extra_whitespaces=False)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    return write(folder, tokenizer__model=model, tokenizer_config__json={
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "added_tokens_decoder": {
            "0": {"content": "<unk>", "special": True}, "1": {"content": "<s>", "special": True},
            "2": {"content": "</s>", "special": True}, str(size): {"content": "<pad>", "special": True},
            str(size + 1): {"content": "<tool>", "special": False}}, **config})


def t5(folder: pathlib.Path) -> pathlib.Path:
    """As T5's spiece.model: Unigram, normalised, white space joined, no byte fallback."""
    model = sentencepiece_model(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, vocab_size=250)
    return write(folder, spiece__model=model, tokenizer_config__json={
        "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})


def ranks_of(folder: pathlib.Path) -> dict[bytes, int]:
    """The ranks of a byte-level tokenizer.json's merges, whose ids they are."""
    alphabet = byte_alphabet()
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return {bytes(alphabet[c] for c in text): i for text, i in vocab.items()}


def ranked(folder: pathlib.Path, ranks: dict[bytes, int]) -> pathlib.Path:
    """A rank file called tokenizer.model, as Llama 3's, and what tokenizer_config.json must say of an unknown one."""
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    size = len(ranks)
    return write(folder, tokenizer__model=lines, tokenizer_config__json={
        "pat_str": PATTERN, "bos_token": "<|begin|>", "eos_token": "<|end|>", "add_bos_token": True,
        "added_tokens_decoder": {str(size): {"content": "<|begin|>", "special": True},
                                 str(size + 3): {"content": "<|end|>", "special": True}}})


JSON_KINDS = {"byte_level": byte_level, "metaspace": metaspace, "unigram": unigram, "wordpiece": wordpiece}
SENTENCEPIECE_KINDS = {"llama": llama, "t5": t5}
