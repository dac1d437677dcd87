"""Whatever is drawn under a mask is what the constraint asks for, in the text that the client gets."""

from __future__ import annotations

import concurrent.futures
import json
import re

import numpy as np
import pytest

from llm_jax.data.tokenizer import StreamDecoder, Tokenizer
from llm_jax.inference import constraints
from llm_jax.inference.constraints import ConstraintFailed, Grammars
from llm_jax.inference.request import Constraint, InvalidRequest
from tests.data import tokenizer_kinds

PADDING = 37  # rows of the model's vocabulary that the tokenizer does not have
KINDS = ["ours", "byte_level", "ranks", "metaspace", "llama"]
# Byte-level tokens split these characters, and so do byte-fallback tokens.
WORDS = ["", " fox", "  fox", "fox", "the fox", "满纸", "满汉", "naïve 🙂", "🙂🎉", "def main", "def"]


@pytest.fixture(scope="module")
def tokenizers(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    byte_level = tokenizer_kinds.byte_level(root / "byte_level")
    folders = {"byte_level": byte_level,
               "ranks": tokenizer_kinds.ranked(root / "ranks", tokenizer_kinds.ranks_of(byte_level)),
               "metaspace": tokenizer_kinds.metaspace(root / "metaspace"),
               "llama": tokenizer_kinds.llama(root / "llama")}
    return {"ours": tokenizer} | {name: Tokenizer.load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def grammars(tokenizers):
    """Of every tokenizer; what one of them has tried in a process of its own, the others do not try again."""
    tried, really = set(), constraints._try

    def once(constraint, *args):
        if constraint not in tried:
            really(constraint, *args)
            tried.add(constraint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constraints, "_try", once)
        yield {name: Grammars(t, t.vocab_size + PADDING) for name, t in tokenizers.items()}


def allowed(mask: np.ndarray) -> set[int]:
    assert mask.dtype == np.uint32
    return {32 * w + b for w, word in enumerate(mask.tolist()) for b in range(32) if word >> b & 1}


def text_of(tokenizer, ids) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join(map(decoder.push, ids)) + decoder.flush()


def walk(grammars, tokenizer, constraint, seed, most=400, end=0.3):
    """A random completion as text; None if it was not finished after `most` tokens."""
    rng, matcher, ids = np.random.default_rng(seed), grammars.matcher(constraint), []
    ends = set(tokenizer.end_ids)
    for _ in range(most):
        if matcher.finished:
            return text_of(tokenizer, ids)
        mask = matcher.mask()
        assert mask.shape == (-(-grammars.vocab_size // 32),)
        may = allowed(mask)
        assert may and max(may) < tokenizer.vocab_size
        assert not may & (tokenizer.special_ids - ends)
        assert may & ends in (set(), ends)
        if may & ends and (rng.random() < end or may == ends):
            matcher.accept(int(rng.choice(sorted(ends))))
            assert matcher.finished and allowed(matcher.mask()) == ends
            return text_of(tokenizer, ids)
        # White space would make most of the walk.
        inked = [i for i in sorted(may - ends) if tokenizer.token_bytes(i).strip()]
        drawn = int(rng.choice(inked if inked and rng.random() < 0.9 else sorted(may - ends)))
        matcher.accept(drawn)
        ids.append(drawn)
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["regex", "grammar"])
def test_the_mask_is_every_token_that_keeps_the_text_within_a_finite_language(kind, style, tokenizers, grammars):
    tokenizer = tokenizers[kind]
    text = "|".join(map(re.escape, WORDS)).replace(r"\ ", " ") if style == "regex" else (
        "start: " + " | ".join(json.dumps(w, ensure_ascii=False) for w in WORDS))
    constraint, words = Constraint(style, text), [w.encode() for w in WORDS]

    plain = {i: b for i in range(tokenizer.vocab_size) if (b := tokenizer.token_bytes(i))}

    def seen(content):
        return content[min(tokenizer.stripped_spaces, len(content) - len(content.lstrip(b" "))):]

    rng = np.random.default_rng(3)
    complete = set()
    for _ in range(12):
        matcher, content, ids = grammars[kind].matcher(constraint), b"", []
        while not matcher.finished:
            here = seen(content)
            expected = {i for i, b in plain.items() if any(w.startswith(seen(content + b)) for w in words)}
            expected |= set(tokenizer.end_ids) if here in words else set()
            assert allowed(matcher.mask()) == expected, here
            drawn = int(rng.choice(sorted(expected)))
            matcher.accept(drawn)
            content += plain.get(drawn, b"")
            ids.append(drawn)
        ids = [i for i in ids if i not in tokenizer.end_ids]
        assert seen(content) in words and seen(content).decode() == text_of(tokenizer, ids)
        complete.add(seen(content))
    assert len(complete) > 3


@pytest.mark.parametrize("kind", ["t5", "unigram"])
def test_where_decoding_takes_all_leading_spaces_away_none_is_drawn(kind, tmp_path):
    tokenizer = Tokenizer.load(getattr(tokenizer_kinds, kind)(tmp_path / kind))
    assert tokenizer.stripped_spaces
    made = Grammars(tokenizer, tokenizer.vocab_size + PADDING)
    constraint = Constraint("regex", "[a-z]{2,5}( [a-z]{1,4})*")
    if tokenizer.stripped_spaces > 1:
        assert all(tokenizer.token_bytes(i).strip() for i in allowed(made.matcher(constraint).mask()))
    texts = [walk(made, tokenizer, constraint, seed) for seed in range(20)]
    done = [t for t in texts if t is not None]
    assert done and all(re.fullmatch("[a-z]{2,5}( [a-z]{1,4})*", t) for t in done)


def test_threads_may_share_the_grammars(tokenizers, grammars):
    constraint = Constraint("json_schema", json.dumps(PERSON))

    def one(seed):
        return walk(grammars["ours"], tokenizers["ours"], constraint, seed)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(16))) == [one(seed) for seed in range(16)]


PERSON = {"type": "object", "additionalProperties": False, "required": ["名", "age", "tags"], "properties": {
    "名": {"enum": ["林黛玉", "贾宝玉🙂", 'a"b\\']}, "age": {"type": "integer", "minimum": 3, "maximum": 120},
    "tags": {"type": "array", "minItems": 1, "maxItems": 3, "items": {"type": "string", "maxLength": 4}},
    "alive": {"type": "boolean"}, "ratio": {"type": ["number", "null"]}}}


def is_person(value) -> bool:
    return (set(value) - {"alive", "ratio"} == {"名", "age", "tags"} and value["名"] in ("林黛玉", "贾宝玉🙂", 'a"b\\')
            and type(value["age"]) is int and 3 <= value["age"] <= 120 and 1 <= len(value["tags"]) <= 3
            and all(isinstance(t, str) and len(t) <= 4 for t in value["tags"])
            and isinstance(value.get("alive", True), bool)
            and (value.get("ratio") is None or type(value["ratio"]) in (int, float)))


@pytest.mark.parametrize("kind", KINDS)
def test_random_completions_follow_a_json_schema(kind, tokenizers, grammars):
    constraint = Constraint("json_schema", json.dumps(PERSON))
    texts = [walk(grammars[kind], tokenizers[kind], constraint, seed) for seed in range(12)]
    done = [t for t in texts if t is not None]
    assert len(done) >= 8 and len(set(done)) > 4
    assert all(is_person(json.loads(t)) for t in done)


def test_an_empty_schema_is_any_json(tokenizers, grammars):
    done = [walk(grammars["ours"], tokenizers["ours"], Constraint("json_schema", text), seed, most=60)
            for text in ("{}", "true") for seed in range(25)]
    kinds = {type(json.loads(t)) for t in done if t is not None}
    assert len(kinds) >= 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regex", [
    r"[0-9]{3}-\d{2,4}(cm|mm)?", r" *(one|two  )+", "第[一二三四五六七八九十]{1,3}回：[\u4e00-\u9fff]{2,5}",
    "(a/b\\\\c|\"x\"\n)*", "^(yes|no)$", "[^a-z]{2}é+"])
