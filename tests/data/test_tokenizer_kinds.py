"""Tokenizers of published checkpoints: the ids of the libraries they were made with; text back, streamed or whole."""

from __future__ import annotations

import hashlib
import json
import unicodedata

import pytest
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm_jax.data.tokenizer import StreamDecoder, Tokenizer
from llm_jax.data.tokenizers import known_ranks
from llm_jax.data.tokenizers.decoding import Spelling
from llm_jax.errors import UserError
from llm_jax.interop.huggingface import load_tokenizer, token_fields
from tests.data import tokenizer_kinds as kinds
from tests.data.tokenizer_kinds import TEXTS

EVERY = [*kinds.JSON_KINDS, *kinds.SENTENCEPIECE_KINDS, "ranks"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("kinds")
    made = {name: make(base / name) for name, make in (kinds.JSON_KINDS | kinds.SENTENCEPIECE_KINDS).items()}
    made["ranks"] = kinds.ranked(base / "ranks", kinds.ranks_of(made["byte_level"]))
    return made


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: Tokenizer.load(folder) for name, folder in folders.items()}


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return "".join([decoder.push(i) for i in ids] + [decoder.flush()])


@pytest.mark.parametrize("kind", kinds.JSON_KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(), st.text("ab 天\n▁é🙂")))
def test_tokenizer_json_is_the_tokenizers_library(folders, loaded, kind, text):
    assume(not any(loaded[kind].token_text(i) in text for i in loaded[kind].special_ids))  # the library finds them
    library = tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    ids = library.encode(text, add_special_tokens=False).ids
    assert loaded[kind].encode(text) == ids
    assert loaded[kind].prompt_ids(text) == library.encode(text).ids
    assert loaded[kind].decode(ids) == library.decode(ids) == stream(loaded[kind], ids)


@pytest.mark.parametrize("kind", kinds.SENTENCEPIECE_KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(), st.text("ab 天\n▁é🙂")))
def test_sentencepiece_is_sentencepiece(folders, loaded, kind, text):
    assume("<tool>" not in text)
    library = sentencepiece.SentencePieceProcessor(model_proto=loaded[kind].files.main)
    ids = library.encode(text)
    assert loaded[kind].encode(text) == ids
    known = [i for i in ids if i != library.unk_id()]  # for which SentencePiece writes " ⁇ "
    assert loaded[kind].decode(ids) == library.decode(known) == stream(loaded[kind], ids)


@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(), st.text("ab 天\n▁é🙂")))
def test_ranks_are_tiktoken_and_the_byte_level_bpe_they_came_from(folders, loaded, text):
    assume("<tool>" not in text)
    ranks = kinds.ranks_of(folders["byte_level"])
    special = {"<|begin|>": len(ranks), "<|end|>": len(ranks) + 3}
    library = tiktoken.Encoding("x", pat_str=kinds.PATTERN, mergeable_ranks=ranks, special_tokens=special)
    ids = loaded["ranks"].encode(text)
    assert ids == library.encode(text, disallowed_special=()) == loaded["byte_level"].encode(text)
    assert loaded["ranks"].decode(ids) == text == stream(loaded["ranks"], ids)
    written = f"<|begin|>{text}<|end|>"
    assert loaded["ranks"].encode(written, special=True) == library.encode(written, allowed_special="all")
    assert loaded["ranks"].vocab_size == library.n_vocab


@pytest.mark.parametrize("kind", EVERY)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_streaming_joins_to_decode_for_any_tokens(loaded, kind, data):
    ids = data.draw(st.lists(st.integers(0, loaded[kind].vocab_size + 3)))
    assert stream(loaded[kind], ids) == loaded[kind].decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "ranks", "metaspace", "llama"])
def test_kinds_that_spell_in_bytes_lose_nothing(loaded, kind):
    tokenizer = loaded[kind]
    for text in TEXTS:
        if "▁" in text and kind in ("metaspace", "llama"):
            continue  # there it is the space
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        spelt = b"".join(map(tokenizer.token_bytes, ids))
        assert spelt == (b" " if tokenizer.stripped_spaces and text else b"") + text.encode()
        assert tokenizer.byte_lengths[ids].sum() == len(spelt)


