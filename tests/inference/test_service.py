"""Requests that come and go: what they get, together and alone."""

from __future__ import annotations

import queue
import threading
import time
import warnings

import jax
import numpy as np
import pytest

from llm_jax.inference.generation import Completion, complete
from llm_jax.inference.request import (
    Constraint,
    Delta,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    Unavailable,
)

NEAR_TIE = 1e-4


def prompts(service, count):
    rng = np.random.default_rng(5)
    texts = ["for i in ", "满纸荒唐言，", "print(", "谁解其中味？\n", "range(10)" * 3]
    return [service.encode(texts[i % 5]) + rng.integers(4, 300, int(rng.integers(1, 50))).tolist()
            for i in range(count)]


def first_difference(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def assert_same_but_for_near_ties(mine, other, prompt, dense_logits, what):
    """Equal token for token, or different from a place where the two best logits nearly tie, which is named."""
    at = first_difference(mine, other)
    if at is None:
        assert len(mine) == len(other), what
        return
    row = np.sort(dense_logits([*prompt, *mine[:at]])[-1])
    gap = row[-1] - row[-2]
    assert gap < NEAR_TIE, f"{what}: token {at} differs where the best two logits are {gap} apart"
    warnings.warn(f"{what}: a near-tie at token {at}", stacklevel=2)  # pytest's summary names it


def test_the_comparison_can_fail(dense_logits):
    """A difference where nothing ties is found."""
    best = [int(dense_logits([1, 5])[-1].argmax())]
    with pytest.raises(AssertionError, match="token 0 differs"):
        assert_same_but_for_near_ties(best, [best[0] + 1], [1, 5], dense_logits, "x")
    with pytest.raises(AssertionError):
        assert_same_but_for_near_ties(best, [], [1, 5], dense_logits, "x")


def greedy_by_dense(prompt, count, dense_logits, end):
    tokens = list(prompt)
    for _ in range(count):
        token = int(dense_logits(tokens)[-1].argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt):]


def test_together_equals_alone_equals_dense(service, lone_service, fresh, dense_logits, tokenizer):
    """24 greedy requests of mixed lengths sent at once, each sent alone, by the engine of `Run.generate`, and by
    greedy decoding with the dense forward."""
    asked = prompts(service, 24)
    lengths = [5 + 3 * (i % 9) for i in range(24)]
    wanted = [SamplingParams(max_tokens=n) for n in lengths]
    other = fresh()
    together = complete(other, asked, wanted)
    assert other.stats()["most_rows"] >= 8
    for i, got in enumerate(complete(lone_service, asked, wanted)):
        assert_same_but_for_near_ties(got.token_ids, together[i].token_ids, asked[i], dense_logits, f"generate {i}")
    for i, (prompt, params, mine) in enumerate(zip(asked, wanted, together, strict=True)):
        alone = complete(service, [prompt], [params])[0]
        assert_same_but_for_near_ties(mine.token_ids, alone.token_ids, prompt, dense_logits, f"request {i} alone")
        dense = greedy_by_dense(prompt, lengths[i], dense_logits, tokenizer.eos_id)
        assert_same_but_for_near_ties(mine.token_ids, dense, prompt, dense_logits, f"request {i} dense")
        assert mine.text == tokenizer.decode(mine.token_ids)
        assert mine.finish_reason == ("length" if len(mine.token_ids) == lengths[i] else "stop")
        assert mine.usage.prompt_tokens == len(prompt) and mine.usage.completion_tokens == len(mine.token_ids)


def test_logprobs_are_the_trainers(service, dense_logits):
    prompt = prompts(service, 1)[0]
    got = complete(service, [prompt], [SamplingParams(max_tokens=12, temperature=1.5, seed=3, ignore_eos=True)])[0]
    logits = dense_logits([*prompt, *got.token_ids])[len(prompt) - 1:-1].astype(np.float64)
    exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(got.logprobs, exact[np.arange(12), list(got.token_ids)], rtol=2e-5, atol=1e-4)