def test_random_completions_match_a_regex(kind, regex, tokenizers, grammars):
    texts = [walk(grammars[kind], tokenizers[kind], Constraint("regex", regex), seed, most=40) for seed in range(10)]
    done = [t for t in texts if t is not None]
    assert done and all(re.fullmatch(regex, t) for t in done)


ARITHMETIC = """
start: sum
sum: product (("+" | "-") product)*
product: factor ("*" factor)*
factor: NUMBER | "(" sum ")" | "-" factor
NUMBER: /0|[1-9][0-9]{0,3}/
"""


@pytest.mark.parametrize("kind", ["ours", "byte_level", "metaspace"])
def test_random_completions_follow_a_grammar(kind, tokenizers, grammars):
    texts = [walk(grammars[kind], tokenizers[kind], Constraint("grammar", ARITHMETIC), seed, most=80)
             for seed in range(12)]
    done = [t for t in texts if t is not None]
    assert len(done) >= 6 and max(map(len, done)) > 4
    for text in done:
        assert re.fullmatch(r"[0-9+\-*()]+", text)
        assert isinstance(eval(text), int)  # Python's own parser; the alphabet is checked above


def test_grammars_can_not_make_special_tokens_or_padding_text(tokenizers, grammars):
    tokenizer = tokenizers["ours"]
    with pytest.raises(InvalidRequest, match="special token"):
        grammars["ours"].matcher(Constraint("grammar", 'start: "a" <|end|>'))
    for number in (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.vocab_size + PADDING):
        with pytest.raises(InvalidRequest):
            grammars["ours"].matcher(Constraint("grammar", f"start: <[{number}]>"))
    # The end token as a delimiter within a text would end it halfway.
    matcher = grammars["ours"].matcher(Constraint("grammar", 'start: a "x"\na[stop=""]: /b*/'))
    assert not allowed(matcher.mask()) & set(tokenizer.end_ids)