@pytest.mark.parametrize("kind", EVERY)
def test_how_much_text_a_token_can_stand_for(loaded, kind):
    """What the server refuses unread by: never more tokens than there may be."""
    tokenizer = loaded[kind]
    assert (tokenizer.max_token_bytes is None) == (kind in ("unigram", "wordpiece", "t5"))
    if tokenizer.max_token_bytes is not None:
        for text in (*TEXTS, " " * 999, "\U0001f0ff" * 99, "字" * 99):
            assert len(tokenizer.encode(text)) * tokenizer.max_token_bytes >= len(text.encode())


def test_a_million_spaces_do_not_end_the_process(loaded):
    text = f"a{' ' * 1_000_001}b" + "\n" * 1_000_000
    assert loaded["ranks"].decode(loaded["ranks"].encode(text)) == text


def test_wordpiece_spells_words_with_a_space_before_them(loaded):
    tokenizer = loaded["wordpiece"]
    ids = tokenizer.encode("The lazy fox jumps.")
    assert tokenizer.decode(ids) == "the lazy fox jumps."
    assert tokenizer.token_bytes(ids[0]) == b" the"
    piece = next(t for t in tokenizer._texts if t.startswith("##"))
    assert tokenizer.token_bytes(tokenizer._texts.index(piece)) == piece[2:].encode()


@pytest.mark.parametrize("kind", EVERY)
def test_no_text_gives_a_control_token_unless_it_is_meant(loaded, kind):
    tokenizer = loaded[kind]
    control = sorted(tokenizer.special_ids - {tokenizer.unk_id})
    assert control
    for i in control:
        text = tokenizer.token_text(i)
        for written in (text, f"a {text} b", f"a{text}b", f"{text}{text}"):
            assert not set(control) & set(tokenizer.encode(written)), text
            assert i in tokenizer.encode(written, special=True), text
        assert tokenizer.decode([i]) == "" and tokenizer.token_bytes(i) == b"" and tokenizer.byte_lengths[i] == 0
    assert max(tokenizer.encode(" ".join(TEXTS))) < tokenizer.text_vocab_size <= tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "wordpiece"])
def test_special_tokens_that_are_meant_are_the_librarys(folders, loaded, kind):
    library = tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    for i in loaded[kind].special_ids:
        text = f"fox {loaded[kind].token_text(i)} the dog"
        assert loaded[kind].encode(text, special=True) == library.encode(text, add_special_tokens=False).ids


def test_added_tokens_that_are_not_special_are_found_in_any_text(loaded):
    for kind in ("byte_level", "llama"):
        ids = loaded[kind].encode("x<tool>y")
        assert [loaded[kind].token_text(i) for i in ids].count("<tool>") == 1
        assert loaded[kind].decode(ids) == "x<tool>y"


def test_prompts_begin_as_the_model_expects_and_never_twice(loaded):
    bos = {kind: loaded[kind].bos_id for kind in EVERY}
    for kind in ("byte_level", "metaspace", "llama", "ranks"):
        t = loaded[kind]
        assert t.adds_bos and t.prompt_ids("fox") == [bos[kind], *t.encode("fox")]
        begin = t.token_text(bos[kind])
        assert t.prompt_ids(begin + "fox", special=True).count(bos[kind]) == 1
        assert t.prompt_ids(begin + "fox").count(bos[kind]) == 1  # there it is plain text behind the one BOS
    assert loaded["t5"].prompt_ids("fox") == [*loaded["t5"].encode("fox"), 1] and not loaded["t5"].adds_bos
    assert loaded["wordpiece"].prompt_ids("fox") == [2, *loaded["wordpiece"].encode("fox"), 3]
    assert loaded["wordpiece"].document_ids("fox") == loaded["wordpiece"].prompt_ids("fox")
    assert loaded["llama"].document_ids("fox") == [1, *loaded["llama"].encode("fox"), 2]
    assert loaded["unigram"].document_ids("fox") == [1, *loaded["unigram"].encode("fox"), 1]