def test_a_seed_repeats_itself_in_any_company(service):
    prompt = prompts(service, 1)[0]
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=11)
    alone = complete(service, [prompt], [params])[0]
    crowd = complete(service, [*prompts(service, 11), prompt],
                     [SamplingParams(max_tokens=20, temperature=2.0)] * 11 + [params])
    assert crowd[-1].token_ids == alone.token_ids
    fresh = {complete(service, [prompt], [SamplingParams(max_tokens=20, temperature=1.0)])[0].token_ids
             for _ in range(3)}
    assert len(fresh) > 1


def test_no_compile_after_ready_whatever_is_asked(service, fresh):
    compiles = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiles.append(name) if "compile" in name else None)
    asked = prompts(service, 12)
    options = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}, {"temperature": 1.0, "top_k": 200},
               {"temperature": 1.0, "top_p": 0.4}, {"temperature": 3.0, "top_p": 0.99}, {"stop": ("a",)},
               {"temperature": 1.0, "top_k": 90, "top_p": 0.9}, {"ignore_eos": True}, {"seed": 2**63}, {"sample": 3},
               {"temperature": 1.0, "seed": 1}]
    complete(service, asked, [SamplingParams(max_tokens=9, **o) for o in options])
    for prompt, o in zip(asked, options, strict=True):
        complete(service, [prompt], [SamplingParams(max_tokens=3, **o)])
    assert not compiles
    restarted = fresh()  # with pools as they are after a step that failed
    made = len(compiles)
    for prompt, o in zip(asked, options, strict=True):
        complete(restarted, [prompt], [SamplingParams(max_tokens=3, **o)])
    assert len(compiles) == made


def test_preemption_ends_with_the_same_tokens(engine, service, tokenizer, dense_logits):
    """Twelve requests that need over twice the pool: some give way and come back."""
    asked = [p[:20] for p in prompts(service, 12)]
    wanted = [SamplingParams(max_tokens=96, ignore_eos=True)] * 12
    before = service.stats()["preemptions"]
    together = complete(service, asked, wanted)
    assert service.stats()["preemptions"] > before
    for i, (prompt, mine) in enumerate(zip(asked, together, strict=True)):
        assert len(mine.token_ids) == 96 - len(prompt) and mine.finish_reason == "length"
        if i >= 9:
            alone = complete(service, [prompt], [wanted[i]])[0]
            assert_same_but_for_near_ties(mine.token_ids, alone.token_ids, prompt, dense_logits, f"request {i}")
    assert service.stats()["pages_used"] == 0


def test_a_plain_string_is_one_stop_string():
    assert SamplingParams(stop="END").stop == ("END",)