@pytest.mark.parametrize("kind, text, message", [
    ("json_schema", '{"type": ', "not JSON"), ("json_schema", '{"const": NaN}', "NaN is not JSON"),
    ("json_schema", "[" * 90_000, "not JSON"), ("json_schema", '"string"', "must be an object"),
    ("json_schema", "false", "must be an object"), ("json_schema", '{"type": "objet"}', "objet"),
    ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}', "minLength"),
    ("json_schema", '{"$ref": "http://example.com/schema.json"}', "example.com"),
    ("json_schema", '{"$ref": "#"}', "no completion satisfies it"),
    ("json_schema", '{"const": "\\ud800"}', "can't be used"),
    ("regex", "(a", "unclosed group"), ("regex", "a(?=b)", "look-ahead"), ("regex", "\ud800", "surrogates"),
    ("regex", "(" * 50_000 + ")" * 50_000, "nest"),
    ("grammar", "start: missing", "unknown name: \"missing\""), ("grammar", "begin: \"a\"", "no start rule"),
    ("grammar", 'start: "a"\nb: "c" [', "2"), ("grammar", "start: start", "no completion satisfies it"),
    ("grammar", '{"grammars": []}', "can't be used"), ("grammar", "start: " + "(" * 40_000, "nested"),
])
def test_what_can_not_be_followed_is_refused_with_the_reason(kind, text, message, grammars):
    with pytest.raises(InvalidRequest) as caught:
        grammars["ours"].matcher(Constraint(kind, text))
    assert message in str(caught.value) and len(str(caught.value)) < 800
    assert "no_forcing" not in str(caught.value) and "backtrace" not in str(caught.value)


@pytest.mark.parametrize("schema", [
    {"type": "integer", "multipleOf": 99_999_989},
    {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(40)]}])
def test_a_schema_that_would_take_for_ever_is_refused_and_remembered(schema, grammars, monkeypatch):
    monkeypatch.setattr(constraints, "COMPILE_SECONDS", 1)
    constraint = Constraint("json_schema", json.dumps(schema))
    with pytest.raises(InvalidRequest, match="too complex: compiling it takes more than 1 s"):
        grammars["ours"].matcher(constraint)
    monkeypatch.setattr(constraints.subprocess, "run", None)
    with pytest.raises(InvalidRequest, match="too complex"):
        grammars["ours"].matcher(constraint)


