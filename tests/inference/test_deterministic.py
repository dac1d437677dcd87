"""Logits to the bit, whatever else is in the batch and however a prompt was cut."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.generation import complete
from llm_jax.inference.request import SamplingParams
from llm_jax.inference.scheduler import Sequence
from llm_jax.inference.service import Service
from llm_jax.models import Decoder
from tests.inference.conftest import OPTIONS

SAME = dataclasses.replace(OPTIONS, max_rows=5, prefill_rows=2, chunk=6, deterministic=True)


@pytest.fixture(scope="module")
def exact(config, params):
    made = Engine(config, params, SAME)
    made.compile()
    assert len(made.shapes) == 1
    return made


def logits_along(engine, texts, cut):
    """float32 logits after each token of the texts, all of them in shared steps, with the given number of prompt
    tokens of each known at once."""
    engine.reset()
    scheduler = engine.make_scheduler(max_queue=9)
    for i, text in enumerate(texts):
        scheduler.add(Sequence(i, text[:cut], cut, 90, reuse=False))
    found = [{} for _ in texts]
    while plan := scheduler.schedule():
        step = engine.prepare(plan, {})
        scheduler.dispatched(plan)
        engine.pools, engine._last_S, *_, logits_RV, _ = engine._programs["forward"](
            engine.params, engine.pools, engine._last_S, step.batch)
        logits = np.asarray(logits_RV)
        for d in step.draws:
            s = next(c.sequence for c in plan if c.sequence.id == d.sequence_id)
            found[d.sequence_id][len(s.tokens) - 2] = logits[d.row]
        scheduler.resolve(plan, {d.sequence_id: [(texts[d.sequence_id] + [0])[
            len(next(c.sequence for c in plan if c.sequence.id == d.sequence_id).tokens) - 1]] for d in step.draws})
        for s in list(scheduler.running):
            if s.computed == len(texts[s.id]):
                scheduler.remove(s)
    return found


def test_logits_are_the_same_bits_alone_together_and_cut_anyhow(exact):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 300, 40).tolist() for _ in range(5)]
    together = logits_along(exact, texts, 1)
    for cut in (3, 17, 40):
        alone = logits_along(exact, texts[:1], cut)[0]
        assert len(alone) == 40 - cut + 1
        for position, row in alone.items():
            assert jnp.array_equal(row, together[0][position]), (cut, position)
    pair = logits_along(exact, [texts[3], texts[1]], 20)
    for position, row in pair[1].items():
        assert jnp.array_equal(row, together[1][position])


def test_seeded_requests_repeat_to_the_bit(exact, tokenizer):
    service = Service(exact, tokenizer)
    try:
        asked = SamplingParams(max_tokens=25, temperature=1.0, seed=4, ignore_eos=True)
        crowd = [SamplingParams(max_tokens=9 + i, temperature=1.5, ignore_eos=True) for i in range(7)]
        prompt = list(range(20, 43))
        alone = complete(service, [prompt], [asked])[0]
        for _ in range(2):
            got = complete(service, [[5 + i] * (3 * i + 1) for i in range(7)] + [prompt], [*crowd, asked])[-1]
            assert got.token_ids == alone.token_ids and got.logprobs == alone.logprobs
    finally:
        service.close()


CACHES = {"bfloat16": (0.005, 0.04), "int8": (0.012, 0.06), "float8_e4m3fn": (0.06, 0.3)}


@pytest.mark.parametrize("dtype", CACHES)
def test_narrow_caches_err_by_little(config, params, tokenizer, dtype):
    """Log-probabilities of drawn tokens against the dense float32 forward: mean and largest difference. At the scale of
    initialisation: the fixture's larger weights answer to any error with a far larger one."""
    params = jax.tree.map(lambda leaf: leaf / 2, params)
    dense = jax.jit(lambda t: Decoder(config).apply({"params": params}, t))
    engine = Engine(config, params, EngineConfig(max_rows=2, prefill_rows=1, chunk=16, page_size=4, num_pages=60,
                                                 dtype="float32", cache_dtype=dtype))
    engine.shapes = engine.shapes[-1:]
    engine.compile()
    service = Service(engine, tokenizer)
    try:
        prompts = [np.random.default_rng(i).integers(0, 300, 30).tolist() for i in range(2)]
        errors = []
        for prompt, got in zip(prompts, complete(service, prompts, [SamplingParams(
                max_tokens=50, temperature=1.0, seed=1, ignore_eos=True)] * 2), strict=True):
            row = np.array([prompt + list(got.token_ids) + [0] * 16])
            logits = np.asarray(dense(row))[0, 29:79].astype(np.float64)
            exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            errors.append(np.abs(exact[np.arange(50), list(got.token_ids)] - got.logprobs))
        mean, largest = CACHES[dtype]
        assert 1e-5 < np.mean(errors) < mean and np.max(errors) < largest
    finally:
        service.close()
