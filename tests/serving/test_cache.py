"""Which answers are kept, for whom, how long; and that nobody can tell a kept one from the first, but by its speed."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from llm_jax.inference.request import Constraint, Delta, PromptLogprob, SamplingParams, Usage
from serving import cache
from serving.access.identity import Caller
from serving.answering import Question
from serving.cache import Kept, ResponseCache
from serving.calls import Calls
from serving.metrics import Metrics
from tests.serving.doubles import FakeService, wait_until

ANSWER = (Delta("你好", (5, 6), (-0.5, -0.5), finish_reason="stop", usage=Usage(3, 2)),)
USED = Usage(3, 2)


@pytest.fixture
def service():
    service = FakeService()
    yield service
    service.close()


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _asked(calls: Calls, text: str, tenant: str = "", num_samples: int = 1, best_of: int = 0, deadline_s=None,
           **fields) -> list[Delta]:
    async def ask() -> list[Delta]:
        async with calls.admitted(Caller("http", "test", "1", tenant=tenant), "generate") as admission:
            prompt_ids = await calls.encode(text)
            sampling = calls.sampling(prompt_ids, max_tokens=fields.pop("max_tokens", 4), num_samples=num_samples,
                                      **fields)
            return await calls.collect(prompt_ids, sampling, num_samples, 0, admission=admission, best_of=best_of,
                                       deadline_s=deadline_s)

    return asyncio.run(ask())


def _question(**fields) -> Question:
    return dataclasses.replace(Question((1, 2, 3), SamplingParams()), **fields)


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7, "seed": 5}, {"stop": ("好",)},
                                    {"num_samples": 3, "temperature": 1.0, "seed": 1}, {"best_of": 2},
                                    {"prompt_logprobs": 1, "logprobs": 2}])
def test_the_same_question_gets_the_same_answer_without_the_engine(service, fields):
    metrics = Metrics()
    calls = Calls(service, cache=ResponseCache(), metrics=metrics)
    first = _asked(calls, "你好", **fields)
    before = len(service.submitted)
    again = _asked(calls, "你好", **fields)
    assert again == first and len(service.submitted) == before
    assert first[0].text == "你好你好" and first[0].usage is not None
    told = metrics.render().decode()
    assert "llm_jax_response_cache_queries_total 2.0" in told and "llm_jax_response_cache_hits_total 1.0" in told


def test_what_is_drawn_anew_each_time_is_not_kept(service):
    calls = Calls(service, cache=ResponseCache())
    for _ in range(2):
        _asked(calls, "ab", temperature=0.7)
    assert len(service.submitted) == 2 and calls.cache is not None and len(calls.cache) == 0


@pytest.mark.parametrize("other", [
    {"tenant": "b"}, {"prompt_ids": (1, 2, 4)}, {"prompt_ids": (1, 2, 3, 0)}, {"wanted": 2, "drawn": 2}, {"drawn": 2},
    *({"sampling": SamplingParams(**{name: value})} for name, value in {
        "max_tokens": 5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": ((5, 1.0),), "seed": 7, "stop": ("x",),
        "stop_ids": (4,), "min_tokens": 2, "ignore_eos": True, "logprobs": 1, "prompt_logprobs": 0,
        "constraint": Constraint("regex", "a*")}.items()),
    {"sampling": SamplingParams(temperature=0.5, seed=7)},
])
def test_every_field_that_shapes_an_answer_is_in_its_key(other):
    kept = ResponseCache("model")
    assert kept.key(_question()) == kept.key(_question())
    assert kept.key(_question(**other)) != kept.key(_question())


def test_every_field_of_sampling_is_looked_at():
    """A field that is added to `SamplingParams` is in the key by itself: the key is made of its `repr`."""
    assert all(f"{field.name}=" in repr(SamplingParams()) for field in dataclasses.fields(SamplingParams))


def test_model_and_weights_are_in_the_key():
    keys = [ResponseCache(model).key(_question(), weights) for model in ("a", "b") for weights in (0, 1)]
    assert len(set(keys)) == 4


def test_when_an_answer_comes_is_not_in_its_key():
    kept = ResponseCache()
    assert kept.key(_question(priority=5, due=3.0)) == kept.key(_question())


def test_other_weights_give_other_answers(service):
    calls = Calls(service, cache=ResponseCache())
    for version in (0, 0, 1):
        service.weights_version = version
        _asked(calls, "ab")
    assert len(service.submitted) == 2


def test_a_tenant_is_not_told_anothers_answer(service):
    calls = Calls(service, cache=ResponseCache())
    for tenant in ("甲", "乙", "甲"):
        _asked(calls, "ab", tenant=tenant)
    assert [tenant for tenant, _ in service.terms] == ["甲", "乙"]


def test_an_answer_that_was_cut_short_is_not_kept(service):
    calls = Calls(service, cache=ResponseCache())
    service.faults["ab"] = Delta("a", (100,), (-1.0,), finish_reason="deadline", usage=Usage(3, 1))
    assert _asked(calls, "ab", deadline_s=1.0)[0].finish_reason == "deadline"
    service.faults.clear()
    assert _asked(calls, "ab")[0].text == "abab"

    async def leave() -> None:
        async with calls.admitted(Caller("http", "test", "1"), "generate") as admission:
            ids = await calls.encode("long")
            running = asyncio.create_task(calls.collect(
                ids, calls.sampling(ids, max_tokens=9000, num_samples=1), 1, 0, admission=admission))
            await asyncio.sleep(0.05)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(leave())
    assert calls.cache is not None and len(calls.cache) == 1 and wait_until(lambda: not service.stats()["running"])


def test_answers_are_kept_for_so_long():
    clock = Clock()
    kept = ResponseCache(seconds=300, clock=clock)
    key = kept.key(_question())
    assert key is not None
    kept.put(key, ANSWER, USED)
    clock.now = 299.0
    assert kept.get(key) == Kept(ANSWER, USED)
    clock.now = 301.0
    assert kept.get(key) is None and len(kept) == 0


def test_so_many_answers_are_kept():
    kept = ResponseCache(entries=3)
    keys = [kept.key(_question(prompt_ids=(i,))) or b"" for i in range(5)]
    for key in keys:
        kept.put(key, ANSWER, USED)
    assert [kept.get(key) is not None for key in keys] == [False, False, True, True, True]


def test_large_answers_count_for_more(monkeypatch):
    large = [Delta("x" * 10_000, tuple(range(10_000)), (-1.0,) * 10_000, (((1, -1.0),) * 20,) * 10_000,
                   (PromptLogprob(1, -1.0, ((1, -1.0),) * 20),) * 10_000, finish_reason="length")]
    monkeypatch.setattr(cache, "MAX_BYTES", 130_000_000)
    kept = ResponseCache(entries=1000)
    keys = [kept.key(_question(prompt_ids=(i,))) or b"" for i in range(4)]
    for key in keys:
        kept.put(key, large, USED)
    assert [kept.get(key) is not None for key in keys] == [False, False, True, True]
    monkeypatch.setattr(cache, "MAX_BYTES", 1_000_000)
    kept = ResponseCache()
    kept.put(b"one", ANSWER, USED)
    kept.put(b"too large", large, USED)
    assert kept.get(b"too large") is None and kept.get(b"one") == Kept(ANSWER, USED)


@pytest.mark.parametrize("best_of", [0, 3])
def test_an_answer_from_the_cache_is_used_up_all_the_same(service, best_of):
    """A quota counts what a caller got, whoever computed it, and what was drawn for it; the caller is told the same."""
    calls = Calls(service, cache=ResponseCache())
    used = []

    async def ask() -> None:
        async with calls.admitted(Caller("http", "test", "1"), "generate") as admission:
            ids = await calls.encode("ab")
            await calls.collect(ids, calls.sampling(ids, max_tokens=5, num_samples=2), 2, 0, admission=admission,
                                best_of=best_of)
            used.append(admission.usage)

    asyncio.run(ask())
    asyncio.run(ask())
    assert used == [Usage(3, 5 * max(2, best_of), 2)] * 2 and len(service.submitted) == max(2, best_of)
