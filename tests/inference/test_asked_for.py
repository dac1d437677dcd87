"""What a request may ask for, against NumPy over the dense forward's logits."""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.inference.generation import best_of, complete, embed
from llm_jax.inference.request import InvalidRequest, QueueFull, SamplingParams
from llm_jax.kernels.attention import DenseContext
from llm_jax.models import Decoder

PROMPT = [5, 17, 42, 42, 99, 17, 3, 250]


def one(service, prompt=PROMPT, **asked):
    return complete(service, [list(prompt)], [SamplingParams(**({"max_tokens": 16, "ignore_eos": True} | asked))])[0]


def logprobs_of(logits):
    exact = logits.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


def greedy(dense_logits, change, count=16):
    """Token by token: the likeliest after `change(logits, output so far)`."""
    output = []
    for _ in range(count):
        output.append(int(change(dense_logits([*PROMPT, *output])[-1].astype(np.float64), output).argmax()))
    return tuple(output)


def test_penalties(service, dense_logits):
    """As Keskar et al. and OpenAI define them, at once; the counts go with the sequence, whatever slot it gets."""
    asked = {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": 0.9}

    def change(logits, output):
        seen = list({*PROMPT, *output})
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.4, logits[seen] * 1.4)
        for token in set(output):
            logits[token] -= 0.7 + 0.9 * output.count(token)
        return logits

    expected = greedy(dense_logits, change)
    assert one(service, **asked).token_ids == expected
    assert one(service).token_ids != expected
    crowd = [SamplingParams(max_tokens=9 + i, ignore_eos=True, frequency_penalty=i / 3) for i in range(14)]
    crowd.append(SamplingParams(max_tokens=16, ignore_eos=True, **asked))
    assert complete(service, [PROMPT] * 15, crowd)[-1].token_ids == expected


def test_logit_bias(service, dense_logits):
    free = one(service).token_ids
    expected = greedy(dense_logits, lambda logits, _: logits + np.where(np.arange(len(logits)) == 77, 3.5, 0)
                      + np.where(np.arange(len(logits)) == free[0], -100, 0))
    assert one(service, logit_bias={77: 3.5, free[0]: -100}).token_ids == expected
    assert free[0] not in expected


def test_ends(service, dense_logits):
    """Stop ids end, min_tokens forbids ends, ignore_eos is for the model's own end tokens alone."""
    free = one(service).token_ids
    end = free[5]
    at = free.index(end)
    got = one(service, stop_ids=(end,))
    assert got.token_ids == free[:at] and got.finish_reason == "stop"
    later = one(service, stop_ids=(end,), min_tokens=at + 3)
    assert later.token_ids[:at] == free[:at] and len(later.token_ids) >= at + 3 and end not in later.token_ids[:at + 3]
    expected = greedy(dense_logits, lambda logits, output: np.where(
        (np.arange(len(logits)) == end) & (len(output) < at + 3), -np.inf, logits))
    upto = next((i for i, token in enumerate(expected) if token == end), 16)
    assert later.token_ids == expected[:upto]


def test_logprobs_and_the_likeliest_beside_them(service, dense_logits):
    got = one(service, temperature=1.2, seed=5, logprobs=4)
    exact = logprobs_of(dense_logits([*PROMPT, *got.token_ids])[len(PROMPT) - 1:-1])
    assert len(got.top_logprobs) == 16
    for row, token, own, top in zip(exact, got.token_ids, got.logprobs, got.top_logprobs, strict=True):
        assert abs(row[token] - own) < 1e-4
        np.testing.assert_allclose([value for _, value in top], np.sort(row)[::-1][:4], atol=1e-4)
        np.testing.assert_allclose([row[i] for i, _ in top], np.sort(row)[::-1][:4], atol=1e-4)
    assert one(service, temperature=1.2, seed=5).token_ids == got.token_ids


@pytest.mark.parametrize("length", [1, 2, 8, 9, 30])
def test_logprobs_of_the_prompt(service, dense_logits, length):
    """In chunks of 8, also where the prompt's pages are in the prefix cache already."""
    prompt = np.random.default_rng(length).integers(0, 300, length).tolist()
    exact = logprobs_of(dense_logits(prompt))
    for most in (2, 0):
        got = one(service, prompt, max_tokens=3, prompt_logprobs=most)
        assert [p.token_id for p in got.prompt_logprobs] == prompt[1:]
        assert len(got.token_ids) == 3 and got.usage.cached_tokens == 0
        for i, p in enumerate(got.prompt_logprobs):
            assert abs(p.logprob - exact[i, prompt[i + 1]]) < 1e-4 and len(p.top) == most
            np.testing.assert_allclose([value for _, value in p.top], np.sort(exact[i])[::-1][:most], atol=1e-4)
    assert one(service, prompt).prompt_logprobs == ()


