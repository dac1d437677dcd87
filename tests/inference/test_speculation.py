"""Proposed tokens: what comes out is what would come out without them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.generation import complete
from llm_jax.inference.request import SamplingParams
from llm_jax.inference.service import Service
from llm_jax.inference.speculation import Policy
from llm_jax.models import Decoder
from tests.inference.conftest import OPTIONS, sibling

WIDE = dataclasses.replace(OPTIONS, max_rows=4, prefill_rows=1, max_proposed=3)


@pytest.fixture(scope="module")
def wide(config, params):
    made = Engine(config, params, WIDE)
    made.compile()
    return made


@pytest.fixture(scope="module", params=["lookup", "draft", "draft of one layer"])
def speculating(request, config, params, tokenizer, wide):
    """A service that proposes tokens; the draft is a perturbed copy of the model, or a smaller one."""
    draft = None
    if request.param == "draft":
        noise = jax.tree.map(lambda leaf: leaf * 1.05, params)
        draft = (config, noise)
    elif request.param != "lookup":
        small = dataclasses.replace(config, num_layers=1)
        draft = (small, jax.jit(lambda key: models.init_params(Decoder(small), key))(jax.random.key(3)))
    engine = Engine(config, params, WIDE, draft=draft)
    engine._programs = wide._programs
    engine.compile()
    engine.policy = Policy(3, probe_every=2, prior=0.9)
    made = Service(engine, tokenizer)
    yield made
    made.close()


def repeating(count):
    """Prompts that say things twice, so that looking them up finds something."""
    rng = np.random.default_rng(2)
    return [rng.integers(4, 300, int(rng.integers(2, 9))).tolist() * 3 for _ in range(count)]


@pytest.mark.parametrize("asked", [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9, "logprobs": 2},
                                   {"temperature": 0.7, "top_k": 5, "min_tokens": 7}, {"logit_bias": {9: 4.0}},
                                   {"frequency_penalty": 1.0}])
def test_what_is_drawn_is_what_would_be_drawn_without(speculating, service, asked):
    prompts = repeating(7)
    params = [SamplingParams(max_tokens=int(10 + 7 * i), ignore_eos=True, seed=i, **asked) for i in range(7)]
    mine, plain = complete(speculating, prompts, params), complete(service, prompts, params)
    for a, b in zip(mine, plain, strict=True):
        assert a.token_ids == b.token_ids and a.text == b.text and a.finish_reason == b.finish_reason
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert [len(top) for top in a.top_logprobs] == [len(top) for top in b.top_logprobs]
    assert speculating.stats()["pages_used"] == 0


def test_a_draft_that_is_nearly_the_model_saves_steps(speculating):
    if speculating.engine.draft is None or speculating.engine.draft.config.num_layers == 1:
        return
    before = speculating.stats()
    got = complete(speculating, repeating(1), [SamplingParams(max_tokens=60, ignore_eos=True)])[0]
    after = speculating.stats()
    accepted, proposed = (after[name] - before[name] for name in ("accepted", "proposed"))
    assert len(got.token_ids) == 60 and accepted > 0.5 * proposed > 0
    assert after["steps"] - before["steps"] < 40


def test_a_text_that_repeats_itself_is_looked_up(wide, params, tokenizer):
    """Weights under which the model repeats the token it was given."""
    flat = jax.tree.map(lambda leaf: leaf * 0.0, params)
    flat["embed"] = {"embedding": params["embed"]["embedding"]}
    flat["unembed"] = params["embed"]["embedding"].T
    flat["final_norm"] = params["final_norm"]
    engine = sibling(wide)
    engine.set_params(flat)
    engine.policy = Policy(3)
    service = Service(engine, tokenizer)
    try:
        got = complete(service, [[7, 7, 7, 7]], [SamplingParams(max_tokens=40, ignore_eos=True)])[0]
        assert set(got.token_ids) == {7}
        assert service.stats()["steps"] < 20 and service.stats()["accepted"] > 25
    finally:
        service.close()


def test_full_batches_are_left_alone(speculating, service, monkeypatch):
    """More rows than a wide step has: nothing is proposed while they run, and everyone gets the same tokens."""
    monkeypatch.setattr(speculating.engine, "wide_rows", 2)
    prompts = repeating(4)
    params = [SamplingParams(max_tokens=40 if i < 3 else 60, ignore_eos=True) for i in range(4)]
    before = speculating.stats()
    mine = complete(speculating, prompts, params)
    after = speculating.stats()
    assert [c.token_ids for c in mine] == [c.token_ids for c in complete(service, prompts, params)]
    assert after["steps"] - before["steps"] >= 40 and after["proposed"] - before["proposed"] <= 24 * 3


def test_drafts_that_do_not_fit_are_refused(config, params):
    with pytest.raises(UserError, match="same tokenizer"):
        Engine(config, params, WIDE, draft=(dataclasses.replace(config, vocab_size=99), params))
    with pytest.raises(UserError, match="context is 64"):
        Engine(config, params, WIDE, draft=(dataclasses.replace(config, max_context=64), params))
    with pytest.raises(UserError, match="max_proposed=0"):
        Engine(config, params, OPTIONS, draft=(config, params))
    with pytest.raises(UserError, match="deterministic"):
        EngineConfig(deterministic=True, max_proposed=2)