@pytest.mark.parametrize("add_bos", [True, False])
def test_tokenizer_config_decides_over_bos(folders, tmp_path, add_bos):
    folder = kinds.write(tmp_path, tokenizer__json=(folders["byte_level"] / "tokenizer.json").read_bytes(),
                         tokenizer_config__json={"bos_token": "<|begin|>", "add_bos_token": add_bos})
    assert Tokenizer.load(folder).adds_bos is add_bos


def test_special_and_end_tokens_come_from_the_files(loaded):
    t = loaded["byte_level"]
    name = {t.token_text(i): i for i in t.special_ids}
    assert (t.bos_id, t.eos_id, t.unk_id) == (name["<|begin|>"], name["<|im_end|>"], None)
    assert t.end_ids == (name["<|im_end|>"], name["<|end|>"]) and t.pad_id == t.eos_id
    t = loaded["wordpiece"]
    assert (t.pad_id, t.unk_id, t.cls_id, t.sep_id, t.mask_id, t.bos_id, t.eos_id) == (0, 1, 2, 3, 4, None, None)
    t = loaded["llama"]
    assert t.token_text(t.pad_id) == "<pad>" and t.pad_id == t.vocab_size - 2 and t.end_ids == (2,)
    t = loaded["t5"]
    assert t.token_text(t.vocab_size - 1) == "<extra_id_0>" and t.vocab_size == len(t._texts)
    assert (t.bos_id, t.eos_id, t.pad_id, t.unk_id) == (None, 1, 0, 2)
    t = loaded["ranks"]
    assert t.vocab_size == t.eos_id + 1 and t.token_bytes(t.eos_id - 1) == b""


def test_behind_a_special_token_only_legacy_tokenizers_put_a_space(loaded, folders, tmp_path):
    new, old = loaded["llama"], Tokenizer.load(kinds.llama(tmp_path / "old", legacy=True))
    assert new.decode(new.encode("<s>fox</s>fox", special=True)) == "foxfox"
    assert old.decode(old.encode("a</s>fox", special=True)) == "a fox"
    assert new.encode("fox", special=True) == old.encode("fox")


@pytest.mark.parametrize("kind", EVERY)
def test_saved_files_are_the_same_bytes_and_load_the_same(folders, loaded, kind, tmp_path):
    (tmp_path / "tokenizer.json").write_text("left by another")
    (tmp_path / "x.tiktoken").write_text("left by another")
    loaded[kind].save(tmp_path)
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()}
    assert files == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folders[kind].iterdir()}
    again = Tokenizer.load(tmp_path)
    assert [again.prompt_ids(t) for t in TEXTS] == [loaded[kind].prompt_ids(t) for t in TEXTS]
    assert again.end_ids == loaded[kind].end_ids and again.fingerprint == loaded[kind].fingerprint


def test_what_only_config_json_says_is_kept(folders, tmp_path):
    """GPT-2's folder: nothing but config.json and the class names its end token."""
    source = kinds.write(tmp_path / "hf", tokenizer__json=(folders["byte_level"] / "tokenizer.json").read_bytes(),
                         config__json={"model_type": "gpt2", "eos_token_id": [3, 4], "bos_token_id": 3,
                                       "pad_token_id": 10**6})
    t = Tokenizer.load(source)
    assert (t.bos_id, t.eos_id, t.end_ids) == (3, 3, (3, 4))
    t.save(tmp_path / "run")
    again = Tokenizer.load(tmp_path / "run")
    assert (again.bos_id, again.eos_id, again.end_ids) == (3, 3, (3, 4))


