"""What filters see and what they can do: refuse and rewrite prompts, hold answers back, end them."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from llm_jax.data.tokenizer_training import train_tokenizer
from llm_jax.errors import UserError
from llm_jax.inference.request import Delta, Usage
from serving import filters as filters_module
from serving.access.identity import Caller, Identity
from serving.cache import ResponseCache
from serving.calls import Calls
from serving.client import Client, RequestFailed
from serving.errors import Reason, Rejected
from serving.filters import BlockedPhrases, ContentFilter, Filters, Refused, Stopped, Watcher
from serving.options import ServerOptions
from serving.rewriting import rewritten
from tests.serving.doubles import CharacterTokenizer, FakeService, running_server, wait_until

RULES = BlockedPhrases(["机密", "Top Secret"])  # what the command line names below


class Polite(ContentFilter):
    """Rewrites a word, and waits while it does."""

    async def before(self, prompt: str, identity: Identity) -> str:
        await asyncio.sleep(0)
        if prompt == "fail":
            raise RuntimeError("the filter broke")
        return prompt.replace("笨蛋", "朋友")


class Holding(ContentFilter):
    """Tells nothing before a sentence has ended."""

    def watcher(self, identity: Identity) -> Watcher:
        return _Sentences()


class _Sentences(Watcher):
    def __init__(self) -> None:
        super().__init__()
        self._seen = ""

    async def push(self, text: str, is_last: bool) -> int:
        self._seen += text
        return len(self._seen) if is_last else self._seen.rfind("。") + 1


@pytest.fixture
def service():
    service = FakeService()
    yield service
    service.close()


def _asked(service, filters, text: str, max_tokens: int = 8, cache=None, **more):
    """The pieces that were told of sample 0, and the admission."""
    calls = Calls(service, filters=Filters(filters), cache=cache)
    told: list[Delta] = []

    async def ask():
        async with calls.admitted(Caller("http", "test", "1"), "generate") as admission:
            async def write(news, _first) -> None:
                told.append(news[0])

            ids = await calls.encode(text)
            sampling = calls.sampling(ids, max_tokens=max_tokens, num_samples=1)
            await calls.stream(ids, sampling, 1, 0, write, admission=admission, **more)
        return admission

    return told, asyncio.run(ask())


def _text(told) -> str:
    return "".join(delta.text for delta in told)


def test_a_refused_prompt_never_reaches_the_engine(service):
    for text in ("这是机密", "a TOP SECRET thing"):
        with pytest.raises(Rejected) as caught:
            _asked(service, [RULES], text)
        assert caught.value.reason is Reason.FILTERED and caught.value.field == "prompt"
        assert "does not answer" in caught.value.message
    assert not service.submitted


def test_a_rewritten_prompt_is_what_the_engine_gets(service):
    told, _ = _asked(service, [Polite(), RULES], "你好，笨蛋！", max_tokens=6)
    assert _text(told) == "你好，朋友！" and service.submitted[0][0] == tuple(service.encode("你好，朋友！"))


def test_an_answer_is_told_up_to_the_phrase_and_its_request_ends(service):
    service.faults["问"] = [_letters("这份文件是机密的，不可外传", 9000)]
    told, admission = _asked(service, [RULES], "问", max_tokens=9000)
    assert _text(told) == "这份文件是" and told[-1].finish_reason == "content_filter"
    # Neither tokens nor log-probabilities tell what the text does not.
    assert "".join(chr(i - 3) for delta in told for i in delta.token_ids) == "这份文件是"
    assert all(len(delta.logprobs) == len(delta.token_ids) == len(delta.top_logprobs) for delta in told)
    assert wait_until(lambda: service.cancelled == [0])
    assert told[-1].usage is not None and told[-1].usage.completion_tokens >= 7  # they were computed
    assert admission.usage.completion_tokens == told[-1].usage.completion_tokens


def test_what_only_looks_like_a_phrase_is_told_when_that_is_clear(service):
    service.faults["问"] = [_letters("top secretary? top sec", 22)]
    told, _ = _asked(service, [BlockedPhrases(["top secret!"])], "问", max_tokens=22)
    assert _text(told) == "top secretary? top sec" and told[-1].finish_reason == "length"
    assert [i for d in told for i in d.token_ids] == [ord(c) + 3 for c in "top secretary? top sec"]


def test_a_watcher_may_wait_and_hold_back(service):
    service.faults["问"] = [_letters("一二三。四五六。七", 9)]
    told, _ = _asked(service, [Holding()], "问", max_tokens=9)
    assert _text(told) == "一二三。四五六。七"
    assert all(delta.text.endswith("。") for delta in told[:-1] if delta.text) and told[-1].finish_reason == "length"


def test_what_a_watcher_never_lets_go_is_not_told(service):
    class Silent(ContentFilter):
        def watcher(self, identity):
            return type("_", (Watcher,), {"push": lambda self, text, is_last: 2})()

    told, _ = _asked(service, [Silent()], "abcdef", max_tokens=6)
    assert _text(told) == "ab" and told[-1].finish_reason == "content_filter"


def test_the_strictest_watcher_decides(service):
    service.faults["问"] = [_letters("一二。三机密", 9000)]
    told, _ = _asked(service, [Holding(), RULES], "问", max_tokens=9000)
    assert _text(told) == "一二。" and told[-1].finish_reason == "content_filter"


def test_each_sample_ends_for_itself_and_the_best_are_filtered_too(service):
    def letters(text: str, logprob: float) -> list[Delta]:
        return [dataclasses.replace(d, logprobs=(logprob,) * len(d.token_ids)) for d in _letters(text, len(text))]

    service.faults["问"] = [letters("好的", -1.0), letters("是机密", -0.5), letters("不行", -3.0)]
    calls = Calls(service, filters=Filters([RULES]))

    async def ask(num_samples: int, best_of: int) -> list[Delta]:
        async with calls.admitted(Caller("http", "test", "1"), "generate") as admission:
            ids = await calls.encode("问")
            sampling = calls.sampling(ids, max_tokens=9, num_samples=num_samples, best_of=best_of)
            return await calls.collect(ids, sampling, num_samples, 0, admission=admission, best_of=best_of)

    assert [(d.text, d.finish_reason) for d in asyncio.run(ask(3, 0))] == [
        ("好的", "length"), ("是", "content_filter"), ("不行", "length")]
    assert [(d.text, d.finish_reason) for d in asyncio.run(ask(2, 3))] == [
        ("是", "content_filter"), ("好的", "length")]


def test_an_answer_from_the_cache_is_filtered_as_the_first_was(service):
    kept = ResponseCache()
    service.faults["问"] = [_letters("是机密", 3)]
    unfiltered, _ = _asked(service, [], "问", cache=kept)
    filtered, _ = _asked(service, [RULES], "问", cache=kept)
    assert (_text(unfiltered), _text(filtered)) == ("是机密", "是") and len(service.submitted) == 1
    assert filtered[-1].finish_reason == "content_filter"


def test_a_filter_that_breaks_lets_nothing_pass(service, caplog):
    class Broken(ContentFilter):
        def watcher(self, identity):
            return type("_", (Watcher,), {"push": lambda self, text, is_last: 1 / 0})()

    for filters, text in (([Polite()], "fail"), ([Broken()], "ab")):
        with pytest.raises(Rejected) as caught:
            _asked(service, filters, text)
        assert caught.value.reason is Reason.INTERNAL
    assert "the filter broke" in caplog.text and "ZeroDivisionError" in caplog.text
    assert wait_until(lambda: not service.stats()["running"])


def test_what_is_embedded_is_filtered_too(service):
    calls = Calls(service, filters=Filters([Polite(), RULES]))

    async def embedded(text: str) -> list[float]:
        async with calls.admitted(Caller("http", "test", "1"), "embed") as admission:
            found, = await calls.embed([await calls.encode(text)], "mean", 0, admission=admission)
            return found.embedding.tolist()

    assert asyncio.run(embedded("笨蛋")) == service.encode("朋友")
    with pytest.raises(Rejected, match="does not answer"):
        asyncio.run(embedded("机密"))


def test_tokens_whose_text_comes_later_are_told_with_it(service):
    """A character of several tokens, and text that may yet be a stop string, come after their tokens."""
    service.faults["问"] = [[Delta("是", (1,)), Delta("", (2,)), Delta("", (3,)), Delta("机密", (4,)),
                            *_letters("x", 9000)]]
    told, _ = _asked(service, [RULES], "问", max_tokens=9000)
    assert _text(told) == "是" and [i for delta in told for i in delta.token_ids] == [1]
    service.faults["答"] = [[Delta("是", (1,)), Delta("", (2,)), Delta("🙂", (3,)), Delta("", (4,)),
                            Delta("", (), finish_reason="stop", usage=Usage(2, 4))]]
    told, _ = _asked(service, [RULES], "答")
    assert _text(told) == "是🙂" and [i for delta in told for i in delta.token_ids] == [1, 2, 3, 4]
    assert told[-1].finish_reason == "stop"


def test_filters_that_see_no_answers_hold_none_back():
    assert Filters([Polite()]).watch(Identity(), 1) is None


def test_over_the_wire():
    options = ServerOptions(filters=(f"{__name__}:RULES", f"{__name__}:Polite"))
    with running_server(options=options) as running, Client(running.address) as client:
        with pytest.raises(RequestFailed, match="INVALID_ARGUMENT.*does not answer"):
            list(client.generate("机密"))
        running.service.faults["问"] = [_letters("是机密", 9000)]
        chunks = list(client.generate("问", num_samples=1))
        assert "".join(c.text for c in chunks) == "是" and chunks[-1].finish_reason == "content_filter"
        assert "".join(c.text for c in client.generate("笨蛋", max_tokens=4)) == "朋友朋友"


@pytest.mark.parametrize("name", ["json", "json:nothing", "no_such_module:x", ":x", "json:JSONDecoder", "json:__doc__"])
def test_a_filter_that_is_none_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"--filters: .*{name}"):
        Filters.load([name])
    assert Filters.load([]) is None


def test_an_empty_phrase_would_block_everything():
    with pytest.raises(UserError, match="at least one character"):
        BlockedPhrases(["x", ""])


@pytest.mark.parametrize(("before", "after"), [
    ("甲 <b> 乙", "甲 <i> 乙"), ("你好", "您好"), ("abc", ""), ("aaa", "aa"), ("aa", "aaa"),
    ("é🙂é", "è🙃é"), ("def main(", "def main(x"), ("一二三四五", "一二X四五"),
])
@pytest.mark.parametrize("kind", ["characters", "trained"])
def test_rewriting_keeps_the_tokens_around_the_change(before, after, kind):
    tokenizer = CharacterTokenizer() if kind == "characters" else _trained()
    prompt = [tokenizer.bos_id, *tokenizer.encode(before), tokenizer.eos_id]
    made = rewritten(prompt, after, tokenizer)
    assert made[0] == tokenizer.bos_id and made[-1] == tokenizer.eos_id
    assert tokenizer.decode(made) == after


def test_folding_keeps_the_length():
    text = "İSTANBUL Straße ﬁ"
    assert len(filters_module._folded(text)) == len(text)


def test_refusals_and_stops_say_what_they_are():
    assert str(Refused("no")) == "no" and Stopped(3).at == 3


def _letters(text: str, num_tokens: int) -> list[Delta]:
    """A token for each character, over and over."""
    deltas = []
    for i in range(num_tokens):
        c = text[i % len(text)]
        last = i + 1 == num_tokens
        deltas.append(Delta(c, (ord(c) + 3,), (-0.5,), (((0, -1.0),),), finish_reason="length" if last else None,
                            usage=Usage(2, num_tokens) if last else None))
    return deltas


def _trained():
    return train_tokenizer(["def main():\n    return 你好\n", "import os, sys\n"] * 20, 320)