def test_large_schemas_work(tokenizers, grammars):
    schema = {"type": "object", "additionalProperties": False,
              "properties": {f"p{i}": {"enum": [i, str(i)]} for i in range(800)}}
    text = walk(grammars["byte_level"], tokenizers["byte_level"], Constraint("json_schema", json.dumps(schema)), 1)
    assert all(value in (int(name[1:]), name[1:]) for name, value in json.loads(text).items())


def test_matchers_of_one_grammar_are_independent_and_it_is_compiled_once(tokenizer, monkeypatch):
    made = Grammars(tokenizer, tokenizer.vocab_size, max_compiled=2)
    compiled = []
    monkeypatch.setattr(constraints, "_try", lambda constraint, *_: compiled.append(constraint.text))
    a, b = made.matcher(Constraint("regex", "ab")), made.matcher(Constraint("regex", "ab"))
    first = b.mask()
    [token] = [i for i in allowed(first) if tokenizer.token_bytes(i) == b"a" and tokenizer.token_text(i) == "a"]
    a.accept(token)
    np.testing.assert_array_equal(b.mask(), first)
    assert (a.mask() != first).any() and compiled == ["ab"]
    for text in ("c", "d", "ab", "d"):  # "ab" is the one not used for longest when "d" comes
        made.matcher(Constraint("regex", text))
    assert compiled == ["ab", "c", "d", "ab"]


def test_a_token_that_is_not_allowed_is_refused(tokenizer, grammars):
    matcher = grammars["ours"].matcher(Constraint("regex", "ab"))
    bad = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"p")
    for token in (bad, tokenizer.end_ids[0], tokenizer.bos_id, tokenizer.vocab_size + 3, -1):
        with pytest.raises(ConstraintFailed):
            grammars["ours"].matcher(Constraint("regex", "ab")).accept(token)
    assert not matcher.finished


def test_full_lexer_is_renewed_and_a_step_beyond_it_fails(tokenizer, monkeypatch):
    """Walks add up to more lexer states than the limit; no step by itself needs so many."""
    constraint, rng = Constraint("regex", "(.*a.{12}){2}z"), np.random.default_rng(0)
    monkeypatch.setattr(constraints, "_try", lambda *_: None)
    made = Grammars(tokenizer, tokenizer.vocab_size, max_lexer_states=200)
    compiled, really = [], made._compile
    monkeypatch.setattr(made, "_compile", lambda *args: compiled.append(args) or really(*args))
    together = [made.matcher(constraint) for _ in range(2)]
    for matcher in [*together, *(made.matcher(constraint) for _ in range(20))]:
        ids = []
        for _ in range(30):
            ids.append(int(rng.choice(sorted(allowed(matcher.mask()) - set(tokenizer.end_ids)))))
            matcher.accept(ids[-1])
            if matcher.finished:
                break
        assert re.fullmatch("(.*a.{12}){2}z", text_of(tokenizer, ids)) or not matcher.finished
    assert len(compiled) > 2
    with pytest.raises(ConstraintFailed, match="too many states"):
        matcher = Grammars(tokenizer, tokenizer.vocab_size, max_lexer_states=40).matcher(constraint)
        for _ in range(400):
            matcher.accept(int(rng.choice(sorted(allowed(matcher.mask()) - set(tokenizer.end_ids)))))
    with pytest.raises(InvalidRequest, match="too many states"):
        Grammars(tokenizer, tokenizer.vocab_size, max_lexer_states=4).matcher(constraint)


def test_without_an_end_token_a_complete_text_is_finished(tokenizers):
    class Endless:
        """A tokenizer without end tokens."""

        def __init__(self, inner):
            self.__dict__.update(inner.__dict__, end_ids=(), token_bytes=inner.token_bytes)

    tokenizer = Endless(tokenizers["ours"])
    matcher = Grammars(tokenizer, tokenizer.vocab_size).matcher(Constraint("regex", "泪|"))
    for byte in "泪".encode():
        assert not matcher.finished
        matcher.accept(next(i for i in allowed(matcher.mask()) if tokenizer.token_bytes(i) == bytes([byte])))
    assert matcher.finished and not matcher.mask().any()