@pytest.mark.parametrize("generation, model, expected", [
    ({"eos_token_id": [7, 5]}, {"eos_token_id": 8}, (7, 5)),  # and not the tokenizer's own, where theirs goes on
    ({"eos_token_id": 7}, {}, (7,)),
    ({"top_p": 0.9}, {"eos_token_id": [8, 9]}, (8, 9)),
    (None, {"eos_token_id": 8}, (8,)),
    ({"eos_token_id": None}, {"eos_token_id": 10**6}, None),
    ({"_from_model_config": True, "eos_token_id": 10**6}, {}, None),
    (None, {}, None),
])
def test_the_first_file_that_names_end_tokens_decides_alone(folders, tmp_path, generation, model, expected):
    files = {} if generation is None else {"generation_config__json": generation}
    kinds.write(tmp_path / "hf", tokenizer__json=(folders["byte_level"] / "tokenizer.json").read_bytes(),
                tokenizer_config__json={"eos_token": "<|im_end|>"}, config__json={"model_type": "x"} | model, **files)
    t = Tokenizer.load(tmp_path / "hf")
    assert t.token_text(t.eos_id) == "<|im_end|>" and t.end_ids == (expected or (t.eos_id,))
    assert token_fields(t)["eos_token_id"] in (list(t.end_ids), *t.end_ids)
    t.save(tmp_path / "run")  # where there is no config.json
    assert Tokenizer.load(tmp_path / "run").end_ids == t.end_ids


def older(folders, folder, kind, **files):
    """The older form of a kind's tokenizer.json."""
    model = json.loads((folders[kind] / "tokenizer.json").read_text())["model"]
    vocab = model["vocab"] | ({"<|endoftext|>": len(model["vocab"])} if kind == "byte_level" else {})
    if kind == "wordpiece":
        return kinds.write(folder, vocab__txt="".join(f"{t}\n" for t in sorted(vocab, key=vocab.get)), **files)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return kinds.write(folder, vocab__json=vocab, merges__txt="\n".join(["#version: 0.2", *merges, ""]), **files)