def test_samples_of_one_prompt(service):
    asked = SamplingParams(max_tokens=12, temperature=1.3, seed=8, ignore_eos=True)
    prompt = np.random.default_rng(3).integers(0, 300, 40).tolist()
    before = service.stats()
    found = best_of(service, prompt, asked, n=5)
    after = service.stats()
    assert len({c.token_ids for c in found}) > 1
    for i, c in enumerate(found):
        assert c.token_ids == complete(service, [prompt], [dataclasses.replace(asked, sample=i)])[0].token_ids
    # The prompt was computed once, but for the page that is not full.
    assert after["prompt_tokens"] - before["prompt_tokens"] < 40 + 5 * 8
    best = best_of(service, prompt, asked, n=2, candidates=5)
    ranked = sorted((c.mean_logprob for c in found), reverse=True)
    np.testing.assert_allclose([c.mean_logprob for c in best], ranked[:2], atol=1e-4)
    assert best_of(service, [1], SamplingParams(max_tokens=1), n=1)[0].usage.completion_tokens == 1
    with pytest.raises(InvalidRequest, match="best_of"):
        best_of(service, prompt, asked, n=3, candidates=2)
    with pytest.raises(QueueFull):
        best_of(service, prompt, asked, n=200)
    assert service.stats()["pages_used"] == 0 and service.stats()["waiting"] == 0


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_dense_forwards(service, config, params, pooling):
    prompts = [np.random.default_rng(n).integers(0, 300, n).tolist() for n in (1, 7, 8, 33)]
    got = embed(service, prompts, pooling)
    run = jax.jit(lambda t: Decoder(config).apply({"params": params}, t, np.arange(96)[None], DenseContext(),
                                                  method="hidden")[0])
    for prompt, mine in zip(prompts, got, strict=True):
        x = np.asarray(run(np.array([prompt + [0] * (96 - len(prompt))])))[0, :len(prompt)].astype(np.float64)
        np.testing.assert_allclose(mine, x.mean(0) if pooling == "mean" else x[-1], atol=1e-4)
    with pytest.raises(InvalidRequest, match="pooling"):
        embed(service, prompts, "max")


def test_deadlines(service):
    got = []
    service.submit(PROMPT, SamplingParams(max_tokens=80, ignore_eos=True), got.append, deadline_s=1e-6)
    until = time.monotonic() + 60
    while not (got and got[-1].finish_reason) and time.monotonic() < until:
        time.sleep(0.001)
    assert got[-1].finish_reason == "deadline" and service.stats()["pages_used"] == 0
    with pytest.raises(InvalidRequest, match="deadline_s"):
        service.submit(PROMPT, SamplingParams(), print, deadline_s=0.0)


def test_new_weights_are_served_without_a_restart(fresh, params, config):
    """In the middle of a request: its tokens so far stay, what follows is the new model's over all of them."""
    service = fresh()
    other = jax.tree.map(lambda leaf: leaf * 1.1, params)
    apply = jax.jit(lambda p, t: Decoder(config).apply({"params": p}, t))

    def follows(weights, tokens):
        row = np.array([tokens + [0] * (96 - len(tokens))])
        return int(np.asarray(apply(weights, row))[0, len(tokens) - 1].argmax())

    before = one(service)
    got = []
    service.submit(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True), got.append)
    while len(got) < 5:
        time.sleep(0.001)
    service.replace_weights(other)
    replaced = len(got)
    while got[-1].finish_reason is None:
        time.sleep(0.001)
    tokens = [t for d in got for t in d.token_ids]
    assert len(tokens) == 60
    for i in (0, 1, replaced + 2, 59):
        weights = params if i < 4 else other
        assert tokens[i] == follows(weights, [*PROMPT, *tokens[:i]]), i
    new = one(service)
    assert new.token_ids != before.token_ids
    for i in (0, 1, 7, 15):  # nothing of the old keys is in the prefix cache
        assert new.token_ids[i] == follows(other, [*PROMPT, *new.token_ids[:i]]), i
    wrong = jax.tree.map(lambda leaf: leaf, params)
    wrong["final_norm"] = {"scale": np.ones(3, np.float32)}
    with pytest.raises(UserError, match="not of the model"):
        service.replace_weights(wrong)
    assert one(service).token_ids == new.token_ids
    service.replace_weights(params)
    assert one(service).token_ids == before.token_ids


def test_ids_outside_the_vocabulary_are_named(service):
    for asked in ({"stop_ids": (100000,)}, {"logit_bias": {100000: 1.0}}):
        with pytest.raises(InvalidRequest, match="100000"):
            service.submit(PROMPT, SamplingParams(**asked), print)
    for name, value in [("min_p", 1.5), ("repetition_penalty", 0.0), ("presence_penalty", 200.0), ("logprobs", 21),
                        ("prompt_logprobs", -1), ("min_tokens", 200), ("stop_ids", (-1,)), ("logit_bias", {3: 101.0}),
                        ("logit_bias", {i: 1.0 for i in range(301)})]:
        with pytest.raises(InvalidRequest, match=name):
            SamplingParams(**{name: value})