def test_stop_strings_end_the_text_before_them(service):
    prompt = prompts(service, 1)[0]
    free = complete(service, [prompt], [SamplingParams(max_tokens=30, ignore_eos=True)])[0]
    stop = free.text[len(free.text) // 2:][:3]
    got = complete(service, [prompt], [SamplingParams(max_tokens=30, ignore_eos=True, stop=("never", stop))])[0]
    assert got.finish_reason == "stop" and got.text == free.text[:free.text.index(stop)]
    assert got.usage.completion_tokens <= 30


class Listening:
    def __init__(self):
        self.deltas: queue.Queue[Delta] = queue.Queue()

    def __call__(self, delta):
        self.deltas.put(delta)

    def rest(self):
        """All deltas to the last."""
        found = []
        while not found or found[-1].finish_reason is None:
            found.append(self.deltas.get(timeout=60))
        return found


def test_a_cancelled_request_frees_its_pages_before_the_second_step_after(service):
    one = Listening()
    request = service.submit(prompts(service, 1)[0][:4], SamplingParams(max_tokens=90, ignore_eos=True), one)
    one.deltas.get(timeout=60)
    service.cancel(request)
    steps = service.stats()["steps"]
    assert service.stats()["pages_used"] == 0
    assert one.rest()[-1].finish_reason == "cancelled"
    service.cancel(request)  # again: nothing
    time.sleep(0.05)
    assert service.stats()["steps"] <= steps + 1


def test_cancelling_at_any_moment_harms_nobody(service, dense_logits):
    """Requests are cancelled from other threads all the time; those that are not, get what they get alone."""
    asked = prompts(service, 24)
    ask = SamplingParams(max_tokens=12, ignore_eos=True)
    listeners = [Listening() for _ in range(120)]
    ids = queue.Queue()

    def cancel():
        rng = np.random.default_rng()
        while (request := ids.get()) is not None:
            time.sleep(rng.uniform(0, 0.02))
            service.cancel(request)

    threads = [threading.Thread(target=cancel) for _ in range(4)]
    for thread in threads:
        thread.start()
    kept = []
    for i, one in enumerate(listeners):
        while service.stats()["waiting"] > 40:
            time.sleep(0.001)
        request = service.submit(asked[i % 24], ask, one)
        if i % 5:
            ids.put(request)
        else:
            kept.append(i)
    for _ in threads:
        ids.put(None)
    ends = [Completion.of(one.rest()) for one in listeners]
    for thread in threads:
        thread.join()
    assert {e.finish_reason for e in ends} <= {"length", "cancelled"}
    assert "cancelled" in {e.finish_reason for e in ends}
    for i in kept[:8]:
        alone = complete(service, [asked[i % 24]], [ask])[0]
        assert_same_but_for_near_ties(ends[i].token_ids, alone.token_ids, asked[i % 24], dense_logits, f"request {i}")
    assert service.stats()["pages_used"] == 0


def test_a_failing_listener_costs_only_its_own_request(service):
    def fail(delta):
        raise RuntimeError("listener")

    good = Listening()
    ask = SamplingParams(max_tokens=5, ignore_eos=True)
    service.submit([1, 2], ask, fail)
    service.submit([1, 2], ask, good)
    assert Completion.of(good.rest()).finish_reason == "length"
    assert service.stats()["running"] == 0 and service.stats()["pages_used"] == 0


def test_a_failing_step_ends_its_requests_and_not_the_service(service, engine, monkeypatch):
    before = complete(service, [[1, 5, 9]], [SamplingParams(max_tokens=6)])[0]
    real, calls = engine.dispatch, []

    def dispatch(step):
        calls.append(1)
        if len(calls) == 2:
            for pool in jax.tree.leaves(engine.pools):
                pool.delete()  # as after a failure with the pools donated
            raise RuntimeError("device lost")
        return real(step)

    monkeypatch.setattr(engine, "dispatch", dispatch)
    got = complete(service, [[1, 5, 9]], [SamplingParams(max_tokens=6)])[0]
    assert got.finish_reason == "error" and "device lost" in got.error
    assert complete(service, [[1, 5, 9]], [SamplingParams(max_tokens=6)])[0] == before


def test_who_comes_while_a_step_runs_is_in_the_next_one(service, monkeypatch):
    """The next step is planned when the one that runs is about to end, and not before."""
    planned, second = [], []
    real_prepare, real_hold = service.engine.prepare, service._pace.hold_s

    def prepare(plan, *args, **options):
        planned.append({chunk.sequence.id for chunk in plan})
        return real_prepare(plan, *args, **options)

    def hold_s(shape):
        if not second:  # the first step runs, and nobody has planned another
            second.append(service.submit([1, 7], SamplingParams(max_tokens=2), ended.put))
        return real_hold(shape)

    ended: queue.Queue = queue.Queue()
    monkeypatch.setattr(service.engine, "prepare", prepare)
    monkeypatch.setattr(service._pace, "hold_s", hold_s)
    complete(service, [[1, 5, 9]], [SamplingParams(max_tokens=6)])
    while ended.get(timeout=30).finish_reason is None:
        pass
    assert second[0] in planned[1]


def test_a_wait_for_the_next_step_ends_with_the_service(fresh, monkeypatch):
    s = fresh()
    waits = threading.Event()

    def hold_s(shape):
        waits.set()
        return 3600.0

    monkeypatch.setattr(s._pace, "hold_s", hold_s)
    ended: queue.Queue = queue.Queue()
    s.submit([1, 5, 9], SamplingParams(max_tokens=50), ended.put)
    assert waits.wait(30)
    s.close()
    found = [ended.get(timeout=30)]
    while found[-1].finish_reason is None:
        found.append(ended.get(timeout=30))
    assert found[-1].finish_reason == "cancelled" and len(found) < 4


def test_an_engine_that_cannot_be_restarted_closes_the_service_and_hangs_nobody(fresh, monkeypatch):
    s = fresh()
    engine = s.engine

    def fail(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine, "dispatch", fail)
    monkeypatch.setattr(engine, "reset", fail)
    assert complete(s, [[1, 2]], [SamplingParams(max_tokens=3)])[0].finish_reason == "error"
    s.close()
    assert not s.is_live
    with pytest.raises(Unavailable):
        s.submit([1], SamplingParams(), print)


def test_refusals(service):
    listen = Listening()
    ask = SamplingParams(max_tokens=4)
    with pytest.raises(PromptTooLong, match="96 tokens; at most 95"):
        service.submit([1] * 96, ask, listen)
    with pytest.raises(InvalidRequest, match="empty"):
        service.submit([], ask, listen)
    with pytest.raises(InvalidRequest, match="token id 100000"):
        service.submit([1, 100000], ask, listen)
    for name, value in [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_k", -1),
                        ("max_tokens", 0), ("seed", -1), ("stop", ("",)), ("top_k", 1.5), ("max_tokens", "5"),
                        ("stop", (1,)), ("temperature", "hot")]:
        with pytest.raises(InvalidRequest, match=name):
            SamplingParams(**{name: value})


def test_what_is_taken_in_counts_against_the_queue(fresh):
    """A grammar may take seconds to compile; its deadline counts meanwhile."""
    s = fresh(max_queue=2)
    go, begun, real = threading.Event(), threading.Semaphore(0), s._intake._all_grammars

    def all_grammars():
        begun.release()
        go.wait(60)
        return real()

    s._intake._all_grammars = all_grammars
    listeners = [Listening() for _ in range(s.max_requests)]
    asked = SamplingParams(max_tokens=2, constraint=Constraint("regex", "ab"))
    threads = [threading.Thread(target=s.submit, args=([1, 2], asked, one), kwargs={"deadline_s": None if i else 1e-3})
               for i, one in enumerate(listeners)]
    try:
        for thread in threads:
            thread.start()
            assert begun.acquire(timeout=60)
        for late in (lambda: s.submit([1], SamplingParams(), print), lambda: s.embed([1], "mean", print),
                     lambda: s.submit([1], asked, print)):
            with pytest.raises(QueueFull, match=f"of at most {s.max_requests}"):
                late()
        assert not begun.acquire(blocking=False)  # refused before anything is compiled for it
    finally:
        go.set()
        for thread in threads:
            thread.join()
    ends = [one.rest()[-1].finish_reason for one in listeners]
    assert ends[0] == "deadline" and set(ends[1:]) <= {"stop", "length"}
    s.close()


def test_a_full_queue_refuses_and_draining_lets_finish(fresh):
    s = fresh(max_queue=2)
    engine = s.engine
    listeners = [Listening() for _ in range(20)]
    ask = SamplingParams(max_tokens=60, ignore_eos=True)
    gate = threading.Event()
    real = engine.collect
    engine.collect = lambda step: (gate.wait(60), real(step))[1]
    try:
        first = s.submit([1, 2, 3], ask, listeners[0])
        accepted = [listeners[0]]
        deadline = time.monotonic() + 60
        while not s.stats()["running"] and time.monotonic() < deadline:
            time.sleep(0.001)
        with pytest.raises(QueueFull):
            for one in listeners[1:]:
                s.submit([1, 2, 3], ask, one)
                accepted.append(one)
        s.begin_drain()
        assert not s.is_live
        with pytest.raises(Unavailable):
            s.submit([1, 2], ask, listeners[-1])
        assert not s.wait_drained(0.01)
        gate.set()
        assert s.wait_drained(60)
        assert all(one.rest()[-1].finish_reason == "length" for one in accepted) and first == 0
    finally:
        gate.set()
        s.close()
    with pytest.raises(Unavailable):
        s.submit([1], ask, listeners[0])