@pytest.mark.parametrize("kind, files", [
    ("byte_level", {"config__json": {"model_type": "gpt2"}}),
    ("wordpiece", {"tokenizer_config__json": {"tokenizer_class": "BertTokenizer"}}),
])
def test_the_older_form_gives_the_ids_of_the_newer(folders, loaded, tmp_path, kind, files):
    t = Tokenizer.load(older(folders, tmp_path / "hf", kind, **files))
    for text in TEXTS:
        assert t.encode(text) == loaded[kind].encode(text)
        assert t.decode(t.encode(text)) == loaded[kind].decode(t.encode(text))
    kinds.write(tmp_path / "run", vocab__json="{}")
    t.save(tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").exists() and not (tmp_path / "run" / "vocab.json").exists()
    again = Tokenizer.load(tmp_path / "run")
    assert [again.prompt_ids(text) for text in TEXTS] == [t.prompt_ids(text) for text in TEXTS]
    assert again.special_ids == t.special_ids
    if kind == "wordpiece":
        assert t.prompt_ids("fox") == loaded[kind].prompt_ids("fox")
        cased = older(folders, tmp_path / "cased", kind, tokenizer_config__json={
            "tokenizer_class": "BertTokenizer", "do_lower_case": False})
        assert t.unk_id in Tokenizer.load(cased).encode("THE") and t.unk_id not in t.encode("THE")
    else:
        assert t.token_text(t.eos_id) == "<|endoftext|>" and t.eos_id not in t.encode("a<|endoftext|>")


def test_the_older_form_of_qwen2_splits_as_its_rank_file(folders, tmp_path):
    t = Tokenizer.load(older(folders, tmp_path, "byte_level",
                             tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer"}))
    library = tiktoken.Encoding("x", pat_str=known_ranks.QWEN, mergeable_ranks=kinds.ranks_of(folders["byte_level"]),
                                special_tokens={})
    for text in TEXTS:
        assert t.encode(text) == library.encode(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("files, says", [
    ({"vocab__json": {"a": 0}, "config__json": {"model_type": "gpt2"}}, r"older form \(vocab.json\).*save_pretrained"),
    ({"vocab__json": {"a": 0}, "merges__txt": "", "tokenizer_config__json": {"tokenizer_class": "RobertaTokenizer"}},
     r"\(vocab.json, merges.txt\).*say 'roberta'.*save_pretrained"),
    ({"vocab__txt": "[UNK]"}, r"\(vocab.txt\).*say 'nothing'"), ({"tekken__json": "{}"}, r"\(tekken.json\)"),
    ({"vocab__txt": "a\n", "config__json": {"model_type": "bert"}}, r"vocab.txt lacks.*UNK"),
    ({"vocab__txt": b"\xff", "config__json": {"model_type": "bert"}}, "vocab.txt is not UTF-8"),
    ({"vocab__json": "{", "merges__txt": "", "config__json": {"model_type": "gpt2"}}, "vocab.json is not JSON"),
    ({"vocab__json": {"a": "b"}, "merges__txt": "", "config__json": {"model_type": "gpt2"}}, "vocab.json must map"),
    ({"vocab__json": {"a": 0}, "merges__txt": "a b c", "config__json": {"model_type": "gpt2"}}, "line 1 is no pair"),
    ({"vocab__json": {"a": 0}, "merges__txt": "a b", "config__json": {"model_type": "gpt2"}}, "library does not read"),
])
def test_an_older_form_that_is_not_read_is_said_and_never_passed_over(tmp_path, files, says):
    kinds.write(tmp_path, **files)
    with pytest.raises(UserError, match=says) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_tokenizer_json_goes_before_tokenizer_model(folders, tmp_path):
    kinds.write(tmp_path, tokenizer__json=(folders["byte_level"] / "tokenizer.json").read_bytes(),
                tokenizer__model=(folders["llama"] / "tokenizer.model").read_bytes())
    assert Tokenizer.load(tmp_path).encode(TEXTS[7]) == Tokenizer.load(folders["byte_level"]).encode(TEXTS[7])
    assert Tokenizer.load(tmp_path / "tokenizer.model").vocab_size < Tokenizer.load(folders["llama"]).vocab_size


def test_rank_files_that_nobody_describes_are_refused(folders, tmp_path):
    content = (folders["ranks"] / "tokenizer.model").read_bytes()
    kinds.write(tmp_path, unknown__tiktoken=content)
    with pytest.raises(UserError, match="none of the known vocabularies.*pat_str"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("size", sorted(known_ranks._KNOWN))
def test_a_vocabulary_is_known_by_its_ids(size):
    known = known_ranks._KNOWN[size]
    ids = [i for i in range(size + 1) if i not in known.special][:size]
    assert known_ranks.find(ids) is known_ranks.find(ids[::-1]) is known
    assert known_ranks.find([*ids[:-1], ids[-1] + 7]) is None and known_ranks.find([i + 1 for i in ids]) is None
    assert known_ranks.find(ids[:-1]) is None and known_ranks.find([*ids, size + 1]) is None
    assert f"| {size:,} |" in known_ranks.__doc__


@pytest.mark.parametrize("name, size", [("r50k_base", 50256), ("p50k_base", 50280), ("cl100k_base", 100256),
                                        ("o200k_base", 199998)])
def test_openais_vocabularies_are_as_tiktoken_describes_them(name, size, monkeypatch):
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    theirs, known = getattr(tiktoken_ext.openai_public, name)(), known_ranks._KNOWN[size]
    assert {text: i for i, text in known.special.items()} == theirs["special_tokens"]
    assert known.pattern == theirs["pat_str"]


@pytest.mark.parametrize("size", sorted(known_ranks._KNOWN))
def test_known_vocabularies_split_and_name_tokens_as_published(size):
    known = known_ranks._KNOWN[size]
    encoding = tiktoken.Encoding("x", pat_str=known.pattern, mergeable_ranks={bytes([b]): b for b in range(256)},
                                 special_tokens={text: i for i, text in known.special.items()})
    assert encoding.decode(encoding.encode_ordinary("a 1234\n don't 天")) == "a 1234\n don't 天"
    assert len(set(known.special.values())) == len(known.special)
    texts = set(known.special.values())
    assert all(t in texts for t in (known.bos, known.eos, known.pad, *known.prefix) if t is not None)
    if size == 128000:  # the ids that Llama 3's card names
        named = {text: i for i, text in known.special.items()}
        assert named["<|begin_of_text|>"] == 128000 and named["<|end_of_text|>"] == 128001
        assert named["<|start_header_id|>"] == 128006 and named["<|end_header_id|>"] == 128007
        assert named["<|eom_id|>"] == 128008 and named["<|eot_id|>"] == 128009
        assert named["<|reserved_special_token_247|>"] == 128255


DAMAGE = {
    "cut": ("byte_level", lambda d: d["tokenizer.json"][:-100], "tokenizer.json", "tokenizer.json is not JSON"),
    "list": ("byte_level", lambda d: b"[]", "tokenizer.json", "object"),
    "no model": ("byte_level", lambda d: b"{}", "tokenizer.json", "no model"),
    "wrong type": ("byte_level", lambda d: b'{"model": {"type": "BPE", "vocab": 3, "merges": []}}', "tokenizer.json",
                   "tokenizers library"),
    "merge of nothing": ("byte_level",
                         lambda d: d["tokenizer.json"].replace(b'"merges":[', b'"merges":[["q","zz"],', 1),
                         "tokenizer.json", "tokenizers library"),
    "config cut": ("byte_level", lambda d: b'{"eos_token": ', "tokenizer_config.json", "tokenizer_config.json is not"),
    "eos of a number": ("byte_level", lambda d: b'{"eos_token": 5}', "tokenizer_config.json", "eos_token must be"),
    "missing eos": ("byte_level", lambda d: b'{"eos_token": "<nope>"}', "tokenizer_config.json", "<nope>.*eos_token"),
    "missing special": ("llama", lambda d: b'{"additional_special_tokens": ["<x>"]}', "tokenizer_config.json", "<x>"),
    "absurd id": ("llama", lambda d: b'{"added_tokens_decoder": {"999999999": {"content": "x"}}}',
                  "tokenizer_config.json", "id is '999999999'"),
    "negative id": ("byte_level", lambda d: b'{"added_tokens_decoder": {"-1": {"content": "x"}}}',
                    "tokenizer_config.json", "id is '-1'"),
    "other id": ("byte_level", lambda d: b'{"added_tokens_decoder": {"7": {"content": "<tool>"}}}',
                 "tokenizer_config.json", "has id 7"),
    "absurd end": ("byte_level", lambda d: b'{"eos_token_id": [1, 99999999]}', "generation_config.json", "99999999"),
    "end of text": ("byte_level", lambda d: b'{"eos_token_id": "x"}', "generation_config.json", "eos_token_id"),
    "flag": ("llama", lambda d: b'{"add_bos_token": "yes"}', "tokenizer_config.json", "add_bos_token must be"),
    "rank line": ("ranks", lambda d: d["tokenizer.model"][:-7] + b"!!\n", "tokenizer.model", "line .* damaged"),
    "ranks cut": ("ranks", lambda d: d["tokenizer.model"][:900].rsplit(b"\n", 1)[0] + b"\n", "tokenizer.model",
                  "no token for the byte"),
    "bad pattern": ("ranks", lambda d: b'{"pat_str": "(("}', "tokenizer_config.json", "pattern"),
    "binary": ("byte_level", lambda d: bytes(range(256)), "tokenizer.json", "not JSON"),
}


@pytest.mark.parametrize("kind, damage, name, says", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_one_error_that_names_them(folders, tmp_path, kind, damage, name, says, capfd):
    files = {p.name: p.read_bytes() for p in folders[kind].iterdir()}
    files[name] = damage(files)
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_decoders_that_cannot_be_streamed_are_refused(folders, tmp_path):
    data = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    data["decoder"] = {"type": "BPEDecoder", "suffix": "</w>"}
    with pytest.raises(UserError, match="BPEDecoder.*not supported"):
        Tokenizer.load(kinds.write(tmp_path, tokenizer__json=data))
    for damaged in ({"type": "Strip"}, {"type": "Replace", "pattern": 3}, 7, {"type": "Sequence", "decoders": [1]}):
        with pytest.raises(UserError):
            Spelling.of(damaged)


def test_code_of_a_checkpoint_is_not_run(folders, tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    kinds.write(tmp_path, tokenizer__json=(folders["byte_level"] / "tokenizer.json").read_bytes(),
                tokenizer_config__json={"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"})
    Tokenizer.load(tmp_path).encode("a")
    assert not (tmp_path / "ran").exists()
