"""Tokenizers against live transformers: ids, prompts, text and chats, on mixed text drawn afresh."""

from __future__ import annotations

import random

import pytest
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, T5Tokenizer

from llm_jax.data.tokenizer import StreamDecoder, Tokenizer
from tests.data import chat_templates as chats
from tests.data import tokenizer_kinds as kinds

_PARTS = ["The quick", "fox", "don't", "WE'LL", "naïve", "满纸荒唐言", "，", "一把", "。", "def f(x):", "return", "  ",
          "\n", "\n\n", "\t", "    ", "🙂", "👩‍👩‍👧", "🇨🇳", "e\u0301", "12", "3456789", "0x1F", "<tool>", "==", "!?",
          "…", "\r\n", "ﬁ", "\u3000", "наука", "¿"]


def texts(seed: int, count: int = 300) -> list[str]:
    """Mixed English, Chinese, code, emoji and white space, and any characters at all."""
    draw = random.Random(seed)
    mixed = [draw.choice(("", " ")).join(draw.choices(_PARTS, k=draw.randint(1, 30))) for _ in range(count)]
    anything = ["".join(chr(draw.choice((draw.randrange(32, 0x250), draw.randrange(0x3000, 0xD7FF),
                                         draw.randrange(0x1F300, 0x1FA00)))) for _ in range(draw.randint(1, 40)))
                for _ in range(count // 3)]
    return mixed + anything + kinds.TEXTS


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join([decoder.push(i) for i in ids] + [decoder.flush()])


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "wordpiece"])
def test_tokenizer_json(kind, tmp_path, seed):
    ours = Tokenizer.load(kinds.JSON_KINDS[kind](tmp_path))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path, split_special_tokens=True)
    assert (ours.vocab_size, ours.adds_bos) == (len(theirs), theirs.bos_token_id is not None)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    controls = [ours.token_text(i) for i in sorted(ours.special_ids)]
    for i, text in enumerate(texts(seed)):
        ids = ours.encode(text)
        assert ids == plain.encode(text, add_special_tokens=False)
        assert ours.prompt_ids(text) == plain.encode(text)
        written = text + controls[i % len(controls)] + text
        assert ours.encode(written, special=True) == theirs.encode(written, add_special_tokens=False)
        assert ours.decode(ids) == streamed(ours, ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_t5(tmp_path, seed):
    """transformers builds this class anew from the file's vocabulary: on text that its normaliser leaves alone."""
    ours = Tokenizer.load(kinds.unigram(tmp_path))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert T5Tokenizer.from_pretrained(tmp_path).eos_token_id == ours.eos_id
    for text in texts(seed):
        assert ours.prompt_ids(text) == theirs.encode(text)
        ids = ours.encode(text)
        assert ours.decode(ids) == streamed(ours, ids) == theirs.decode(ids, skip_special_tokens=True)


def test_gpt2_with_nothing_but_config_json(tmp_path, seed):
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder, library.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    library.train_from_iterator(kinds.CORPUS, trainers.BpeTrainer(
        vocab_size=450, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"]))
    kinds.write(tmp_path, tokenizer__json=library.to_str(), config__json={"model_type": "gpt2", "eos_token_id": 0,
                                                                         "bos_token_id": 0})
    ours, theirs = Tokenizer.load(tmp_path), GPT2Tokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.end_ids) == (theirs.bos_token_id, theirs.eos_token_id, (0,))
    for text in texts(seed):
        assert ours.prompt_ids(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("template", [template for template, _ in chats.ALL.values()], ids=chats.ALL)
def test_chats(template, tmp_path, seed):
    kinds.byte_level(tmp_path)
    kinds.write(tmp_path, chat_template__jinja=template)
    ours, theirs = Tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    draw, drawn = random.Random(seed), texts(seed, 60)
    for turns in range(1, 8):
        chat = [{"role": ("user", "assistant")[i % 2], "content": draw.choice(drawn)} for i in range(turns)]
        if draw.random() < 0.5:
            chat.insert(0, {"role": "system", "content": draw.choice(drawn)})
        for tools in (None, chats.TOOLS):
            for prompt in (True, False):
                wanted = theirs.apply_chat_template(chat, tools=tools, add_generation_prompt=prompt, tokenize=False)
                assert ours.render_chat(chat, tools, prompt) == wanted
                wanted = theirs.apply_chat_template(chat, tools=tools, add_generation_prompt=prompt, tokenize=True,
                                                    return_dict=False)
                assert ours.encode_chat(chat, tools, prompt) == wanted
